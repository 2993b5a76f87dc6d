// Ranges handed to torch's threads, and memory to work in.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "rounding.h"

namespace peft_kernels {

// Multiply-adds below which a second thread costs more than it brings.
constexpr int64_t kGrain = 1 << 17;

// body(begin, end) over [0, size) in multiples of `unit`, whatever the number of threads.
template <typename F>
void parallel_units(int64_t size, int64_t unit, int64_t work_per_item, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, unit * work_per_item));
  torch::stable::parallel_for(0, divide_up(size, unit), grain, [&](int64_t begin, int64_t end) {
    body(begin * unit, std::min(size, end * unit));
  });
}

// Uninitialised, cache-line aligned memory that ends with its scope.
//
// It comes from a stack that each thread keeps from call to call: what the allocator would hand out instead is fresh
// pages time and again, and clearing those costs as much as the work that is done in them. The stack grows to what a
// thread has needed at once, up to kKept bytes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_(round_up(std::max<int64_t>(bytes, 1), 64)) {
    Stack& stack = stack_of_thread();
    if (stack.live == 0 && stack.capacity < std::min(stack.wanted, kKept)) stack.grow();
    on_stack_ = stack.used + bytes_ <= stack.capacity;
    data_ = on_stack_ ? stack.data + stack.used : static_cast<char*>(std::aligned_alloc(64, bytes_));
    STD_TORCH_CHECK(data_ != nullptr, "peft_kernels: out of memory for ", bytes, " bytes of scratch");
    if (on_stack_) stack.used += bytes_;
    stack.live += bytes_;
    stack.wanted = std::max(stack.wanted, stack.live);
  }
  ~Scratch() {
    Stack& stack = stack_of_thread();
    stack.live -= bytes_;
    if (on_stack_) {
      stack.used -= bytes_;
    } else {
      std::free(data_);
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  static constexpr int64_t kKept = int64_t{64} << 20;

  struct Stack {
    char* data = nullptr;
    int64_t capacity = 0;
    int64_t used = 0;    // from the bottom
    int64_t live = 0;    // bytes of all that lives, on the stack or not
    int64_t wanted = 0;  // the most that ever lived at once

    void grow() {
      std::free(data);
      const int64_t bytes = std::min(wanted, kKept);
      data = static_cast<char*>(std::aligned_alloc(64, bytes));
      capacity = data == nullptr ? 0 : bytes;
    }
    ~Stack() { std::free(data); }
  };

  static Stack& stack_of_thread() {
    thread_local Stack stack;
    return stack;
  }

  int64_t bytes_;
  bool on_stack_;
  char* data_;
};

}  // namespace peft_kernels
