// Test-only conversions of IEEE half, one bit at a time rather than fast.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 31;
  const int mantissa = value.bits & 1023;
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return mantissa ? NAN : sign * INFINITY;
  }
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}

inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (std::isnan(value)) {
    return {static_cast<uint16_t>(sign | 0x7e00)};
  }
  if (magnitude >= 65520.0) {
    return {static_cast<uint16_t>(sign | 0x7c00)};
  }
  int exponent = -14;
  if (magnitude >= std::ldexp(1.0, -14)) {
    std::frexp(magnitude, &exponent);
    --exponent;
  }
  // In units of the last place; nearbyint rounds to nearest even. A carry moves on by itself.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + units))};
}

struct __half2 {
  __half x;
  __half y;
};

inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
inline __half2 __floats2half2_rn(float low, float high) {
  return {__float2half_rn(low), __float2half_rn(high)};
}
inline __half2 __hmax2(__half2 a, __half2 b) {
  return __floats2half2_rn(std::fmax(__low2float(a), __low2float(b)),
                           std::fmax(__high2float(a), __high2float(b)));
}
