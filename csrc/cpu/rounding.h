// Integers: the smaller and the larger of two, division and rounding up of numbers that are not negative.
#pragma once

#include <cstdint>

namespace peft_kernels {

static constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }
static constexpr int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

}  // namespace peft_kernels
