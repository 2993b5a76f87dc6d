// The entries of grad_out^T x [N, K] that reach a threshold, on the CPU: grad_out [M, N], x [M, K].
//
// The product is formed a tile of 32 rows by a block of columns at a time, in the second cache, and scanned there; of
// the rest nothing is written. A block of columns of x is packed once, for all threads; columns of grad_out are packed
// for each block again. FLOP: 2 M N K. Bytes: x once, grad_out once per block, 8 per entry that is found, twice. On
// matrix tiles for bfloat16, else in float (double for double) with the vectors of selection_kernels.h.
//
// What is found in a tile goes wherever there is room next, and is put in order at the end. Blocks follow from the
// shape and a sum from its two columns alone, so that the bits are the same for any number of threads.
#include "../common/sparse_checks.h"
#include "capability.h"
#include "lora_checks.h"
#include "lora_products.h"
#include "parallel.h"
#include "sampled_kernels.h"
#include "selection_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

namespace peft_kernels {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 20;  // of packed columns of x: half of a common second cache
constexpr int64_t kFewestColumns = 192;            // in a block, lest packing grad_out take longer than multiplying

Matrix matrix_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.size(0), tensor.size(1), tensor.stride(0)}; }

// Tiles of the product [kTileRows, columns] from packed operands, by the kernels for their dtype.
class Tiles {
 public:
  Tiles(const Matrix& grad_out, const Matrix& x, DType dtype)
      : grad_out_(grad_out),
        x_(x),
        dense_(selection_kernels().products[static_cast<int>(dtype)]),
        sampled_(sampled_kernel_for(dtype)),
        tiles_(sampled_tiles_for(dtype)),
        bytes_(tiles_ == nullptr ? accumulation_bytes(dtype) : sampled_.element_bytes),
        depth_(tiles_ == nullptr ? x.rows : round_up(x.rows, sampled_.lanes)),
        stride_(depth_ + 64 / bytes_) {}

  // Columns of x are packed in multiples of this.
  int64_t unit() const { return tiles_ == nullptr ? dense_.right_width : kTileColumns; }
  int64_t left_bytes() const { return stride_ * kTileRows * bytes_; }
  int64_t right_bytes(int64_t columns) const { return std::max<int64_t>(1, depth_) * columns * bytes_; }

  // Columns [begin, end) of x; `begin` is a multiple of unit().
  void pack_right(int64_t begin, int64_t end, void* right) const {
    if (tiles_ == nullptr) {
      dense_.pack_right(x_, begin, end, right);
    } else {
      tiles_->lay_out(x_, 0, x_.rows, begin, end, right);
    }
  }

  // Columns [begin, end) of grad_out, at most kTileRows.
  void pack_left(int64_t begin, int64_t end, void* left) const {
    if (tiles_ == nullptr) {
      dense_.pack_left(grad_out_, begin, end, left);
    } else {
      sampled_.transpose(grad_out_, 0, grad_out_.rows, begin, end, left, stride_);
    }
  }

  // `columns` is a multiple of unit(). Rows that were not packed hold anything.
  void multiply(const void* left, int64_t rows, const void* right, int64_t columns, void* product) const {
    if (tiles_ == nullptr) {
      dense_.multiply(left, round_up(rows, dense_.left_width), right, columns, depth_, product, columns, false);
    } else {
      tiles_->multiply_all(left, stride_, depth_, right, columns, static_cast<float*>(product), columns);
    }
  }

 private:
  const Matrix grad_out_, x_;
  const SelectionProduct& dense_;
  const SampledKernel& sampled_;
  const SampledTiles* tiles_;  // null: vectors
  int64_t bytes_;              // of a packed number
  int64_t depth_, stride_;     // of a packed column
};

inline int64_t above(const float* values, int64_t count, float threshold, uint32_t* places, float* kept) {
  return selection_kernels().above_f32(values, count, threshold, places, kept);
}
inline int64_t above(const double* values, int64_t count, double threshold, uint32_t* places, double* kept) {
  return selection_kernels().above_f64(values, count, threshold, places, kept);
}

