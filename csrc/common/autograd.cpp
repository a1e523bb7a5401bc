#include "common/autograd.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/launch.h"
#include "common/operators.h"
#include "common/scale.h"

namespace dnkd {

bool is_traced(const at::Tensor& tensor) { return at::areAnyTensorSubclassLike({tensor}); }

bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}

bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && has_tangent(*tensor);
}

bool is_differentiated(const at::Tensor& upstream) {
  return at::GradMode::is_enabled() || has_tangent(upstream);
}

at::Tensor differentiable_gradient(const char* reference, torch::jit::Stack arguments,
                                   const at::Tensor& input, const at::Tensor& upstream) {
  const bool keeps_graph = at::GradMode::is_enabled();
  const at::AutoGradMode with_graph(true);
  const at::Tensor loss = call_reference(reference, std::move(arguments));
  const at::Tensor gradient = torch::autograd::grad({loss}, {input}, {upstream},
                                                    /*retain_graph=*/true, /*create_graph=*/true)
                                  .at(0);
  if (keeps_graph) {
    return gradient;
  }
  at::Tensor result = gradient.detach();  // which loses the tangent
  if (has_tangent(gradient)) {
    result._set_fw_grad(gradient._fw_grad(/*level=*/0).detach(), /*level=*/0,
                        /*is_inplace_op=*/false);
  }
  return result;
}

// (gradient, upstream []): gradient *= upstream
static void scale_cpu(at::Tensor& gradient, const at::Tensor& upstream) { gradient.mul_(upstream); }

bool is_last_backward() { return !torch::autograd::get_current_graph_task_keep_graph(); }

bool has_saved_tensor_hooks() { return at::SavedTensorDefaultHooks::get_hooks().has_value(); }

bool saves_through_hooks(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && has_saved_tensor_hooks() && !tensor->is_inference();
}

std::optional<at::Tensor> take_kept(torch::autograd::AutogradContext* ctx, const char* name) {
  const auto found = ctx->saved_data.find(name);
  if (found == ctx->saved_data.end()) {
    return std::nullopt;
  }
  at::Tensor tensor = found->second.toTensor();
  if (is_last_backward()) {
    ctx->saved_data.erase(found);
  }
  return tensor;
}

int64_t capture_of(const at::Tensor& tensor) {
#ifdef DNKD_WITH_CUDA
  // A fake tensor may be of a device that is not there.
  if (tensor.is_cuda() && !at::areAnyTensorSubclassLike({tensor})) {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream();
    if (stream == nullptr) {  // the default one, which cannot be captured
      return 0;
    }
    const c10::cuda::CUDAGuard device(tensor.device());
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    C10_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id));
    return status == cudaStreamCaptureStatusNone ? 0 : static_cast<int64_t>(id);
  }
#endif
  return 0;
}

at::Tensor chain(const at::Tensor& gradient, const at::Tensor& upstream, bool is_shared) {
  if (is_shared || !is_last_backward() || upstream.is_neg() || upstream._is_zerotensor() ||
      at::areAnyTensorSubclassLike({gradient, upstream})) {
    return at::mul(gradient, upstream);
  }
  if (upstream.is_cpu()) {
    const bool is_one = upstream.scalar_type() == at::kDouble
                            ? *upstream.const_data_ptr<double>() == 1
                            : *upstream.const_data_ptr<float>() == 1;
    if (is_one) {
      return gradient;
    }
  }
  static const auto op = find_operator<void(at::Tensor&, const at::Tensor&)>("dnkd_ext::_scale_");
  at::Tensor result = gradient;
  op.call(result, upstream);
  return result;
}

#ifdef DNKD_WITH_CUDA
static void scale_cuda(at::Tensor& gradient, const at::Tensor& upstream) {
  TORCH_CHECK(gradient.is_contiguous(), "gradient must be contiguous");
  TORCH_CHECK(upstream.dim() == 0, "upstream must be a 0-dim tensor");
  check_same_device(upstream, "upstream", gradient, "gradient");
  TORCH_CHECK(upstream.scalar_type() == accumulate_type(gradient.scalar_type()),
              "upstream must be ", accumulate_type(gradient.scalar_type()), ", got ",
              upstream.scalar_type());
  void* const data = gradient.mutable_data_ptr();
  const auto launch = [&](const void* factor, void* stream) {
    return scale_cuda(to_dtype(gradient.scalar_type()), gradient.numel(), data, factor, stream);
  };
  launch_cuda(gradient, launch, upstream.const_data_ptr());
}
#endif

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  m.def("_scale_(Tensor(a!) gradient, Tensor upstream) -> ()");
}

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) { m.impl("_scale_", scale_cpu); }

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) {
  m.impl("_scale_", static_cast<void (*)(at::Tensor&, const at::Tensor&)>(scale_cuda));
}
#endif

}  // namespace dnkd
