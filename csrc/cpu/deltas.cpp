// The delta algebra on the CPU: argument checks first, then the kernels of delta_kernels.h in threads; registration.
// Here entries are packed, and deltas summed; masks are in delta_magnitudes.cpp and delta_random_mask.cpp, the merge by
// competition in delta_competition.cpp.
#include "capability.h"
#include "delta_merge.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace peft_kernels {
namespace {

const DeltaKernels& choose_delta_kernels() {
#if defined(__x86_64__)
  const Capability capability = allowed_capability();
  if (capability >= Capability::avx512) return delta_kernels_avx512;
  if (capability == Capability::avx2) return delta_kernels_avx2;
#endif
  return delta_kernels_baseline;
}

// --- packing ---

template <typename Element>
void pick(const void* from, const int32_t* offsets, int64_t count, void* to) {
  const Element* source = static_cast<const Element*>(from);
  Element* target = static_cast<Element*>(to);
  for (int64_t i = 0; i < count; ++i) target[i] = source[offsets[i]];
}

void pick_elements(const void* from, const int32_t* offsets, int64_t count, int64_t bytes, void* to) {
  switch (bytes) {
    case 2:
      return pick<uint16_t>(from, offsets, count, to);
    case 4:
      return pick<uint32_t>(from, offsets, count, to);
    default:
      return pick<uint64_t>(from, offsets, count, to);
  }
}

Pair compact(Tensor indices, Tensor values, Tensor mask, double factor) {
  constexpr const char* op = "delta_compact";
  const bool dense = check_delta(op, indices, values);
  check_mask(op, mask, values);
  const bool* kept = static_cast<const bool*>(mask.const_data_ptr());
  const int64_t count = values.numel(), parts = divide_up(count, kSplit);
  std::vector<int64_t> starts(parts + 1);
  parallel_parts(count, [&](int64_t part, int64_t begin, int64_t end) {
    int64_t n = 0;
    for (int64_t i = begin; i < end; ++i) n += kept[i];
    starts[part + 1] = n;
  });
  for (int64_t part = 0; part < parts; ++part) starts[part + 1] += starts[part];
  const ScalarType index_dtype = dense ? index_type(count) : indices.scalar_type();
  Tensor packed_indices = new_tensor(values, {starts[parts]}, index_dtype);
  Tensor packed_values = new_tensor(values, {starts[parts]}, values.scalar_type());
  const bool wide = values.scalar_type() == ScalarType::Double;
  const Values from(values, wide);
  const int64_t index_bytes = index_dtype == ScalarType::Long ? 8 : 4;
  const char* positions = dense ? nullptr : static_cast<const char*>(indices.const_data_ptr());
  char* to_indices = static_cast<char*>(packed_indices.mutable_data_ptr());
  char* to_values = static_cast<char*>(packed_values.mutable_data_ptr());
  const DeltaKernels& kernels = delta_kernels();
  const auto narrow = kernels.narrow[static_cast<int>(dtype_of(values.scalar_type()))][wide];
  parallel_parts(count, [&](int64_t part, int64_t begin, int64_t end) {
    alignas(64) double run[kRun];
    int32_t offsets[kOffsets];
    int64_t n = starts[part];
    each_run(begin, end, [&](int64_t first, int64_t last) {
      const int64_t size = last - first;
      char *index_target = to_indices + n * index_bytes, *value_target = to_values + n * from.bytes();
      const int64_t some = kernels.kept_offsets(kept + first, size, offsets);
      if (some == 0) return;
      pick_elements(from.at(first), offsets, some, from.bytes(), value_target);
      if (factor != 1.0) {
        kernels.widen[static_cast<int>(dtype_of(values.scalar_type()))][wide](value_target, run, some);
        kernels.in[wide].scale(run, some, factor);
        narrow(run, value_target, some);
      }
      if (positions != nullptr) {
        pick_elements(positions + first * index_bytes, offsets, some, index_bytes, index_target);
      } else {
        place(first, offsets, some, index_bytes, index_target);
      }
      n += some;
    });
  });
  return {packed_indices, packed_values};
}

// --- sums ---

void check_weights(const char* op, const std::vector<double>& weights, const std::vector<Tensor>& values) {
  STD_TORCH_CHECK(
      weights.size() == values.size(), op, ": weights must be a list as long as values, ", values.size(), ", got ",
      weights.size());
}

Pair sum(
    std::vector<Tensor> indices, std::vector<Tensor> values, std::vector<double> weights, int64_t numel,
    ScalarType dtype) {
  constexpr const char* op = "delta_sum";
  check_deltas(op, indices, values, numel);
  check_weights(op, weights, values);
  check_result_dtype(op, dtype);
  const Deltas deltas(indices, values);
  const Arithmetic& in = delta_kernels().in[deltas.wide()];
  return merge_with(deltas, values[0], numel, dtype, [&](const char* columns, int64_t count, void* merged) {
    in.sum(columns, deltas.size(), weights.data(), count, merged);
  });
}

Pair ties(
    std::vector<Tensor> indices, std::vector<Tensor> values, std::vector<double> weights, int64_t numel,
    ScalarType dtype) {
  constexpr const char* op = "delta_ties";
  check_deltas(op, indices, values, numel);
  check_weights(op, weights, values);
  check_result_dtype(op, dtype);
  for (const double weight : weights) {
    STD_TORCH_CHECK(weight > 0.0, op, ": weights must be above 0, got ", weight);
  }
  const Deltas deltas(indices, values);
  const Arithmetic& in = delta_kernels().in[deltas.wide()];
  return merge_with(deltas, values[0], numel, dtype, [&](const char* columns, int64_t count, void* merged) {
    in.ties(columns, deltas.size(), weights.data(), count, merged);
  });
}

}  // namespace

const DeltaKernels& delta_kernels() {
  static const DeltaKernels& table = choose_delta_kernels();
  return table;
}

}  // namespace peft_kernels

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("delta_compact", TORCH_BOX(&peft_kernels::compact));
  m.impl("delta_sum", TORCH_BOX(&peft_kernels::sum));
  m.impl("delta_ties", TORCH_BOX(&peft_kernels::ties));
}
