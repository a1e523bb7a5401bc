// Allocation of gradients.
#pragma once

#include <ATen/core/Tensor.h>

namespace dnkd {

// An uninitialised contiguous tensor. The memory of large ones on the CPU comes from, and returns
// to, a pool: the page faults of a fresh buffer cost as much as filling it.
at::Tensor empty_gradient(at::IntArrayRef shape, const at::TensorOptions& options);

}  // namespace dnkd
