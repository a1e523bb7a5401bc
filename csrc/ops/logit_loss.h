// Cross entropy and distillation by logits: what their kernels take, free of torch.
//
// With z, t the student's and the teacher's logits of a row, u = s z and v = s' t (s = 1 / T, or
// with standardization 1 / (T (sd + 1e-7)); constants drop out), p = softmax(u), q = softmax(v):
//
//   kd   = T^2 KL(q || p)                                     d kd / dz = T^2 s (p - q)
//   dkd  = T^2 (alpha TCKD + beta NCKD)                        with d = u_y - lse_{k != y} u:
//     TCKD = KL of (sigmoid(d'), sigmoid(-d')) from (sigmoid(d), sigmoid(-d))
//     NCKD = KL of the softmax over k != y
//   ce   = - sum_k r_k log softmax(z)_k                        d ce / dz = (sum r) softmax(z) - r
//
// Every gradient of a row has the form (z' = z - shift)
//   a1 exp(z'_k) + as exp(s z'_k) + at exp(s' t'_k) + constant + linear z'_k + probability r_k
//   (+ label at k = y), in DKD without the exponentials at k = y,
// so that a few scalars per row are all a backward pass needs besides its inputs.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dnkd {

// Scalars per row that a gradient is formed from; the order of LogitRow in logit_loss_terms.inc.
constexpr int kLogitCoefficients = 11;

// "Accumulate type" below: float for half, bfloat16 and float students, double for double.
struct LogitLossParams {
  Dtype dtype;           // of student and gradient
  bool teacher_is_wide;  // teacher is of the accumulate type; otherwise of `dtype`
  bool label_is_int32;   // label is int32; otherwise int64
  bool has_ce;           // with the cross entropy; needs label or probabilities
  bool decoupled;        // DKD instead of KD; needs label
  bool standardize;

  int64_t rows;     // N
  int64_t columns;  // C
  int64_t ignore_index;
  Reduction reduction;
  double temperature;
  double ce_weight;
  double kd_weight;
  double alpha;
  double beta;
  double label_smoothing;

  const void* student;        // [N, C], rows student_stride elements apart
  const void* teacher;        // [N, C], rows teacher_stride elements apart
  const void* label;          // [N] class indices, or null
  const void* probabilities;  // [N, C] accumulate type, rows probabilities_stride apart, or null
  const void* ce_scale;       // [] accumulate type, multiplies ce_weight, or null
  const void* kd_scale;       // [] accumulate type, multiplies kd_weight, or null
  int64_t student_stride;
  int64_t teacher_stride;
  int64_t probabilities_stride;

  // Accumulate type: [N] for kNone, else [].
  void* loss;
  void* ce;  // 0 without has_ce
  void* kd;
  void* gradient;      // [N, C] contiguous, of loss with respect to student, or null
  void* coefficients;  // [N, kLogitCoefficients] accumulate type, or null
};

struct LogitLossBackwardParams {
  Dtype dtype;
  bool teacher_is_wide;
  bool label_is_int32;
  bool has_ce;
  bool decoupled;
  bool standardize;

  int64_t rows;
  int64_t columns;
  double temperature;

  const void* upstream;     // accumulate type: [N], or [] with upstream_stride 0
  int64_t upstream_stride;  // elements
  const void* student;      // the rest as above
  const void* teacher;
  const void* label;
  const void* probabilities;
  const void* coefficients;  // [N, kLogitCoefficients]
  int64_t student_stride;
  int64_t teacher_stride;
  int64_t probabilities_stride;

  void* gradient;  // [N, C] contiguous
};

// Where a label other than ignore_index names no class: its position, or -1. `label` on the CPU.
int64_t logit_loss_find_bad_label_cpu(const LogitLossParams& params);
// Labels must have been checked. Means over no row are 0.
void logit_loss_forward_cpu(const LogitLossParams& params);
void logit_loss_backward_cpu(const LogitLossBackwardParams& params);

#ifdef DNKD_WITH_CUDA
// Bytes of device scratch the forward launcher needs besides its outputs; need not be cleared.
int64_t logit_loss_scratch_bytes_cuda(const LogitLossParams& params);
// A row whose label names no class gets NaN for its loss and gradient.
// Returns the first cudaError_t met (0: success). `stream` is a cudaStream_t.
int logit_loss_forward_cuda(const LogitLossParams& params, void* scratch, void* stream);
int logit_loss_backward_cuda(const LogitLossBackwardParams& params, void* stream);
#endif

}  // namespace dnkd
