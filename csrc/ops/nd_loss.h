// The feature-direction-and-norm (ND) loss: what its kernels take, free of torch.
//
//   e   = c / max(|c|, eps)                      c: the row of `directions` the target names
//   m   = max(|s|, |t|)                          s: student row, t: teacher row (|t| = 0 without)
//   l   = 1 - <s, e> / m                         1 where m <= eps
//   dl  = -e / m                   if |s| <  |t|
//         -e / m + <s, e> s / m^3  if |s| >= |t|
//
// so that every row's gradient is  alpha * c + beta * s  with two scalars per row.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace dnkd {

// "Accumulate type" below: float for half, bfloat16 and float students, double for double.
struct NdInputs {
  Dtype dtype;                // of student, teacher and gradient
  bool directions_are_float;  // directions are float32; otherwise of `dtype`
  bool target_is_int32;       // target is int32; otherwise int64

  int64_t rows;     // N
  int64_t columns;  // D
  int64_t classes;  // rows of `directions`
  int64_t ignore_index;
  double eps;

  const void* student;        // [N, D], rows student_stride elements apart
  const void* teacher;        // [N, D], rows teacher_stride elements apart, or null
  const void* teacher_norms;  // [N] accumulate type, or null
  const void* directions;     // [classes, D], rows directions_stride elements apart
  const void* target;         // [N], or null: row i of the student takes row i of directions
  int64_t student_stride;
  int64_t teacher_stride;
  int64_t directions_stride;
};

struct NdLossParams : NdInputs {
  Reduction reduction;
  double loss_weight;
  const void* weight;  // [] accumulate type, multiplies loss_weight, or null
  const void* base;    // [] accumulate type, is added to the loss unless kNone, or null

  void* loss;          // accumulate type: [N] for kNone, else []
  void* nd;            // [] accumulate type: the loss without base and weights, or null
  void* gradient;      // [N, D] contiguous, of loss with respect to student, or null
  void* coefficients;  // [N, 2] accumulate type: alpha and beta of every row, or null
};

struct NdLossBackwardParams {
  Dtype dtype;
  bool directions_are_float;
  bool target_is_int32;

  int64_t rows;     // N
  int64_t columns;  // D
  int64_t classes;  // rows of `directions`

  const void* upstream;      // accumulate type: [N], or [] with upstream_stride 0
  int64_t upstream_stride;   // elements
  const void* student;       // [N, D]
  const void* directions;    // [classes, D]
  const void* target;        // [N], or null
  const void* coefficients;  // [N, 2] accumulate type
  int64_t student_stride;
  int64_t directions_stride;

  void* gradient;  // [N, D] contiguous
};

// Where a target (other than ignore_index) names no class: its position, or -1.
int64_t nd_loss_find_bad_target_cpu(const NdInputs& params);
// Targets must have been checked. With kMean and no counted row the loss and gradient are 0.
void nd_loss_forward_cpu(const NdLossParams& params);
void nd_loss_backward_cpu(const NdLossBackwardParams& params);

#ifdef DNKD_WITH_CUDA
// Bytes of device scratch the forward launcher needs besides its outputs; need not be cleared.
int64_t nd_loss_scratch_bytes_cuda(const NdLossParams& params);
// A row whose target names no class gets a NaN loss and gradient; nothing is read for it.
// Returns the first cudaError_t met (0: success). `stream` is a cudaStream_t.
int nd_loss_forward_cuda(const NdLossParams& params, void* scratch, void* stream);
int nd_loss_backward_cuda(const NdLossBackwardParams& params, void* stream);
#endif

}  // namespace dnkd
