// Argument checks shared by the operators. Every message names the argument, what came and what
// was wanted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/anomaly_mode.h>

#include <cstdlib>
#include <optional>
#include <string_view>

#include "common/dtype.h"

namespace dnkd {

inline bool is_loss_dtype(at::ScalarType type) {
  return type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
}

inline void check_dense(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(!tensor.is_nested(), name, " must be a dense tensor, got a nested one");
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, " must be a dense tensor, got layout ",
                   tensor.layout());
}

inline void check_floating(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK_TYPE(tensor.defined(), name, " must be a torch.Tensor, got NoneType");
  check_dense(tensor, name);
  TORCH_CHECK_TYPE(is_loss_dtype(tensor.scalar_type()), name,
                   " must be float16, bfloat16, float32 or float64, got ",
                   c10::toString(tensor.scalar_type()));
}

inline void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& other,
                              const char* other_name) {
  TORCH_CHECK(tensor.device() == other.device(), name, " is on ", tensor.device(), " but ",
              other_name, " is on ", other.device(), "; they must be on the same device");
}

// A target that is not floating, whose elements are probabilities then.
inline void check_class_indices(const at::Tensor& target) {
  check_dense(target, "target");
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt,
                   "target must hold int64 or int32 class indices or floating class "
                   "probabilities, got ",
                   c10::toString(target.scalar_type()));
}

// A loss's weight, where it is a tensor.
inline void check_weight(const std::optional<at::Tensor>& weight, const char* name,
                         const at::Tensor& other, const char* other_name) {
  if (!weight.has_value()) {
    return;
  }
  check_floating(*weight, name);
  check_same_device(*weight, name, other, other_name);
  TORCH_CHECK_VALUE(weight->dim() == 0, name, " must be a float or a 0-dim tensor, got shape ",
                    weight->sym_sizes());
  TORCH_CHECK_VALUE(!weight->requires_grad(), name,
                    " must not require a gradient; multiply the loss by it instead");
}

// The CUDA kernels count the elements of a row (N, D) in 32 bits.
inline void check_row_length(const at::Tensor& rows, const char* name, const char* elements) {
  TORCH_CHECK(rows.is_cpu() || rows.size(1) < (int64_t{1} << 30), name,
              " on a GPU must have fewer than 2^30 ", elements);
}

// The target on the CPU, where its range can be checked; none where that would cost a
// synchronisation that nobody asked for by DNKD_CHECK_TARGET=1 or anomaly detection.
inline std::optional<at::Tensor> target_to_check(const at::Tensor& target) {
  if (target.is_cpu()) {
    return target;
  }
  const char* value = std::getenv("DNKD_CHECK_TARGET");
  const bool is_asked_for =
      (value != nullptr && *value != '\0' && std::string_view(value) != "0") ||
      torch::autograd::AnomalyMode::is_enabled();
  return is_asked_for ? std::optional(target.cpu()) : std::nullopt;
}

inline Dtype to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kDouble:
      return Dtype::kFloat64;
    default:
      return Dtype::kFloat32;
  }
}

// What sums are kept in, and what the loss of a student of this type is.
inline at::ScalarType accumulate_type(at::ScalarType type) {
  return type == at::kDouble ? at::kDouble : at::kFloat;
}

inline Reduction to_reduction(std::string_view reduction) {
  if (reduction == "mean") {
    return Reduction::kMean;
  }
  if (reduction == "sum") {
    return Reduction::kSum;
  }
  TORCH_CHECK_VALUE(reduction == "none", "reduction must be 'none', 'mean' or 'sum', got '",
                    reduction, "'");
  return Reduction::kNone;
}

}  // namespace dnkd
