// Compiles the file named by DNKD_ROWS_FILE once per instruction set, each time in a namespace of
// its own (dnkd::baseline, dnkd::avx2, dnkd::avx512) together with the vector types of simd.inc.
//
// Only the code between the pragmas may use the wider instructions, so DNKD_ROWS_FILE and simd.inc
// include nothing: an inline function of a standard header compiled here for AVX2 could be the one
// copy that the linker keeps for everybody.
#include <cstdint>
#if defined(__x86_64__)
#ifdef __GNUC__
// GCC 12 warns of what its own header leaves undefined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#define DNKD_HAVE_X86_ISAS 1
#endif

#ifndef DNKD_ROWS_FILE
#error "define DNKD_ROWS_FILE before including for_each_isa.h"
#endif

namespace dnkd {
// Whether the AVX-512 code may use the instruction vcvtneps2bf16; set by active_isa().
extern bool rounds_to_bfloat16;
}  // namespace dnkd

#define DNKD_VECTOR_BYTES 16
namespace dnkd::baseline {
#include "common/simd.inc"
#include DNKD_ROWS_FILE
}  // namespace dnkd::baseline
#undef DNKD_VECTOR_BYTES

#ifdef DNKD_HAVE_X86_ISAS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define DNKD_VECTOR_BYTES 32
namespace dnkd::avx2 {
#include "common/simd.inc"
#include DNKD_ROWS_FILE
}  // namespace dnkd::avx2
#undef DNKD_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#define DNKD_VECTOR_BYTES 64
namespace dnkd::avx512 {
#include "common/simd.inc"
#include DNKD_ROWS_FILE
}  // namespace dnkd::avx512
#undef DNKD_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // DNKD_HAVE_X86_ISAS

// Calls NAMESPACE::function(...) of an instruction set.
#ifdef DNKD_HAVE_X86_ISAS
#define DNKD_CALL_ISA(isa, function, ...)               \
  [&] {                                                 \
    switch (isa) {                                      \
      case ::dnkd::Isa::kAvx512:                        \
      case ::dnkd::Isa::kAvx512Bf16:                    \
        return ::dnkd::avx512::function(__VA_ARGS__);   \
      case ::dnkd::Isa::kAvx2:                          \
        return ::dnkd::avx2::function(__VA_ARGS__);     \
      default:                                          \
        return ::dnkd::baseline::function(__VA_ARGS__); \
    }                                                   \
  }()
#else
#define DNKD_CALL_ISA(isa, function, ...) \
  (static_cast<void>(isa), ::dnkd::baseline::function(__VA_ARGS__))
#endif
