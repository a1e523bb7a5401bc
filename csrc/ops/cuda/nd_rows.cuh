// What the kernels of the ND loss and of its diagnostics share: how rows are spread over warps and
// blocks. Their read of a row is nd_row_sums.inc.
#pragma once

#include "common/device.cuh"
#include "ops/nd_loss.h"

namespace dnkd {

// A row is read by a warp while it fits in the warp's registers, otherwise by a block.
constexpr int kBlock = 128;
// Blocks per multiprocessor that the compiler makes room for: as many as need no spilling.
template <typename S, typename M>
constexpr int kMinBlocks = sizeof(S) > 2    ? 4
                           : sizeof(M) == 2 ? 7
                                            : 5;

// 16-byte vectors of a row that each thread keeps in registers (2048 elements of a row per block,
// 1024 of float64); what is beyond is read again where it is needed again.
template <typename S>
constexpr int kKept = sizeof(S) == 4 ? 4 : 2;

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
