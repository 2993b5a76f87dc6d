#include "memory.h"

#include <string>

#include "operands.h"
#include "report.h"
#include "shared.h"

namespace simt {

thread_local WatchedStack watched_stack __attribute__((tls_model("initial-exec")));

namespace {

std::string what(size_t bytes, Use use) {
  const char* name = use == Use::read ? "read" : use == Use::write ? "write" : "atomic operation";
  return std::string(name) + " of " + std::to_string(bytes) + " bytes";
}

std::string hexadecimal(uintptr_t address) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%zx", static_cast<size_t>(address));
  return text;
}

// The block that ran at an epoch of this launch.
Index block_of(uint32_t epoch) {
  Index block = machine.block;
  for (const auto& [start, index] : machine.block_starts) {
    if (start <= epoch) block = index;
  }
  return block;
}

[[noreturn]] void race(
    const char* kind, const std::string& where, size_t bytes, Use use, const Conflict& with, uint32_t pc) {
  std::string text = what(bytes, use) + " " + where + ", not ordered after the " +
                     (with.with_write ? "write" : "read") + " by thread " + std::to_string(with.thread);
  if (with.epoch < machine.block_start) text += " of " + describe_block(block_of(with.epoch));
  if (with.thread == self().index && with.epoch >= machine.block_start) text += " and others";
  violation(kind, text + " at " + describe_pc(with.pc), pc);
}

[[noreturn]] void outside_shared(uintptr_t address, size_t bytes, Use use, const SharedPiece* piece, uint32_t pc) {
  std::string text = what(bytes, use);
  if (piece == nullptr) {
    text += " below all shared memory";
  } else if (address >= piece->end) {
    text += " " + std::to_string(address - piece->end) + " bytes past the end of " + piece->name;
  } else if (address < piece->begin) {
    text += " " + std::to_string(piece->begin - address) + " bytes before the start of " + piece->name;
  } else {
    text += " partly past the end of " + piece->name;
  }
  if (piece != nullptr) text += " (" + std::to_string(piece->end - piece->begin) + " bytes)";
  violation(use == Use::read ? "out-of-bounds shared read" : "out-of-bounds shared write", text, pc);
}

std::string at_byte(uintptr_t address, const SharedPiece& piece) {
  return "at byte " + std::to_string(address - piece.begin) + " of " + piece.name;
}

[[noreturn]] void pending_access(
    uintptr_t address, size_t bytes, Use use, const SharedPiece& piece, const Cell& cell, uint32_t pc) {
  violation(
      "copy not waited for",
      what(bytes, use) + " " + at_byte(address, piece) + ", where a copy is in flight that thread " +
          std::to_string(cell.write.thread) + " issued at " + describe_pc(cell.write.pc),
      pc);
}

const SharedPiece& piece_around(uintptr_t address, size_t bytes, Use use, uint32_t pc) {
  const SharedPiece* piece = shared_piece(address);
  if (piece == nullptr || address < piece->begin || address + bytes > piece->end) {
    outside_shared(address, bytes, use, piece, pc);
  }
  return *piece;
}

void shared_access(uintptr_t address, size_t bytes, Use use, uint32_t pc) {
  const SharedPiece& piece = piece_around(address, bytes, use, pc);
  const RaceRules rules(machine.block_start, pc);
  Cell* cells = piece.cells + (address - piece.begin);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[i];
    const bool written = cell.write.epoch >= machine.block_start;
    if (written && (cell.write.flags & Record::kPending)) pending_access(address, bytes, use, piece, cell, pc);
    if (!written && use != Use::write) {
      violation("read of uninitialised shared memory", what(bytes, use) + " " + at_byte(address + i, piece), pc);
    }
    const Conflict conflict = rules.access(cell, use);
    if (conflict.found) race("race on shared memory", at_byte(address + i, piece), bytes, use, conflict, pc);
  }
}

