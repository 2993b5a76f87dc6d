// The global memory of a launch: exactly the elements of its operands, gaps between rows excluded.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "executor.h"
#include "races.h"

namespace simt {

class Operand {
 public:
  explicit Operand(const OperandView& view);

  bool contains_some(uintptr_t address, size_t bytes) const { return address < end_ && address + bytes > begin_; }
  // Whether all these bytes belong to elements.
  bool covers(uintptr_t address, size_t bytes) const;
  bool writable() const { return writable_; }
  // "at byte 4 of operand 'out' (float32 [3, 4] on cpu)", and for what it does not cover how far outside it is.
  std::string position_of(uintptr_t address) const;
  std::string relation_to(uintptr_t address, size_t bytes) const;
  uintptr_t distance(uintptr_t address) const;
  // One cell per element: threads own elements, and smaller pieces would cost more than they tell.
  Cell* cells(uintptr_t address, size_t bytes, size_t& count) const;
  size_t cell_count() const;
  void set_shadow(Cell* shadow) { shadow_ = shadow; }

 private:
  struct Dimension {
    int64_t size, stride;  // stride in bytes
  };
  std::string name_, description_;
  bool writable_, nested_ = true;
  uintptr_t begin_ = 0, end_ = 0;
  size_t element_bytes_;
  size_t run_bytes_ = 0;               // elements that follow each other without a gap
  std::vector<Dimension> dimensions_;  // above the runs, largest stride first
  std::vector<bool> covered_;          // per byte, where dimensions overlap or interleave
  Cell* shadow_ = nullptr;
};

// The operands of the running launch, the writable ones first.
extern std::vector<Operand> operands;
void set_operands(const Launch& launch);

}  // namespace simt
