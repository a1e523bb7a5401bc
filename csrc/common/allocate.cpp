#include "common/allocate.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/accumulate.h>

#include "common/buffer_pool.h"

namespace dnkd {

at::Tensor empty_gradient(at::IntArrayRef shape, const at::TensorOptions& options) {
  // The C library keeps smaller ones by itself.
  constexpr size_t kWorthIt = size_t{256} << 10;
  const size_t bytes = c10::multiply_integers(shape) * options.dtype().itemsize();
  if (!options.device().is_cpu() || bytes < kWorthIt) {
    return at::empty(shape, options);
  }
  auto* const block = new BufferPool::Block(BufferPool::gradients().take(bytes));
  // Profilers see a tensor's memory, not the pool's.
  c10::profiledCPUMemoryReporter().New(block->data, bytes);
  const auto give_back = [](void* context) {
    auto* const given = static_cast<BufferPool::Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(given->data);
    BufferPool::gradients().give(*given);
    delete given;
  };
  return at::for_blob(block->data, shape)
      .context(block, give_back)
      .allocator(c10::GetCPUAllocator())
      .resizeable_storage()
      .options(options)
      .make_tensor();
}

}  // namespace dnkd
