// The instruction set that the kernels of a family are taken from; each family has a table of kernels for some of them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace peft_kernels {

enum class Capability { baseline, avx2, avx512, amx };

// The best that this processor has; PEFT_KERNELS_CPU_CAPABILITY=baseline|avx2|avx512|amx lowers the choice. `amx` says
// that there is AVX-512 and that tiles are wanted; amx_bf16_usable() says whether this process may use them.
inline Capability allowed_capability() {
  const char* wish = std::getenv("PEFT_KERNELS_CPU_CAPABILITY");
  const std::string_view limit = wish == nullptr ? "amx" : wish;
  STD_TORCH_CHECK(
      limit == "baseline" || limit == "avx2" || limit == "avx512" || limit == "amx",
      "PEFT_KERNELS_CPU_CAPABILITY must be baseline, avx2, avx512 or amx, got ", wish == nullptr ? "" : wish);
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && limit == "amx") return Capability::amx;
  if (avx512 && limit == "avx512") return Capability::avx512;
  if (avx2 && limit != "baseline") return Capability::avx2;
#endif
  return Capability::baseline;
}

}  // namespace peft_kernels
