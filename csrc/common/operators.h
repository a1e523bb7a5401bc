// Calls of this library's operators through torch's dispatcher, so that tracing sees them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <utility>

namespace dnkd {

// The operator "dnkd_ext::<name>", whose kernels have this signature. Keep it in a static variable:
// finding it takes longer than calling it.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What an operator implemented in Python, a loss's reference, makes of the loss's own arguments.
inline at::Tensor call_reference(const char* name, torch::jit::Stack arguments) {
  c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(arguments);
  return std::move(arguments.at(0)).toTensor();
}

}  // namespace dnkd
