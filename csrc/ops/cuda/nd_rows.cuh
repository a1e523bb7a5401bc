// What the kernels of the ND loss and of its diagnostics share: one read of a row of student,
// direction and teacher, and how rows are spread over warps and blocks.
#pragma once

#include "common/device.cuh"
#include "ops/nd_loss.h"

namespace dnkd {

// A row is read by a warp while it fits in the warp's registers, otherwise by a block.
constexpr int kBlock = 128;
// Blocks per multiprocessor that the compiler makes room for: as many as need no spilling.
constexpr int kMinBlocks = 4;

// 16-byte vectors of a row that each thread keeps in registers (2048 elements of a row per block,
// 1024 of float64); what is beyond is read again where it is needed again.
template <typename S>
constexpr int kKept = sizeof(S) == 4 ? 4 : 2;

// This thread's part of <s, c>, |s|^2, |c|^2 and |t|^2 (0 where `teacher` is null), and the first
// kKept<S> vectors of student and direction. `lane` is one of kThreads.
template <typename S, typename M, int kVec, int kThreads>
DNKD_INLINE void nd_row_sums(const S* student, const M* direction, const S* teacher, int columns,
                             int lane, typename Accumulate<S>::type (&sums)[4],
                             Pack<S, kVec> (&kept_student)[kKept<S>],
                             Pack<M, kVec> (&kept_direction)[kKept<S>]) {
  using A = typename Accumulate<S>::type;
  constexpr int kKeep = kKept<S>;
  const int vectors = columns / kVec;
  const auto add = [&](S s, M c) {
    const A wide_s = widen(s);
    const A wide_c = widen(c);
    sums[0] += wide_s * wide_c;
    sums[1] += wide_s * wide_s;
    sums[2] += wide_c * wide_c;
  };
  const auto add_teacher = [&](S t) {
    const A wide = widen(t);
    sums[3] += wide * wide;
  };
  // All loads of the kept part are under way before the first is used.
  Pack<S, kVec> kept_teacher[kKeep];
#pragma unroll
  for (int k = 0; k < kKeep; ++k) {
    const int v = lane + k * kThreads;
    if (v < vectors) {
      kept_student[k] = load_pack<S, kVec>(student + static_cast<int64_t>(v) * kVec);
      kept_direction[k] = load_pack<M, kVec>(direction + static_cast<int64_t>(v) * kVec);
      if (teacher != nullptr) {
        kept_teacher[k] = load_pack<S, kVec>(teacher + static_cast<int64_t>(v) * kVec);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kKeep; ++k) {
    if (lane + k * kThreads < vectors) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        add(kept_student[k].elements[i], kept_direction[k].elements[i]);
      }
      if (teacher != nullptr) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          add_teacher(kept_teacher[k].elements[i]);
        }
      }
    }
  }
  for (int v = lane + kKeep * kThreads; v < vectors; v += kThreads) {
    const auto s = load_pack<S, kVec>(student + static_cast<int64_t>(v) * kVec);
    const auto c = load_pack<M, kVec>(direction + static_cast<int64_t>(v) * kVec);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      add(s.elements[i], c.elements[i]);
    }
    if (teacher != nullptr) {
      const auto t = load_pack<S, kVec>(teacher + static_cast<int64_t>(v) * kVec);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        add_teacher(t.elements[i]);
      }
    }
  }
  const int j = vectors * kVec + lane;
  if (j < columns) {
    add(student[j], direction[j]);
    if (teacher != nullptr) {
      add_teacher(teacher[j]);
    }
  }
}

// -- launchers -----------------------------------------------------------------------------------

// A warp reads rows that its registers hold, a block longer ones.
template <typename S>
bool takes_a_block(int64_t columns, int vector) {
  return columns > static_cast<int64_t>(kWarpSize) * kKept<S> * vector;
}

// Calls function.template operator()<student type, direction type>().
template <typename Params, typename Function>
int nd_dispatch(const Params& p, const Function& function) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return p.directions_are_float ? function(Half{}, float{}) : function(Half{}, Half{});
    case Dtype::kBFloat16:
      return p.directions_are_float ? function(BFloat16{}, float{})
                                    : function(BFloat16{}, BFloat16{});
    case Dtype::kFloat64:
      return p.directions_are_float ? function(double{}, float{}) : function(double{}, double{});
    default:
      return function(float{}, float{});
  }
}

}  // namespace dnkd
