// Shared memory: the dynamic arena and the __shared__ variables of the kernel's library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "races.h"

namespace simt {

// A contiguous piece of shared memory that accesses must stay within.
struct SharedPiece {
  uintptr_t begin = 0, end = 0;
  Cell* cells = nullptr;  // one per byte
  std::string name;
};

// Whether an address is in, or so close around, shared memory that an access to it is meant for it.
bool near_shared(uintptr_t address);
// The piece at an address, or the nearest; null when there is none.
const SharedPiece* shared_piece(uintptr_t address);
// Code and constants of the kernel's library.
bool is_constant(uintptr_t address, size_t bytes);

void set_shared(const Launch& launch);
void begin_block_shared();

}  // namespace simt
