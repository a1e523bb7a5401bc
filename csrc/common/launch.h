// Launches of the kernels in ops/cuda, which know no torch: on a tensor's device and the stream
// that is current there.
#pragma once

#ifdef DNKD_WITH_CUDA

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace dnkd {

// launch(params, stream) returns a cudaError_t, as an int.
template <typename Launch, typename Params>
void launch_cuda(const at::Tensor& tensor, const Launch& launch, const Params& params) {
  const c10::cuda::CUDAGuard device(tensor.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(static_cast<cudaError_t>(launch(params, stream.stream())));
}

// launch(params, scratch, stream), with scratch_bytes(params) of uninitialised memory.
template <typename Launch, typename ScratchBytes, typename Params>
void launch_cuda(const at::Tensor& tensor, const Launch& launch, const ScratchBytes& scratch_bytes,
                 const Params& params) {
  const auto with_scratch = [&](const Params& p, void* stream) {
    const auto bytes = tensor.options().dtype(at::kByte);
    const at::Tensor scratch = at::empty({scratch_bytes(p)}, bytes);
    return launch(p, scratch.mutable_data_ptr(), stream);
  };
  launch_cuda(tensor, with_scratch, params);
}

}  // namespace dnkd

#endif
