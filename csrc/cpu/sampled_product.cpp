// The gradient of sparse deltas on the CPU, (grad_out^T x)[indices]: grad_out [M, N], x [M, K] -> [nnz].
//
// Columns of x are transposed a block at a time, which stays in the second cache, over a chunk of rows; then the
// entries take their dot products out of it, with columns of grad_out that are transposed on the way. Bytes: x once,
// grad_out once per block of columns of x, and per entry one column of x out of the cache. FLOP: 2 M per entry.
//
// Where matrix tiles are to be had and entries are many, the product is computed instead, a tile at a time, and the
// entries of a tile are taken out of it; tiles that have none are left out. FLOP: 2 M per element of such a tile.
//
// Threads share the entries, or the rows of the product. The way, blocks and chunks follow from the shape, and a sum
// from its two columns alone, so that the bits are the same for any number of threads.
#include "../common/sampled_checks.h"
#include "capability.h"
#include "lora_checks.h"
#include "lora_products.h"
#include "parallel.h"
#include "sampled_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <string_view>

namespace peft_kernels {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 20;  // a block of transposed columns: half of a common second cache
constexpr int64_t kColumnBytes = 512;    // of a transposed column: a chunk of rows; 32 of them fit the first cache
constexpr int64_t kUnitColumns = 32;     // columns of x that are transposed, or left out, together
constexpr int64_t kGradOutColumns = 64;  // columns of grad_out transposed at a time
constexpr int64_t kUnitEntries = 64;
constexpr int64_t kTileRate = 16;  // multiply-adds of a tile in the time of one of a vector

// The kernels that go with those of the LoRA operators. bfloat16 dot products are an extension of AVX-512 of their own,
// which matrix tiles imply; PEFT_KERNELS_CPU_CAPABILITY=avx512 leaves them out.
const SampledKernels& choose_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability == Capability::amx && __builtin_cpu_supports("avx512bf16")) return sampled_kernels_avx512bf16;
  if (capability >= Capability::avx512) return sampled_kernels_avx512;
  if (capability == Capability::avx2) return sampled_kernels_avx2;
#endif
  return sampled_kernels_baseline;
}

// The density from which tiles are the faster way, one entry in so many elements (measured from 576 x 1536 to
// 2048 x 2048).
constexpr int64_t kTilesFromOneIn = 18;

const SampledTiles* tiles_for(DType dtype, int64_t entries, int64_t elements) {
  return entries >= divide_up(elements, kTilesFromOneIn) ? sampled_tiles_for(dtype) : nullptr;
}

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

// Sums of all entries in the accumulation dtype, for indices of one dtype.
template <typename Index>
class SampledProduct {
 public:
  SampledProduct(
      const SampledKernel& kernel, const SampledTiles* tiles, const Matrix& grad_out, const Matrix& x,
      const Index* indices, int64_t entries)
      : kernel_(kernel), tiles_(tiles), grad_out_(grad_out), x_(x), indices_(indices), entries_(entries) {
    depth_ = cut_evenly(x.rows, kColumnBytes / kernel.element_bytes, kernel.lanes);
    stride_ = depth_ + 64 / kernel.element_bytes;  // columns start in different sets of the caches
    block_ = cut_evenly(x.columns, kBlockBytes / kernel.element_bytes / depth_, kUnitColumns);
    blocks_ = divide_up(x.columns, block_);
  }

  // sums [entries] += grad_out^T x there.
  void run(char* sums, int64_t sum_bytes) const {
    const Scratch starts_memory((grad_out_.columns * blocks_ + 1) * sizeof(int64_t));
    const Scratch used_memory(divide_up(x_.columns, kUnitColumns));
    const Scratch columns_memory(block_ * stride_ * kernel_.element_bytes);
    int64_t* starts = static_cast<int64_t*>(starts_memory.get());
    uint8_t* used = static_cast<uint8_t*>(used_memory.get());
    char* columns = static_cast<char*>(columns_memory.get());
    find_entries(starts, used);
    for (int64_t first = 0; first < x_.rows; first += depth_) {
      const int64_t rows = std::min(depth_, x_.rows - first);
      for (int64_t block = 0; block < blocks_; ++block) {
        transpose_block(first, rows, block, used, columns);
        if (tiles_ != nullptr) {
          parallel_units(grad_out_.columns, kTileRows, rows * block_ / kTileRate, [&](int64_t begin, int64_t end) {
            multiply_tiles(first, rows, block, begin, end, starts, columns, reinterpret_cast<float*>(sums));
          });
        } else {
          parallel_units(entries_, kUnitEntries, rows, [&](int64_t begin, int64_t end) {
            multiply_entries(first, rows, block, begin, end, starts, columns, sums, sum_bytes);
          });
        }
      }
    }
  }

