// What kernels call: the interface between the headers in tests/simt/include and the executor behind them.
//
// The executor runs CUDA C++ kernels, compiled by the host compiler, on the CPU and watches every access they make:
//
//   fibers     every thread of a block is a fiber; they all run on one thread of the operating system      fibers.h
//   machine    the block that runs, who may run next, barriers, threads that end                           machine.h
//   warp       operations that the lanes of a warp perform together: shuffles, votes, matrix products      warp.h
//   memory     what may be accessed: operands, shared memory; what a byte went through; data races         memory.h
//   copies     asynchronous copies, carried out as late as their thread allows                             copies.cpp
//   report     a violation ends the launch with an exception that names the source line                    report.h
//
// Kernels are compiled with -fsanitize=thread but not linked with its run time: the compiler then calls __tsan_read4
// and its like before every access, and callbacks.cpp defines those. The executor itself is not compiled that way.
//
// Where later generations of hardware would go: mbarrier and named barriers beside the block barrier in machine.cpp (a
// thread waits in `waiting_at`, and whoever completes a phase makes it ready); TMA beside copies.cpp (the same pending
// bytes, completed by the wait on the mbarrier; swizzle and fill are a matter of addresses); wgmma beside matrix.cpp (a
// rendezvous of four warps instead of one, operands read when the group is waited for).
#pragma once

#include <cstddef>
#include <cstdint>

#define SIMT_API __attribute__((visibility("default")))

namespace simt {

struct Index {
  unsigned x, y, z;
};

// A kernel never sees these change, so the compiler may keep them in registers.
SIMT_API Index thread_index() __attribute__((const));
SIMT_API Index block_index() __attribute__((const));
SIMT_API Index block_size() __attribute__((const));
SIMT_API Index grid_size() __attribute__((const));
SIMT_API void* dynamic_shared();

// Where in the source an operation stands. Lanes that meet must do so at one site.
struct Site {
  const char* file;
  int line;
};
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE \
  ::simt::Site { file, line }

enum class BarrierKind { plain, any, all, count };
SIMT_API int block_barrier(BarrierKind kind, int predicate, Site site);

SIMT_API void warp_barrier(unsigned mask, Site site);
SIMT_API unsigned active_mask(Site site);

enum class ShuffleKind { index, up, down, exclusive_or };
SIMT_API uint64_t shuffle(ShuffleKind kind, unsigned mask, uint64_t value, int operand, int width, Site site);

enum class VoteKind { ballot, any, all };
SIMT_API unsigned vote(VoteKind kind, unsigned mask, int predicate, Site site);
SIMT_API unsigned match_any(unsigned mask, uint64_t value, Site site);
SIMT_API unsigned match_all(unsigned mask, uint64_t value, int* predicate, Site site);

enum class ReduceKind { add, min, max, min_signed, max_signed, bit_and, bit_or, bit_xor };
SIMT_API unsigned reduce(ReduceKind kind, unsigned mask, unsigned value, Site site);

enum class AtomicKind { add, min, max, exchange, compare_and_swap, bit_and, bit_or, bit_xor, increment, decrement };
SIMT_API int atomic(AtomicKind kind, int* address, int value, int compare = 0);
SIMT_API unsigned atomic(AtomicKind kind, unsigned* address, unsigned value, unsigned compare = 0);
SIMT_API unsigned long long atomic(
    AtomicKind kind, unsigned long long* address, unsigned long long value, unsigned long long compare = 0);
SIMT_API float atomic(AtomicKind kind, float* address, float value);
SIMT_API double atomic(AtomicKind kind, double* address, double value);

// cp.async of 16 bytes, its groups, and the wait for them.
SIMT_API void copy_async_16(void* shared, const void* global, int bytes);
SIMT_API void commit_copies();
SIMT_API void wait_copies(int pending);

// ldmatrix of 2 or 4 matrices, and mma.sync; see ptx/matrix.h.
SIMT_API void load_matrices(uint32_t* matrices, int count, bool transposed, const void* row, Site site);
enum class MatrixType { bf16, f16, tf32 };
SIMT_API void multiply(MatrixType type, float* sums, const uint32_t* left, const uint32_t* right, Site site);

// A tensor that a launch may touch; sizes and strides in elements.
struct OperandView {
  const char* name;
  const char* description;
  const void* data;
  bool writable;
  int64_t element_bytes;
  int dimensions;
  const int64_t* sizes;
  const int64_t* strides;
};

struct Launch {
  const char* operation;
  int64_t grid_x, grid_y, grid_z;
  int threads;
  size_t dynamic_shared_bytes;
  const void* kernel;
  void (*call)(const void* kernel, const void* arguments);  // what every thread runs
  const void* arguments;
  const OperandView* operands;
  int operand_count;
};

// Runs all blocks. Throws std::runtime_error at the first violation; the message names the kernel and the source line.
SIMT_API void run(const Launch& launch);

}  // namespace simt

// The seed of the order in which blocks, warps and lanes run; also read from the environment, PK_SIMT_SEED.
extern "C" SIMT_API void simt_set_seed(uint64_t seed);
