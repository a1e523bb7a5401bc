// Argument checks shared by the operators. Every message names the argument, what came and what
// was wanted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/anomaly_mode.h>

#include <cstdlib>
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

// Whether targets on a GPU are to be checked at the cost of a synchronisation: DNKD_CHECK_TARGET=1,
// or anomaly detection.
inline bool checks_target_on_device() {
  const char* value = std::getenv("DNKD_CHECK_TARGET");
  return (value != nullptr && *value != '\0' && std::string_view(value) != "0") ||
         torch::autograd::AnomalyMode::is_enabled();
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