 private:
  // The length of equal pieces of `size`, at most `most` but for rounding up to a multiple of `unit`.
  static int64_t cut_evenly(int64_t size, int64_t most, int64_t unit) {
    most = std::max(unit, most / unit * unit);
    return std::max(unit, round_up(divide_up(size, std::max<int64_t>(1, divide_up(size, most))), unit));
  }

  // starts[n * blocks + b]: the first entry of row n and block b, one more at the end; and which units of columns have
  // entries.
  void find_entries(int64_t* starts, uint8_t* used) const {
    std::fill_n(used, divide_up(x_.columns, kUnitColumns), uint8_t{0});
    starts[grad_out_.columns * blocks_] = entries_;
    const int64_t per_row = 8 * (blocks_ + entries_ / grad_out_.columns);
    parallel_units(grad_out_.columns, 1, per_row, [&](int64_t begin, int64_t end) {
      const Index* last = indices_ + entries_;
      const Index* at = std::partition_point(
          indices_, last, [&](Index index) { return static_cast<int64_t>(index) < begin * x_.columns; });
      for (int64_t n = begin; n < end; ++n) {
        const int64_t base = n * x_.columns;
        for (int64_t block = 0; block < blocks_; ++block) {
          starts[n * blocks_ + block] = at - indices_;
          const int64_t limit = base + std::min(x_.columns, (block + 1) * block_);
          for (; at < last && static_cast<int64_t>(*at) < limit; ++at) {
            // Asking first leaves the line shared between the threads.
            const std::atomic_ref<uint8_t> flag(used[(static_cast<int64_t>(*at) - base) / kUnitColumns]);
            if (flag.load(std::memory_order_relaxed) == 0) flag.store(1, std::memory_order_relaxed);
          }
        }
      }
    });
  }

  void transpose_block(int64_t first, int64_t rows, int64_t block, const uint8_t* used, char* columns) const {
    const int64_t origin = block * block_, size = std::min(block_, x_.columns - origin);
    parallel_units(size, kUnitColumns, rows, [&](int64_t begin, int64_t end) {
      const uint8_t* units = used + origin / kUnitColumns;
      while (begin < end) {
        int64_t stop = begin;
        while (stop < end && units[stop / kUnitColumns]) stop = std::min(end, stop + kUnitColumns);
        if (begin < stop && tiles_ != nullptr) {
          const int64_t bytes = round_up(rows, kernel_.lanes) * kernel_.element_bytes;
          tiles_->lay_out(x_, first, rows, origin + begin, origin + stop, columns + begin * bytes);
        } else if (begin < stop) {
          kernel_.transpose(
              x_, first, rows, origin + begin, origin + stop, columns + begin * stride_ * kernel_.element_bytes,
              stride_);
        }
        begin = std::max(stop, begin + kUnitColumns);
      }
    });
  }

  // Entries [begin, end), as far as they are in the block.
  void multiply_entries(
      int64_t first, int64_t rows, int64_t block, int64_t begin, int64_t end, const int64_t* starts,
      const char* columns, char* sums, int64_t sum_bytes) const {
    const int64_t depth = round_up(rows, kernel_.lanes), column_bytes = stride_ * kernel_.element_bytes;
    const int64_t first_row = indices_[begin] / x_.columns, end_row = indices_[end - 1] / x_.columns + 1;
    const Scratch memory(kGradOutColumns * column_bytes);
    char* left = static_cast<char*>(memory.get());
    for (int64_t from = first_row, to; from < end_row; from = to) {
      to = std::min(end_row, from + kGradOutColumns);
      if (starts[from * blocks_] == starts[to * blocks_]) continue;
      kernel_.transpose(grad_out_, first, rows, from, to, left, stride_);
      for (int64_t n = from; n < to; ++n) {
        const int64_t* range = starts + n * blocks_ + block;
        const int64_t entry = std::max(begin, range[0]), count = std::min(end, range[1]) - entry;
        if (count <= 0) continue;
        dot(left + (n - from) * column_bytes, columns, depth, entry, n * x_.columns + block * block_, count,
            sums + entry * sum_bytes);
      }
    }
  }

