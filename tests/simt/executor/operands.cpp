#include "operands.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

namespace simt {

std::vector<Operand> operands;

Operand::Operand(const OperandView& view)
    : name_(view.name),
      description_(view.description),
      writable_(view.writable),
      element_bytes_(static_cast<size_t>(view.element_bytes)) {
  begin_ = end_ = reinterpret_cast<uintptr_t>(view.data);
  int64_t extent = view.element_bytes;
  for (int i = 0; i < view.dimensions; ++i) {
    if (view.sizes[i] == 0) return;
    extent += (view.sizes[i] - 1) * view.strides[i] * view.element_bytes;
    // A dimension that repeats memory adds none.
    if (view.sizes[i] > 1 && view.strides[i] > 0) {
      dimensions_.push_back({view.sizes[i], view.strides[i] * view.element_bytes});
    }
  }
  end_ = begin_ + static_cast<uintptr_t>(extent);
  std::sort(dimensions_.begin(), dimensions_.end(), [](const Dimension& a, const Dimension& b) {
    return a.stride > b.stride;
  });
  run_bytes_ = element_bytes_;
  while (!dimensions_.empty() && dimensions_.back().stride == static_cast<int64_t>(run_bytes_)) {
    run_bytes_ *= static_cast<size_t>(dimensions_.back().size);
    dimensions_.pop_back();
  }
  int64_t inner = static_cast<int64_t>(run_bytes_);
  for (size_t i = dimensions_.size(); i-- > 0;) {
    nested_ = nested_ && dimensions_[i].stride >= inner;
    inner += (dimensions_[i].size - 1) * dimensions_[i].stride;
  }
  if (nested_) return;
  covered_.resize(static_cast<size_t>(extent));
  std::vector<int64_t> starts = {0};
  for (const Dimension& dimension : dimensions_) {
    std::vector<int64_t> next;
    for (const int64_t start : starts) {
      for (int64_t i = 0; i < dimension.size; ++i) next.push_back(start + i * dimension.stride);
    }
    starts = std::move(next);
  }
  for (const int64_t start : starts) std::fill_n(covered_.begin() + start, run_bytes_, true);
}

bool Operand::covers(uintptr_t address, size_t bytes) const {
  if (address < begin_ || address >= end_ || bytes > end_ - address) return false;
  uintptr_t offset = address - begin_;
  if (!nested_)
    return std::all_of(covered_.begin() + offset, covered_.begin() + offset + bytes, [](bool b) { return b; });
  for (const Dimension& dimension : dimensions_) {
    const uintptr_t index = offset / static_cast<uintptr_t>(dimension.stride);
    if (index >= static_cast<uintptr_t>(dimension.size)) return false;
    offset -= index * static_cast<uintptr_t>(dimension.stride);
  }
  return offset + bytes <= run_bytes_;
}

uintptr_t Operand::distance(uintptr_t address) const {
  return address < begin_ ? begin_ - address : address >= end_ ? address - end_ : 0;
}

std::string Operand::position_of(uintptr_t address) const {
  return "at byte " + std::to_string(static_cast<int64_t>(address - begin_)) + " of operand '" + name_ + "' (" +
         description_ + ")";
}

std::string Operand::relation_to(uintptr_t address, size_t bytes) const {
  const std::string name = " operand '" + name_ + "' (" + description_ + ")";
  if (address >= end_) return std::to_string(address - end_) + " bytes past the end of" + name;
  if (address + bytes <= begin_) return std::to_string(begin_ - address) + " bytes before the start of" + name;
  const bool beyond = address < begin_ || address + bytes > end_;
  return position_of(address) + (beyond ? ", partly outside" : ", in part or all between its elements");
}

Cell* Operand::cells(uintptr_t address, size_t bytes, size_t& count) const {
  const size_t first = (address - begin_) / element_bytes_, last = (address + bytes - 1 - begin_) / element_bytes_;
  count = last - first + 1;
  return shadow_ + first;
}

size_t Operand::cell_count() const { return (end_ - begin_) / element_bytes_ + 1; }

namespace {

// Cells for all launches; pages cost nothing before they are touched. Cells of earlier launches need no clearing, as
// their epochs are in the past.
class ShadowArena {
 public:
  Cell* take(size_t count) {
    if (memory_ == nullptr || used_ + count > kCells) abort();
    Cell* cells = memory_ + used_;
    used_ += count;
    return cells;
  }
  void reset() {
    if (memory_ == nullptr) {
      void* memory = mmap(
          nullptr, kCells * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) abort();
      memory_ = static_cast<Cell*>(memory);
    }
    if (used_ > kKeep) madvise(memory_, used_ * sizeof(Cell), MADV_DONTNEED);
    used_ = 0;
  }

 private:
  static constexpr size_t kCells = size_t{1} << 30, kKeep = size_t{1} << 22;
  Cell* memory_ = nullptr;
  size_t used_ = 0;
} arena;

}  // namespace

void set_operands(const Launch& launch) {
  operands.clear();
  arena.reset();
  for (const bool writable : {true, false}) {
    for (int i = 0; i < launch.operand_count; ++i) {
      if (launch.operands[i].writable != writable) continue;
      operands.emplace_back(launch.operands[i]);
      if (writable) operands.back().set_shadow(arena.take(operands.back().cell_count()));
    }
  }
}

}  // namespace simt
