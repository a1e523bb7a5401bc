// Allocation of gradients.
#pragma once

#include <ATen/core/Tensor.h>

namespace dnkd {

// An uninitialised contiguous tensor. Large ones on the CPU are backed by huge pages where the
// system offers them: the page faults of a fresh buffer otherwise cost as much as filling it.
at::Tensor empty_gradient(at::IntArrayRef shape, const at::TensorOptions& options);

}  // namespace dnkd
