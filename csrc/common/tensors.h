// Bringing arguments to the few layouts and types that the kernels know.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace dnkd {

using OptionalTensor = std::optional<at::Tensor>;

inline std::string shape_of(const at::Tensor& tensor) { return c10::str(tensor.sym_sizes()); }

// The shape without its last dimension.
inline c10::SymIntArrayRef row_shape(const at::Tensor& tensor) {
  return tensor.sym_sizes().slice(0, tensor.dim() - 1);
}

inline bool is_row_shape(const at::Tensor& tensor, const at::Tensor& other) {
  return tensor.sym_sizes() == row_shape(other);
}

// (..., D) as (N, D) whose elements of a row lie side by side; a view wherever one exists.
inline at::Tensor as_rows(const at::Tensor& tensor) {
  const at::Tensor rows =
      tensor.dim() == 2 ? tensor : tensor.reshape_symint({-1, tensor.sym_size(-1)});
  return rows.sym_stride(1) == 1 || rows.sym_size(1) == 1 ? rows : rows.contiguous();
}

// What as_rows() returns. Strides mean nothing where there is one column or no row.
inline bool has_stride_1_rows(const at::Tensor& tensor) {
  return tensor.dim() == 2 && (tensor.stride(1) == 1 || tensor.size(1) == 1 || tensor.size(0) == 0);
}

// (...) as (N,) whose elements lie side by side. A reshape alone keeps strides that merge: those of
// x[..., ::2], or of an expanded scalar.
inline at::Tensor flat(const at::Tensor& tensor) {
  return (tensor.dim() == 1 ? tensor : tensor.reshape({-1})).contiguous();
}

inline at::Tensor cast(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : tensor.to(type);
}

inline OptionalTensor cast(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor.has_value() ? OptionalTensor(cast(*tensor, type)) : std::nullopt;
}

inline const void* data_or_null(const OptionalTensor& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// What tells, later, whether a tensor that is not saved for backward was overwritten; inference
// tensors keep no count.
inline int64_t version_of(const at::Tensor& tensor) {
  return !tensor.defined() || tensor.is_inference() ? 0 : tensor._version();
}

}  // namespace dnkd
