// Element types as the torch-free kernels name them.
#pragma once

#include <cstdint>

namespace dnkd {

enum class Dtype : int { kFloat16, kBFloat16, kFloat32, kFloat64 };

enum class Reduction : int { kNone, kMean, kSum };

// 16-bit floats as stored; the kernels widen them to float to compute.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace dnkd