// The smallest number of the type that is not below the threshold.
template <typename acc>
acc rounded_up(double threshold) {
  const acc rounded = static_cast<acc>(threshold);
  const acc infinity = std::numeric_limits<acc>::infinity();
  return static_cast<double>(rounded) < threshold ? std::nextafter(rounded, infinity) : rounded;
}

// What was found, in the order of its finding, with where each row and block has its own.
template <typename acc>
class Found {
 public:
  Found(int64_t rows, int64_t blocks, int64_t capacity)
      : blocks_(blocks),
        capacity_(capacity),
        segments_memory_(rows * blocks * 2 * sizeof(int64_t)),
        places_memory_(capacity * sizeof(uint32_t)),
        values_memory_(capacity * sizeof(acc)) {}

  // `counts` entries of rows [begin, end) in one block, one row after the other.
  void add(
      int64_t begin, int64_t end, int64_t block, const int64_t* counts, const uint32_t* places, const acc* values) {
    int64_t total = 0;
    for (int64_t n = begin; n < end; ++n) total += counts[n - begin];
    int64_t start = cursor_.fetch_add(total, std::memory_order_relaxed);
    if (start + total <= capacity_) {
      std::memcpy(this->places() + start, places, total * sizeof(uint32_t));
      std::memcpy(this->values() + start, values, total * sizeof(acc));
    }
    for (int64_t n = begin; n < end; ++n) {
      segment(n, block)[0] = start;
      segment(n, block)[1] = counts[n - begin];
      start += counts[n - begin];
    }
  }

  int64_t count() const { return cursor_.load(std::memory_order_relaxed); }

  // In order of position, if all had room.
  void put_in_order(int64_t rows, int64_t columns, int64_t block_columns, int64_t* positions, acc* values) const {
    const Scratch memory(rows * sizeof(int64_t));
    int64_t* starts = static_cast<int64_t*>(memory.get());
    int64_t total = 0;
    for (int64_t n = 0; n < rows; ++n) {
      starts[n] = total;
      for (int64_t block = 0; block < blocks_; ++block) total += segment(n, block)[1];
    }
    const int64_t work = 8 * (blocks_ + total / rows);
    parallel_units(rows, 1, work, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin, to = starts[begin]; n < end; ++n) {
        for (int64_t block = 0; block < blocks_; ++block) {
          const int64_t from = segment(n, block)[0], base = n * columns + block * block_columns;
          for (int64_t i = from; i < from + segment(n, block)[1]; ++i, ++to) {
            positions[to] = base + this->places()[i];
            values[to] = this->values()[i];
          }
        }
      }
    });
  }

 private:
  int64_t* segment(int64_t row, int64_t block) const {
    return static_cast<int64_t*>(segments_memory_.get()) + 2 * (row * blocks_ + block);
  }
  uint32_t* places() const { return static_cast<uint32_t*>(places_memory_.get()); }
  acc* values() const { return static_cast<acc*>(values_memory_.get()); }

  int64_t blocks_, capacity_;
  std::atomic<int64_t> cursor_{0};
  const Scratch segments_memory_, places_memory_, values_memory_;
};

