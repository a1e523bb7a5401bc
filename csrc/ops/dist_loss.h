// The DIST loss: what its kernels take, free of torch.
//
// With y = softmax(z / tau) of the student (s) and the teacher (t), a and b their deviations from
// the mean of a row or a column, and eps = 1e-8:
//
//   rho  = <a, b> / (|a| |b| + eps)
//   loss = tau^2 (beta (1 - mean of rho over rows) + gamma (1 - mean of rho over columns))
//   d rho / d a = cross b - own a,  cross = 1 / (|a| |b| + eps)
//                                   own   = <a, b> |b| / (|a| (|a| |b| + eps)^2)
//   d loss / d z = y_s (G - <y_s, G>) / tau,  G = d loss / d y_s
//
// In three steps, of which each needs the whole of the one before: sums over every row, sums over
// every column ("moments") and from those the loss ("finish"), gradient. Probabilities are formed
// anew in each; none is kept. Moments are added over processes before the finish, if at all.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dnkd {

// Values kept per row: maximum of the student's logits, one over the sum of the exponentials, both
// of the teacher, cross, own, rho, and one without meaning.
constexpr int kDistRowValues = 8;
// Sums over a column, of float64: y_s, y_t, y_s^2, y_t^2, y_s y_t.
constexpr int kDistMoments = 5;
// Values that the gradient takes of a column: cross and own, both times -tau gamma processes / C,
// and the means of y_s and y_t.
constexpr int kDistColumnValues = 4;

// "Accumulate type" below: float for half, bfloat16 and float students, double for double.
struct DistLossMomentsParams {
  Dtype dtype;           // of student
  bool teacher_is_wide;  // teacher is of the accumulate type; otherwise of `dtype`

  int64_t rows;     // N
  int64_t columns;  // C
  double tau;

  const void* student;  // [N, C], rows student_stride elements apart
  const void* teacher;  // [N, C], rows teacher_stride elements apart
  int64_t student_stride;
  int64_t teacher_stride;

  void* row_values;  // [N, kDistRowValues] accumulate type
  // [kDistMoments * C + 1]: [kDistMoments, C], and N. May be null for dist_loss_forward_cuda().
  double* moments;
};

struct DistLossFinishParams {
  bool is_double;  // the accumulate type is double; otherwise float

  int64_t rows;
  int64_t columns;
  double beta;
  double gamma;
  double tau;
  double processes;  // that `moments` were added over; multiplies the gradient of the columns

  const void* row_values;
  const double* moments;  // without meaning for dist_loss_forward_cuda(), which forms its own

  void* loss;           // [] accumulate type
  void* column_values;  // [kDistColumnValues, C] accumulate type, or null
};

struct DistLossBackwardParams {
  Dtype dtype;  // of student and gradient
  bool teacher_is_wide;

  int64_t rows;
  int64_t columns;
  double beta;
  double tau;

  const void* upstream;  // [] accumulate type
  const void* student;
  const void* teacher;
  const void* row_values;
  const void* column_values;
  int64_t student_stride;
  int64_t teacher_stride;

  void* gradient;  // [N, C] contiguous
};

// The loss of no row, here or in any process, is 0.
void dist_loss_moments_cpu(const DistLossMomentsParams& params);
void dist_loss_finish_cpu(const DistLossFinishParams& params);
void dist_loss_backward_cpu(const DistLossBackwardParams& params);

#ifdef DNKD_WITH_CUDA
// Bytes of device scratch the launchers need besides their outputs; need not be cleared.
int64_t dist_loss_forward_scratch_bytes_cuda(const DistLossMomentsParams& params);
int64_t dist_loss_finish_scratch_bytes_cuda(const DistLossFinishParams& params);
// Return the first cudaError_t met (0: success). `stream` is a cudaStream_t.
// Moments and finish of one process, in two launches.
int dist_loss_forward_cuda(const DistLossMomentsParams& params, const DistLossFinishParams& finish,
                           void* scratch, void* stream);
// Takes the scratch of the forward pass.
int dist_loss_moments_cuda(const DistLossMomentsParams& params, void* scratch, void* stream);
int dist_loss_finish_cuda(const DistLossFinishParams& params, void* scratch, void* stream);
int dist_loss_backward_cuda(const DistLossBackwardParams& params, void* stream);
#endif

}  // namespace dnkd
