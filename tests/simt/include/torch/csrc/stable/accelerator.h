// The CPU needs no device guard.
#pragma once

#include <cstdint>

namespace torch::stable::accelerator {

using DeviceIndex = int32_t;

class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceIndex) {}
  void set_index(DeviceIndex) {}
};

}  // namespace torch::stable::accelerator