// Returns how many entries there are.
template <typename acc>
int64_t find(
    const Matrix& grad_out, const Matrix& x, DType dtype, acc threshold, int64_t capacity, int64_t* positions,
    acc* values) {
  const Tiles tiles(grad_out, x, dtype);
  const int64_t fitting = std::max(kFewestColumns, kBlockBytes / tiles.right_bytes(1));
  const int64_t block_columns = std::min(round_up(x.columns, tiles.unit()), round_up(fitting, tiles.unit()));
  const int64_t blocks = divide_up(x.columns, block_columns);
  Found<acc> found(grad_out.columns, blocks, std::min(capacity, grad_out.columns * x.columns));
  const Scratch right_memory(tiles.right_bytes(block_columns));
  char* right = static_cast<char*>(right_memory.get());
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * block_columns, columns = std::min(block_columns, x.columns - first);
    parallel_units(columns, tiles.unit(), x.rows, [&](int64_t begin, int64_t end) {
      tiles.pack_right(first + begin, first + end, right + tiles.right_bytes(begin));
    });
    const int64_t padded = round_up(columns, tiles.unit());
    parallel_units(grad_out.columns, kTileRows, x.rows * padded / 16 + padded, [&](int64_t begin, int64_t end) {
      const Scratch left(tiles.left_bytes()), product_memory(kTileRows * padded * sizeof(acc));
      const Scratch places_memory(kTileRows * columns * sizeof(uint32_t));
      const Scratch kept_memory(kTileRows * columns * sizeof(acc));
      const acc* product = static_cast<const acc*>(product_memory.get());
      uint32_t* places = static_cast<uint32_t*>(places_memory.get());
      acc* kept = static_cast<acc*>(kept_memory.get());
      for (int64_t n = begin; n < end; n += kTileRows) {
        const int64_t rows = std::min(kTileRows, end - n);
        tiles.pack_left(n, n + rows, left.get());
        tiles.multiply(left.get(), rows, right, padded, product_memory.get());
        int64_t counts[kTileRows], total = 0;
        for (int64_t i = 0; i < rows; ++i) {
          counts[i] = above(product + i * padded, columns, threshold, places + total, kept + total);
          total += counts[i];
        }
        found.add(n, n + rows, block, counts, places, kept);
      }
    });
  }
  if (found.count() <= capacity) {
    found.put_in_order(grad_out.columns, x.columns, block_columns, positions, values);
  }
  return found.count();
}

template <typename acc>
std::tuple<Tensor, Tensor, Tensor> product_above_in(
    const Tensor& grad_out, const Tensor& x, DType dtype, double threshold, int64_t capacity) {
  Tensor positions = new_tensor(x, {capacity}, ScalarType::Long);
  Tensor values = new_tensor(x, {capacity}, accumulation_type(dtype));
  Tensor count = new_tensor(x, {1}, ScalarType::Long);
  int64_t* to = static_cast<int64_t*>(positions.data_ptr());
  acc* numbers = static_cast<acc*>(values.data_ptr());
  int64_t many = 0;
  if (grad_out.size(1) > 0 && x.size(1) > 0) {
    const Tensor dy = with_unit_columns(grad_out), rows = with_unit_columns(x);
    many = find<acc>(matrix_of(dy), matrix_of(rows), dtype, rounded_up<acc>(threshold), capacity, to, numbers);
  }
  // The rest is no entry's, and the same from run to run.
  const int64_t filled = many <= capacity ? many : 0;
  std::fill(to + filled, to + capacity, int64_t{-1});
  std::fill(numbers + filled, numbers + capacity, acc(0));
  *static_cast<int64_t*>(count.data_ptr()) = many;
  return {positions, values, count};
}

std::tuple<Tensor, Tensor, Tensor> product_above(Tensor grad_out, Tensor x, double threshold, int64_t capacity) {
  constexpr const char* op = "product_above";
  check_product_above(op, grad_out, x, threshold, capacity, true);
  const DType dtype = dtype_of(grad_out.scalar_type());
  return dtype == DType::f64 ? product_above_in<double>(grad_out, x, dtype, threshold, capacity)
                             : product_above_in<float>(grad_out, x, dtype, threshold, capacity);
}

const SelectionKernels& choose_selection_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return selection_kernels_avx512;
  if (capability == Capability::avx2) return selection_kernels_avx2;
#endif
  return selection_kernels_baseline;
}

}  // namespace

const SelectionKernels& selection_kernels() {
  static const SelectionKernels& table = choose_selection_kernels();
  return table;
}

}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("product_above", TORCH_BOX(&peft_kernels::product_above)); }
