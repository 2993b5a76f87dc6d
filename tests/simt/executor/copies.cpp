// Asynchronous copies to shared memory. A copy is carried out, source read included, when its thread waits for its
// group: the latest moment the hardware may choose. Until then nobody may touch its destination.

#include <cstring>

#include "machine.h"
#include "memory.h"
#include "report.h"

namespace simt {

namespace {

void complete(const Copy& copy) {
  const auto from = reinterpret_cast<uintptr_t>(copy.global), to = reinterpret_cast<uintptr_t>(copy.shared);
  if (copy.bytes > 0) check_access_from(from, static_cast<size_t>(copy.bytes), Use::read, copy.pc);
  end_pending(to, 16, copy.pc);
  std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes));
  std::memset(copy.shared + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

}  // namespace

void copy_async_16(void* shared, const void* global, int bytes) {
  const uint32_t pc = relative_pc(__builtin_return_address(0));
  const auto from = reinterpret_cast<uintptr_t>(global), to = reinterpret_cast<uintptr_t>(shared);
  check_alignment(from, 16, pc);
  check_alignment(to, 16, pc);
  if (!is_shared(to)) violation("out-of-bounds shared write", "the destination of a copy is not shared memory", pc);
  if (bytes < 0 || bytes > 16) {
    violation("out-of-bounds global read", "a copy of " + std::to_string(bytes) + " of 16 bytes", pc);
  }
  // Bounds of the source now, while the line is known to be the caller's; its contents when the copy is waited for.
  if (bytes > 0) check_access_from(from, static_cast<size_t>(bytes), Use::read, pc);
  begin_pending(to, 16, pc);
  Thread& thread = self();
  thread.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), bytes, thread.open_group, pc});
}

void commit_copies() { ++self().open_group; }

void wait_copies(int pending) {
  Thread& thread = self();
  const int keep = thread.open_group - pending;  // groups from here on may stay in flight
  size_t done = 0;
  // Copies not yet in a group are not waited for, even by wait_copies<0>.
  while (done < thread.copies.size() && thread.copies[done].group < keep) complete(thread.copies[done++]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

}  // namespace simt
