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

// Exponents come in units in which they need no further multiplication: of log 2 for floats, whose
// exponentials are powers of 2.
template <typename Scalar>
struct Exponent;
template <>
struct Exponent<float> {
  static constexpr double kPerNatural = 1.4426950408889634;  // log2 e
};
template <>
struct Exponent<double> {
  static constexpr double kPerNatural = 1;
};

}  // namespace dnkd