[[noreturn]] void outside_global(uintptr_t address, size_t bytes, Use use, uint32_t pc) {
  const Operand* nearest = nullptr;
  for (const Operand& operand : operands) {
    if (use != Use::read && operand.covers(address, bytes)) {
      violation("write to a read-only operand", what(bytes, use) + " " + operand.position_of(address), pc);
    }
    if (nearest == nullptr || operand.distance(address) < nearest->distance(address)) nearest = &operand;
  }
  constexpr uintptr_t kFar = uintptr_t{1} << 32;
  std::string text = what(bytes, use) + " ";
  if (address < 4096) {
    text += "through a null pointer, address " + hexadecimal(address);
  } else if (nearest == nullptr || nearest->distance(address) > kFar) {
    text += "at " + hexadecimal(address) + ", far from every operand";
  } else {
    text += nearest->relation_to(address, bytes);
  }
  violation(use == Use::read ? "out-of-bounds global read" : "out-of-bounds global write", text, pc);
}

void global_access(uintptr_t address, size_t bytes, Use use, uint32_t pc) {
  for (const Operand& operand : operands) {
    if (!operand.contains_some(address, bytes) || !operand.covers(address, bytes)) continue;
    if (!operand.writable()) {
      if (use != Use::read) break;
      return;  // nobody writes, so nobody races
    }
    const RaceRules rules(machine.launch_start, pc);
    size_t count = 0;
    Cell* cells = operand.cells(address, bytes, count);
    for (size_t i = 0; i < count; ++i) {
      const Conflict conflict = rules.access(cells[i], use);
      if (conflict.found) race("race on global memory", operand.position_of(address), bytes, use, conflict, pc);
    }
    return;
  }
  if (use == Use::read && is_constant(address, bytes)) return;
  outside_global(address, bytes, use, pc);
}

}  // namespace

bool is_shared(uintptr_t address) { return near_shared(address); }

void check_access_from(uintptr_t address, size_t bytes, Use use, uint32_t pc) {
  if (near_shared(address)) {
    shared_access(address, bytes, use, pc);
  } else {
    global_access(address, bytes, use, pc);
  }
}

void check_access(uintptr_t address, size_t bytes, Use use, const void* return_address) {
  check_access_from(address, bytes, use, relative_pc(return_address));
}

void check_alignment(uintptr_t address, size_t alignment, uint32_t pc) {
  if (address % alignment == 0) return;
  violation(
      "misaligned access",
      "address " + hexadecimal(address) + " is not a multiple of the access's " + std::to_string(alignment) + " bytes",
      pc);
}

void begin_pending(uintptr_t shared, size_t bytes, uint32_t pc) {
  const SharedPiece& piece = piece_around(shared, bytes, Use::write, pc);
  const RaceRules rules(machine.block_start, pc);
  Cell* cells = piece.cells + (shared - piece.begin);
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[i];
    if (cell.write.epoch >= machine.block_start && (cell.write.flags & Record::kPending)) {
      pending_access(shared, bytes, Use::write, piece, cell, pc);
    }
    // What was read before a barrier may be overwritten from now on, no matter when the copy ends.
    const Conflict conflict = rules.access(cell, Use::write);
    if (conflict.found) race("race on shared memory", at_byte(shared + i, piece), bytes, Use::write, conflict, pc);
    cell.write.flags |= Record::kPending;
  }
}

void end_pending(uintptr_t shared, size_t bytes, uint32_t pc) {
  const SharedPiece& piece = piece_around(shared, bytes, Use::write, pc);
  const RaceRules rules(machine.block_start, pc);
  Cell* cells = piece.cells + (shared - piece.begin);
  for (size_t i = 0; i < bytes; ++i) rules.record(cells[i], Use::write);
}

void begin_launch_memory() {
  machine.launch_start = ++machine.epoch;
  machine.block_starts.clear();
  set_operands(*machine.launch);
  set_shared(*machine.launch);
}

void begin_block_memory() { begin_block_shared(); }

}  // namespace simt
