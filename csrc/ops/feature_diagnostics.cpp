#include "ops/feature_diagnostics.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/checks.h"
#include "common/launch.h"
#include "common/operators.h"
#include "ops/nd_arguments.h"

namespace dnkd {
namespace {

using at::Tensor;

// Returns norm_ratio, cosine and reached as one [3], so that they cost one allocation.
Tensor feature_diagnostics(const Tensor& student, const Tensor& target, const Tensor& class_means,
                           const OptionalTensor& teacher_features,
                           const OptionalTensor& teacher_norms, int64_t ignore_index, double eps) {
  check_nd_arguments(student, target, class_means, teacher_features, teacher_norms, std::nullopt,
                     eps);
  const NdArguments in =
      prepare_nd(student, target, class_means, teacher_features, teacher_norms, std::nullopt);
  check_row_length(in.student, "student_features", "features");
  FeatureDiagnosticsParams p{nd_inputs(in.student, in.target, in.directions, in.teacher,
                                       in.teacher_norms, ignore_index, eps)};
  if (p.target != nullptr) {
    check_nd_target(p, *in.target);
  }
  const Tensor result =
      at::empty({3}, student.options().dtype(accumulate_type(student.scalar_type())));
  p.result = result.mutable_data_ptr();
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    launch_cuda(student, feature_diagnostics_cuda, feature_diagnostics_scratch_bytes_cuda, p);
    return result;
  }
#endif
  feature_diagnostics_cpu(p);
  return result;
}

// Diagnostics have no gradient: what comes out does not remember where it came from.
Tensor feature_diagnostics_without_gradient(const Tensor& student, const Tensor& target,
                                            const Tensor& class_means,
                                            const OptionalTensor& teacher_features,
                                            const OptionalTensor& teacher_norms,
                                            int64_t ignore_index, double eps) {
  // Here already: of arguments that are not dense the dispatcher finds no kernel.
  check_nd_arguments(student, target, class_means, teacher_features, teacher_norms, std::nullopt,
                     eps);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  static const auto op =
      find_operator<decltype(feature_diagnostics)>("dnkd_ext::feature_diagnostics");
  return op.call(student, target, class_means, teacher_features, teacher_norms, ignore_index, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  m.def(
      "feature_diagnostics(Tensor student_features, Tensor target, Tensor class_means, "
      "Tensor? teacher_features, Tensor? teacher_norms, int ignore_index, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(dnkd_ext, Autograd, m) {
  m.impl("feature_diagnostics", feature_diagnostics_without_gradient);
}

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) { m.impl("feature_diagnostics", feature_diagnostics); }

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) { m.impl("feature_diagnostics", feature_diagnostics); }
#endif

}  // namespace dnkd
