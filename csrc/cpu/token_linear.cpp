// residual + scatter(x[rows] weight^T + bias) on the CPU: the product is the library's, on either side of it rows are
// moved by our kernels.
#include "../common/library_gemm.h"
#include "../common/token_checks.h"
#include "lora_checks.h"
#include "token_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

namespace peft_kernels {
namespace {

// Rows per product. So few that they stay in the second-level cache on their way would be a loss: the library lays the
// weight out anew for each product, which 128 to 512 rows do not repay at any width from 576 to 4096. From about 1024
// on the time is that of one product, and what is in memory at once does not grow with the rows.
constexpr int64_t kChunk = 2048;

class Product {
 public:
  Product(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gather, bool transposed)
      : x_(x), weight_(weight), bias_(bias), gather_(gather), transposed_(transposed) {}

  // x[rows[begin:end]] weight^T + bias.
  Tensor operator()(const RowList& rows, int64_t begin, int64_t end) const {
    if (!gather_) {
      Tensor inputs = x_;
      if (end - begin < rows.count()) inputs = torch::stable::narrow(inputs, 0, begin, end - begin);
      return library_matmul(inputs, weight_, bias_, !transposed_);
    }
    const Tensor inputs = new_tensor(x_, {end - begin, x_.size(1)}, x_.scalar_type());
    gather_into(MatrixRows(x_), rows, begin, end, MatrixRows(inputs));
    return library_matmul(inputs, weight_, bias_, !transposed_);
  }

 private:
  Tensor x_, weight_;
  std::optional<Tensor> bias_;
  bool gather_, transposed_;
};

// body(begin, end, last) for the chunks of a sorted list that have a row in them, which the last of is at `last`.
template <typename F>
void each_chunk(const RowList& list, const F& body) {
  for (int64_t begin = 0; begin < list.count(); begin += kChunk) {
    const int64_t end = std::min(list.count(), begin + kChunk);
    int64_t last = end - 1;
    while (last >= begin && list[last] < 0) --last;
    if (last >= begin) body(begin, end, last);
  }
}

Tensor gather_linear_scatter(
    Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor rows, std::optional<Tensor> residual, bool gather,
    bool transposed) {
  constexpr const char* op = "gather_linear_scatter";
  const int64_t count = check_gather_linear_scatter(op, x, weight, bias, rows, residual, gather, transposed, true);
  const int64_t columns = weight.size(transposed ? 1 : 0);
  const DType dtype = dtype_of(x.scalar_type());
  if (!residual.has_value()) {
    const RowList list(op, rows, gather ? x.size(0) : INT32_MAX);
    const Tensor y = Product(x, weight, bias, gather, transposed)(list, 0, count);
    const MatrixRows results(y);
    for (int64_t s = 0; s < count; ++s) {
      if (list[s] < 0) std::memset(results[s], 0, results.bytes());
    }
    return y;
  }
  const int64_t total = residual->size(0);
  const RowList list = RowList::sorted(op, rows, total);
  const RowPlaces places(list, total);
  const Tensor out = new_tensor(x, {total, columns}, x.scalar_type());
  const MatrixRows from(*residual), to(out);
  const Product product(x, weight, bias, gather, transposed);
  int64_t written = 0;
  each_chunk(list, [&](int64_t begin, int64_t end, int64_t last) {
    const Tensor y = product(list, begin, end);
    const int64_t until = list[last] + 1;
    scatter_add_into(from, MatrixRows(y), places, begin, written, until, to, columns, dtype);
    written = until;
  });
  if (written < total) {
    parallel_units(total - written, 1, kWorkPerMove * to.bytes(), [&](int64_t first, int64_t end) {
      for (int64_t row = written + first; row < written + end; ++row) std::memcpy(to[row], from[row], to.bytes());
    });
  }
  return out;
}

void gather_linear_scatter_(
    Tensor out, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor rows, bool gather, bool transposed) {
  constexpr const char* op = "gather_linear_scatter_";
  check_gather_linear_scatter_(op, out, x, weight, bias, rows, gather, transposed, true);
  const RowList list = RowList::sorted(op, rows, out.size(0));
  const Product product(x, weight, bias, gather, transposed);
  each_chunk(list, [&](int64_t begin, int64_t end, int64_t) {
    add_at(out, list, begin, end, MatrixRows(product(list, begin, end)));
  });
}

}  // namespace
}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("gather_linear_scatter", TORCH_BOX(&peft_kernels::gather_linear_scatter));
  m.impl("gather_linear_scatter_", TORCH_BOX(&peft_kernels::gather_linear_scatter_));
}
