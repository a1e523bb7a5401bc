// The tensors that the ND loss and its diagnostics take: checked, then brought to the few types
// their kernels know.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/tensors.h"
#include "ops/nd_loss.h"

namespace dnkd {

// What the kernels take: rows of stride-1 features, (N, D) and (N,).
struct NdArguments {
  at::Tensor student;
  at::Tensor directions;         // class means (C, D), or one direction per row (N, D)
  OptionalTensor target;         // (N,) int64 or int32; none: row i takes direction i
  OptionalTensor teacher;        // (N, D)
  OptionalTensor teacher_norms;  // (N,) accumulate type
  OptionalTensor weight;         // [] accumulate type
};

void check_nd_arguments(const at::Tensor& student, const at::Tensor& target,
                        const at::Tensor& class_means, const OptionalTensor& teacher_features,
                        const OptionalTensor& teacher_norms, const OptionalTensor& weight,
                        double eps);

NdArguments prepare_nd(const at::Tensor& student, const at::Tensor& target,
                       const at::Tensor& class_means, const OptionalTensor& teacher_features,
                       const OptionalTensor& teacher_norms, const OptionalTensor& weight);

// The part of the kernels' parameters that these tensors are.
NdInputs nd_inputs(const at::Tensor& student, const OptionalTensor& target,
                   const at::Tensor& directions, const OptionalTensor& teacher,
                   const OptionalTensor& teacher_norms, int64_t ignore_index, double eps);

// IndexError for a target that names no class: on the CPU always, elsewhere where asked for,
// because it synchronises.
void check_nd_target(const NdInputs& inputs, const at::Tensor& target);

}  // namespace dnkd
