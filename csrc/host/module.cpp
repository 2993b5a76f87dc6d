// peft_kernels._host: what Python asks of the build and the machine, and what the tests need of the headers that CPU
// and CUDA code share. Links neither libtorch nor CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../common/philox.h"
#include "lora_on_host.h"

#if !defined(PK_BUILD_INFO)
#error "PK_BUILD_INFO must be a string that names the compilers and CUDA architectures of this build"
#endif

namespace py = pybind11;

namespace peft_kernels {
namespace {

#if defined(__x86_64__)
// Whether the processor has AMX tiles with bfloat16 and the system saves their state (bits 17 and 18 of XCR0).
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(1, 0, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;
  if ((low & kTileState) != kTileState || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  return (d & kAmxBf16) && (d & kAmxTile);
}
#endif

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return {
      {"avx2", __builtin_cpu_supports("avx2") != 0},
      {"avx512f", __builtin_cpu_supports("avx512f") != 0},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16") != 0},
      {"amx_bf16", has_amx_bf16()},
  };
#else
  return {{"avx2", false}, {"avx512f", false}, {"avx512_bf16", false}, {"amx_bf16", false}};
#endif
}

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

uint32_t checked_threshold(double dropout_p) {
  check(
      dropout_p >= 0.0 && dropout_p <= 1.0,  // NaN fails
      "dropout_p must be a probability in [0, 1], got " + std::to_string(dropout_p));
  return dropout_threshold(dropout_p);
}

std::vector<uint32_t> philox_draws(int64_t seed, int64_t offset, uint32_t row, int64_t columns) {
  check(columns >= 0, "columns must not be negative, got " + std::to_string(columns));
  std::vector<uint32_t> draws;
  draws.reserve(columns);
  uint32_t words[4] = {};
  for (int64_t c = 0; c < columns; ++c) {
    const int lane = static_cast<int>(c % kPhiloxGroup);
    if (lane == 0) philox_4x32_10({seed, offset}, static_cast<uint32_t>(c / kPhiloxGroup), row, words);
    draws.push_back(philox_draw(words, lane));
  }
  return draws;
}

py::bytes cuda_dropout_mask(int64_t rows, int64_t columns, double dropout_p, int64_t seed, int64_t offset) {
  check(rows >= 0 && columns >= 0, "rows and columns must not be negative");
  checked_threshold(dropout_p);
  const std::vector<uint8_t> keep = dropout_mask_on_host(rows, columns, dropout_p, {seed, offset});
  return py::bytes(reinterpret_cast<const char*>(keep.data()), keep.size());
}

// "float32" of torch.float32
std::string dtype_of(const py::object& tensor) {
  const std::string name = py::str(tensor.attr("dtype"));
  return name.substr(name.rfind('.') + 1);
}

// A 2-D CPU torch.Tensor, read through its Python attributes, so that libtorch stays out of this module.
MatrixView view(const char* name, const py::object& tensor) {
  const std::string device = py::str(tensor.attr("device"));
  check(device == "cpu", std::string(name) + " must be on cpu, got " + device);
  const auto shape = tensor.attr("shape").cast<std::vector<int64_t>>();
  check(shape.size() == 2, std::string(name) + " must be 2-D, got " + std::to_string(shape.size()) + " dimensions");
  const auto strides = tensor.attr("stride")().cast<std::vector<int64_t>>();
  void* data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  return {data, shape[0], shape[1], strides[0], strides[1], tensor.attr("element_size")().cast<int64_t>()};
}

// Calls `function` with a value of the C++ type of a dtype name.
template <typename Function>
void with_type(const std::string& dtype, const Function& function) {
  if (dtype == "float32") return function(float());
  if (dtype == "bfloat16") return function(torch::headeronly::BFloat16());
  if (dtype == "float16") return function(torch::headeronly::Half());
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + dtype);
}

void cuda_lora_accumulate(
    const py::object& out, const py::object& hidden, const py::object& factor, double scaling, double dropout_p,
    std::optional<std::pair<int64_t, int64_t>> rng_state) {
  const MatrixView out_view = view("out", out);
  const MatrixView hidden_view = view("hidden", hidden);
  const MatrixView factor_view = view("factor", factor);
  checked_threshold(dropout_p);
  check(elements_are_apart(out_view), "out must not overlap itself in memory");
  check(dtype_of(hidden) == "float32", "hidden must be float32, got " + dtype_of(hidden));
  check(
      hidden_view.rows == out_view.rows && factor_view.rows == hidden_view.columns &&
          factor_view.columns == out_view.columns,
      "shapes must be out [M, C], hidden [M, r], factor [r, C]");
  int64_t state[2] = {};
  if (rng_state.has_value()) state[0] = rng_state->first, state[1] = rng_state->second;
  const AccumulateArguments arguments = accumulate_arguments(
      out_view, hidden_view, factor_view, scaling, dropout_p, rng_state.has_value() ? state : nullptr);
  with_type(dtype_of(out), [&](auto out_value) {
    with_type(dtype_of(factor), [&](auto factor_value) {
      accumulate_on_host<decltype(out_value), decltype(factor_value)>(arguments);
    });
  });
}

std::vector<int> cuda_factor_slots() {
  std::vector<int> slots(kTileColumns);
  for (int column = 0; column < kTileColumns; ++column) slots[column] = factor_slot(column);
  return slots;
}

}  // namespace
}  // namespace peft_kernels

PYBIND11_MODULE(_host, m) {
  using namespace peft_kernels;
  m.doc() = "Build information, CPU features, and the code that CPU and CUDA kernels share, for tests.";
  m.attr("build_info") = PK_BUILD_INFO;
  m.def("cpu_features", &cpu_features, "Instruction sets of this machine, name to whether it has them.");
  m.def("dropout_threshold", &checked_threshold, py::arg("dropout_p"), "dropout_p in units of 2**-16, rounded.");
  m.def(
      "philox_draws", &philox_draws, py::arg("seed"), py::arg("offset"), py::arg("row"), py::arg("columns"),
      "The first `columns` 16-bit numbers of a row's Philox stream.");
  m.def(
      "cuda_dropout_mask", &cuda_dropout_mask, py::arg("rows"), py::arg("columns"), py::arg("dropout_p"),
      py::arg("seed"), py::arg("offset"),
      "The CUDA kernel's keep mask, computed on the CPU; one byte per element, row by row.");
  m.def(
      "cuda_lora_accumulate_", &cuda_lora_accumulate, py::arg("out"), py::arg("hidden"), py::arg("factor"),
      py::arg("scaling"), py::arg("dropout_p"), py::arg("rng_state"),
      "The CUDA kernel of lora_accumulate_, computed on CPU tensors in place; rng_state is (seed, offset) or None.");
  m.def(
      "cuda_factor_slots", &cuda_factor_slots,
      "Where that kernel keeps each column of its factor tile in a row of shared memory, in floats.");
}
