// A launch: its blocks one after another, in an order that the seed decides.
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "operands.h"
#include "report.h"

namespace simt {

namespace {

uint64_t seed = [] {
  const char* text = std::getenv("PK_SIMT_SEED");
  return text == nullptr ? uint64_t{0} : static_cast<uint64_t>(std::strtoull(text, nullptr, 0));
}();

std::mutex one_at_a_time;

void check_configuration(const Launch& launch) {
  constexpr int64_t kMostAlongX = (int64_t{1} << 31) - 1, kMostAlongYZ = 65535;
  constexpr size_t kMostSharedBytes = 227 * 1024;
  const bool valid = launch.grid_x >= 1 && launch.grid_y >= 1 && launch.grid_z >= 1 && launch.grid_x <= kMostAlongX &&
                     launch.grid_y <= kMostAlongYZ && launch.grid_z <= kMostAlongYZ && launch.threads >= 1 &&
                     launch.threads <= kMaxThreads && launch.dynamic_shared_bytes <= kMostSharedBytes;
  if (valid) return;
  throw std::runtime_error(
      std::string(launch.operation) + ": invalid launch configuration, grid " + std::to_string(launch.grid_x) + " x " +
      std::to_string(launch.grid_y) + " x " + std::to_string(launch.grid_z) + " of " + std::to_string(launch.threads) +
      " threads, " + std::to_string(launch.dynamic_shared_bytes) + " bytes of dynamic shared memory");
}

// All blocks, shuffled.
std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> order(count);
  for (uint64_t i = 0; i < count; ++i) order[i] = i;
  for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[machine.random() % i]);
  return order;
}

}  // namespace

void run(const Launch& launch) {
  check_configuration(launch);
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  machine.launch = &launch;
  machine.seed = seed;
  machine.random.seed(seed);
  machine.grid = {
      static_cast<unsigned>(launch.grid_x), static_cast<unsigned>(launch.grid_y), static_cast<unsigned>(launch.grid_z)};
  set_kernel_library(launch.kernel);
  begin_launch_memory();
  const auto blocks = static_cast<uint64_t>(launch.grid_x) * launch.grid_y * launch.grid_z;
  for (const uint64_t number : block_order(blocks)) {
    begin_block_memory();
    const uint64_t x = number % launch.grid_x, rest = number / launch.grid_x;
    run_block(
        {static_cast<unsigned>(x), static_cast<unsigned>(rest % launch.grid_y),
         static_cast<unsigned>(rest / launch.grid_y)});
    if (violated()) break;
  }
  watch_nothing();
  if (violated()) throw std::runtime_error(take_report());
}

}  // namespace simt

extern "C" void simt_set_seed(uint64_t value) { simt::seed = value; }
