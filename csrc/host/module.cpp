// peft_kernels._host: what Python asks of the build and the machine, and what the tests need of the headers that CPU
// and CUDA code share. Links neither libtorch nor CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "../common/philox.h"

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
}
