// What the backward passes of all losses share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "common/dtype.h"

namespace dnkd {

// Whether the forward pass keeps a few scalars per row rather than the gradient: in float16 that
// would underflow, formed before the loss scale is known, and a loss per row has no single upstream
// value.
inline bool keeps_coefficients(at::ScalarType type, Reduction reduction) {
  return type == at::kHalf || reduction == Reduction::kNone;
}

// How an operator of a loss, which is registered twice, treats a call without a gradient.
enum class Level {
  // Among autograd's kernels: where the call is_traced(), as itself, so that the graph holds the
  // operator that can be differentiated. torch.export decomposes programs without gradients, and
  // they may be trained.
  kAutograd,
  // Below them, where a traced operator arrives at last.
  kBelowAutograd,
};

// Whether tensors or modes of Python see what is done with a tensor.
bool is_traced(const at::Tensor& tensor);

// Whether a tensor has a tangent, of forward-mode differentiation.
bool has_tangent(const at::Tensor& tensor);
bool has_tangent(const std::optional<at::Tensor>& tensor);

// Whether the backward pass that runs is to be differentiated itself: with create_graph=True, or in
// forward mode by the upstream gradient's tangent.
bool is_differentiated(const at::Tensor& upstream);

// A backward pass that is_differentiated(). `reference` names the operator that
// evaluates the loss with differentiable PyTorch operations (its Python implementation is the
// loss's reference), `arguments` are the loss's own arguments, among them `input`. Returns the
// gradient of the loss with respect to `input`, itself differentiable with respect to `input` and
// `upstream`.
at::Tensor differentiable_gradient(const char* reference, torch::jit::Stack arguments,
                                   const at::Tensor& input, const at::Tensor& upstream);

// Chain rule for a gradient that the forward pass formed for upstream = 1. The usual upstream is 1
// and then costs nothing: no pass over the gradient, and on a GPU no synchronisation, because the
// kernel that would scale it looks at the value on the device. `gradient` is modified in place and
// returned only where nobody can see it again; with retain_graph, while a graph is traced, and
// where `is_shared` tells that saved-tensor hooks may have kept it, the product is a new tensor.
at::Tensor chain(const at::Tensor& gradient, const at::Tensor& upstream, bool is_shared);

// Whether the backward pass that runs is the last one of its graph: what it kept besides saved
// variables, which the engine lets go of by itself, can go.
bool is_last_backward();

// Whether hooks see the tensors that are saved for backward at present.
bool has_saved_tensor_hooks();

// Whether a tensor that is no input by which the loss is differentiated is to be saved for backward
// all the same, for hooks to see: activation checkpointing frees what they see. Without hooks such
// a tensor is kept in saved_data, because it may be overwritten where only second derivatives need
// it; an inference tensor always is, because it cannot be saved.
bool saves_through_hooks(const std::optional<at::Tensor>& tensor);

// What is kept in saved_data under a name, if anything; the last backward pass lets go of it.
std::optional<at::Tensor> take_kept(torch::autograd::AutogradContext* ctx, const char* name);

// Which capture into a CUDA graph the current stream of a tensor's device takes part in, 0 outside
// of one. A backward pass that is captured apart from its forward pass, as by
// torch.cuda.make_graphed_callables(), may be replayed several times for each replay of that: what
// the forward pass formed `is_shared` then, for chain().
int64_t capture_of(const at::Tensor& tensor);

}  // namespace dnkd
