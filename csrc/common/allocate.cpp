#include "common/allocate.h"

#include <ATen/ops/empty.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dnkd {

at::Tensor empty_gradient(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor gradient = at::empty(shape, options);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr uintptr_t kWorthIt = uintptr_t{8} << 20;
  if (gradient.is_cpu() && gradient.nbytes() >= kWorthIt) {
    // Only whole huge pages inside the buffer; advice, so that a refusal changes nothing.
    const auto begin = reinterpret_cast<uintptr_t>(gradient.mutable_data_ptr());
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + gradient.nbytes()) / kHugePage * kHugePage;
    if (last > first) {
      (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    }
  }
#endif
  return gradient;
}

}  // namespace dnkd