  // Rows [begin, end) of the product, as far as they are in the block.
  void multiply_tiles(
      int64_t first, int64_t rows, int64_t block, int64_t begin, int64_t end, const int64_t* starts,
      const char* columns, float* sums) const {
    const int64_t column_bytes = stride_ * kernel_.element_bytes, origin = block * block_;
    const Scratch memory(kGradOutColumns * column_bytes);
    char* left = static_cast<char*>(memory.get());
    for (int64_t from = begin, to; from < end; from = to) {
      to = std::min(end, from + kGradOutColumns);
      if (starts[from * blocks_] == starts[to * blocks_]) continue;
      kernel_.transpose(grad_out_, first, rows, from, to, left, stride_);
      for (int64_t n = from; n < to; n += kTileRows) {
        const TileRows<Index> tile_rows = {
            .left = left + (n - from) * column_bytes,
            .stride = stride_,
            .depth = round_up(rows, kernel_.lanes),
            .rows = std::min(kTileRows, to - n),
            .tiles = columns,
            .columns = std::min(block_, x_.columns - origin),
            .indices = indices_,
            .base = n * x_.columns + origin,
            .base_step = x_.columns,
            .starts = starts + n * blocks_ + block,
            .starts_step = blocks_,
            .sums = sums};
        if constexpr (sizeof(Index) == sizeof(int32_t)) {
          tiles_->multiply_int32(tile_rows);
        } else {
          tiles_->multiply_int64(tile_rows);
        }
      }
    }
  }

  void dot(const char* left, const char* columns, int64_t depth, int64_t entry, int64_t base, int64_t count, char* sums)
      const {
    if constexpr (sizeof(Index) == sizeof(int32_t)) {
      kernel_.dot_int32(left, columns, stride_, depth, indices_ + entry, base, count, sums);
    } else {
      kernel_.dot_int64(left, columns, stride_, depth, indices_ + entry, base, count, sums);
    }
  }

  const SampledKernel& kernel_;
  const SampledTiles* tiles_;  // null: a dot product per entry
  const Matrix grad_out_, x_;
  const Index* indices_;
  int64_t entries_;
  int64_t depth_, stride_;  // of a transposed column: rows of a chunk, and elements to the next column
  int64_t block_, blocks_;  // columns of x
};

template <typename Target, typename acc>
void cast_into(void* out, const void* sums, int64_t count) {
  parallel_units(count, 64, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      static_cast<Target*>(out)[i] = static_cast<Target>(static_cast<const acc*>(sums)[i]);
    }
  });
}

template <typename acc>
void cast_from(const Tensor& out, const void* sums) {
  switch (out.scalar_type()) {
    case ScalarType::BFloat16:
      return cast_into<c10::BFloat16, acc>(out.data_ptr(), sums, out.size(0));
    case ScalarType::Half:
      return cast_into<c10::Half, acc>(out.data_ptr(), sums, out.size(0));
    case ScalarType::Double:
      return cast_into<double, acc>(out.data_ptr(), sums, out.size(0));
    default:
      return cast_into<float, acc>(out.data_ptr(), sums, out.size(0));
  }
}

Tensor sampled_product(Tensor grad_out, Tensor x, Tensor indices, ScalarType dtype) {
  constexpr const char* op = "sampled_product";
  const DType activations = activation_dtype(op, "grad_out", grad_out);
  check_sampled(op, grad_out, x, indices);
  check_grad_dtype(op, dtype, true);
  const int64_t entries = indices.size(0), sum_bytes = accumulation_bytes(activations);
  Tensor out = new_tensor(x, {entries}, dtype);
  if (entries == 0) return out;
  const bool in_place = dtype == accumulation_type(activations);
  const Scratch memory(in_place ? 0 : entries * sum_bytes);
  char* sums = static_cast<char*>(in_place ? out.data_ptr() : memory.get());
  std::fill_n(sums, entries * sum_bytes, char{0});
  const Tensor dy = with_unit_columns(grad_out), rows = with_unit_columns(x);
  const SampledKernel& kernel = sampled_kernel_for(activations);
  const SampledTiles* tiles = tiles_for(activations, entries, dy.size(1) * rows.size(1));
  if (indices.scalar_type() == ScalarType::Int) {
    SampledProduct(
        kernel, tiles, matrix_of(dy), matrix_of(rows), static_cast<const int32_t*>(indices.data_ptr()), entries)
        .run(sums, sum_bytes);
  } else {
    SampledProduct(
        kernel, tiles, matrix_of(dy), matrix_of(rows), static_cast<const int64_t*>(indices.data_ptr()), entries)
        .run(sums, sum_bytes);
  }
  if (in_place) return out;
  if (activations == DType::f64) {
    cast_from<double>(out, sums);
  } else {
    cast_from<float>(out, sums);
  }
  return out;
}

}  // namespace

const SampledKernel& sampled_kernel_for(DType dtype) {
  static const SampledKernels& table = choose_kernels();
  return table.products[static_cast<int>(dtype)];
}

const SampledTiles* sampled_tiles_for(DType dtype) {
#if defined(__x86_64__)
  // Tiles take their left operands as the bfloat16 kernel transposes them.
  const bool usable = dtype == DType::bf16 && sampled_kernel_for(dtype).element_bytes == 2;
  if (usable && std::string_view(kernels().capability) == "amx") return &sampled_tiles_bf16;
#endif
  return nullptr;
}

}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("sampled_product", TORCH_BOX(&peft_kernels::sampled_product));
}
