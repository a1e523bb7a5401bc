// How far the student's features have come: what its kernels take, free of torch.
//
//   norm_ratio = sum |s| / sum |t|                 s: student row, t: teacher row
//   cosine     = mean <s, c> / (|s| |c|)           c: the row of `directions` the target names;
//                                                  0 where |s| <= eps or c = 0
//   reached    = mean of  |s| >= |t|
//
// over the rows that are not ignored; NaN where there are none, and the first and last without a
// teacher. A row that makes the ND loss NaN makes all three NaN.
#pragma once

#include "ops/nd_loss.h"

namespace dnkd {

struct FeatureDiagnosticsParams : NdInputs {
  void* result;  // [3] accumulate type: norm_ratio, cosine, reached
};

// Targets must have been checked.
void feature_diagnostics_cpu(const FeatureDiagnosticsParams& params);

#ifdef DNKD_WITH_CUDA
// Bytes of device scratch the launcher needs; need not be cleared.
int64_t feature_diagnostics_scratch_bytes_cuda(const FeatureDiagnosticsParams& params);
// A target that names no class makes the result NaN; nothing is read for it. Returns the first
// cudaError_t met (0: success). `stream` is a cudaStream_t.
int feature_diagnostics_cuda(const FeatureDiagnosticsParams& params, void* scratch, void* stream);
#endif

}  // namespace dnkd
