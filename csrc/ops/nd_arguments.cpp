#include "ops/nd_arguments.h"

#include <ATen/Context.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "common/checks.h"
#include "common/operators.h"

namespace dnkd {

using at::Tensor;

void check_nd_arguments(const Tensor& student, const Tensor& target, const Tensor& class_means,
                        const OptionalTensor& teacher_features, const OptionalTensor& teacher_norms,
                        const OptionalTensor& weight, double eps) {
  check_floating(student, "student_features");
  check_floating(class_means, "class_means");
  TORCH_CHECK_VALUE(student.dim() >= 1, "student_features must be (..., D), got a 0-dim tensor");
  TORCH_CHECK_VALUE(class_means.dim() == 2, "class_means must be (C, D), got shape ",
                    shape_of(class_means));
  TORCH_CHECK_VALUE(class_means.sym_size(0) > 0, "class_means must have at least one class");
  TORCH_CHECK_VALUE(class_means.sym_size(1) == student.sym_size(-1), "class_means is ",
                    class_means.sym_size(1), " wide but student_features is ", student.sym_size(-1),
                    " wide; project the student's features to the width of the class means");
  check_same_device(class_means, "class_means", student, "student_features");
  check_same_device(target, "target", student, "student_features");
  if (at::isFloatingType(target.scalar_type())) {
    check_floating(target, "target");
    TORCH_CHECK_VALUE(
        target.dim() == student.dim() &&
            target.sym_sizes().slice(0, target.dim() - 1) == row_shape(student) &&
            target.sym_size(-1) == class_means.sym_size(0),
        "target of class probabilities must be (..., C) with C = ", class_means.sym_size(0),
        " classes and the leading shape of student_features ", shape_of(student), ", got shape ",
        shape_of(target));
  } else {
    check_class_indices(target);
    TORCH_CHECK_VALUE(is_row_shape(target, student),
                      "target of class indices must have the leading shape of student_features ",
                      shape_of(student), ", got shape ", shape_of(target),
                      "; class probabilities are floating");
  }
  TORCH_CHECK_VALUE(!teacher_features.has_value() || !teacher_norms.has_value(),
                    "teacher_features and teacher_norms were both given; pass one of them");
  if (teacher_features.has_value()) {
    check_floating(*teacher_features, "teacher_features");
    check_same_device(*teacher_features, "teacher_features", student, "student_features");
    TORCH_CHECK_VALUE(
        teacher_features->dim() == student.dim() &&
            teacher_features->sym_sizes().slice(0, student.dim() - 1) == row_shape(student),
        "teacher_features must have the leading shape of student_features ", shape_of(student),
        ", got shape ", shape_of(*teacher_features));
  }
  if (teacher_norms.has_value()) {
    check_floating(*teacher_norms, "teacher_norms");
    check_same_device(*teacher_norms, "teacher_norms", student, "student_features");
    TORCH_CHECK_VALUE(is_row_shape(*teacher_norms, student),
                      "teacher_norms must have the leading shape of student_features ",
                      shape_of(student), ", got shape ", shape_of(*teacher_norms));
  }
  check_weight(weight, "loss_weight", student, "student_features");
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative, got ",
                    eps);
}

namespace {

// The norms of features in another dtype or width than the student's, without a copy of them: cast
// whole, they would take N x D more memory.
Tensor norms_of(const Tensor& features, at::ScalarType accumulate) {
  const auto widest = features.scalar_type() == at::kDouble ? at::kDouble : accumulate;
  const auto norms = [&](const Tensor& rows) {
    return at::linalg_vector_norm(rows, 2, {-1}, false, widest);
  };
  const bool is_traced = at::isTensorSubclassLike(features);  // the compiler fuses the cast
  const int64_t block = features.is_cpu() ? int64_t{1} << 18 : int64_t{1} << 24;
  if (is_traced || features.scalar_type() == widest || features.numel() <= block) {
    return flat(cast(norms(features), accumulate));
  }
  const Tensor rows = as_rows(features);
  const int64_t step = std::max<int64_t>(1, block / rows.size(1));
  Tensor result = at::empty({rows.size(0)}, features.options().dtype(accumulate));
  for (int64_t begin = 0; begin < rows.size(0); begin += step) {
    const int64_t count = std::min(step, rows.size(0) - begin);
    result.narrow(0, begin, count).copy_(norms(rows.narrow(0, begin, count)));
  }
  return result;
}

// The direction of mixtures of classes, normalise(sum_k p_k c_k), before it is normalised. An
// operator, because a matrix product in a compiled graph would be run without the guard.
Tensor nd_mixtures(const Tensor& target, const Tensor& class_means) {
  const at::NoTF32Guard exact;
  return target.matmul(class_means);
}

}  // namespace

NdArguments prepare_nd(const Tensor& student, const Tensor& target, const Tensor& class_means,
                       const OptionalTensor& teacher_features, const OptionalTensor& teacher_norms,
                       const OptionalTensor& weight) {
  // The casts below are chosen for exactness; autocast has no say in them.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = student.scalar_type();
  const auto accumulate = accumulate_type(type);
  NdArguments result;
  // reshape({-1, D}) has no answer for a tensor without elements and D = 0
  TORCH_CHECK_VALUE(student.sym_size(-1) > 0, "student_features must have at least one feature");
  result.student = as_rows(student);
  if (at::isFloatingType(target.scalar_type())) {
    static const auto op =
        find_operator<Tensor(const Tensor&, const Tensor&)>("dnkd_ext::_nd_mixtures");
    result.directions = op.call(cast(as_rows(target), accumulate), cast(class_means, accumulate));
  } else {
    result.target = flat(target);
    const auto means_type = class_means.scalar_type();
    const bool readable = means_type == type || means_type == at::kFloat;
    result.directions = as_rows(readable ? class_means : cast(class_means, accumulate));
  }
  if (teacher_features.has_value()) {
    if (teacher_features->scalar_type() == type &&
        teacher_features->sym_size(-1) == student.sym_size(-1)) {
      result.teacher = as_rows(*teacher_features);
    } else {
      result.teacher_norms = norms_of(*teacher_features, accumulate);
    }
  }
  if (teacher_norms.has_value()) {
    result.teacher_norms = flat(cast(*teacher_norms, accumulate));
  }
  result.weight = cast(weight, accumulate);
  return result;
}

NdInputs nd_inputs(const Tensor& student, const OptionalTensor& target, const Tensor& directions,
                   const OptionalTensor& teacher, const OptionalTensor& teacher_norms,
                   int64_t ignore_index, double eps) {
  NdInputs p{};
  p.dtype = to_dtype(student.scalar_type());
  p.directions_are_float = directions.scalar_type() == at::kFloat;
  p.target_is_int32 = target.has_value() && target->scalar_type() == at::kInt;
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.classes = directions.size(0);
  p.ignore_index = ignore_index;
  p.eps = eps;
  p.student = student.const_data_ptr();
  p.teacher = data_or_null(teacher);
  p.teacher_norms = data_or_null(teacher_norms);
  p.directions = directions.const_data_ptr();
  p.target = data_or_null(target);
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.has_value() ? teacher->stride(0) : 0;
  p.directions_stride = directions.stride(0);
  return p;
}

void check_nd_target(const NdInputs& p, const Tensor& target) {
  const OptionalTensor on_cpu = target_to_check(target);
  if (!on_cpu.has_value()) {
    return;
  }
  NdInputs readable = p;
  readable.target = on_cpu->const_data_ptr();
  const int64_t position = nd_loss_find_bad_target_cpu(readable);
  TORCH_CHECK_INDEX(position < 0, "target[", position, "] = ", (*on_cpu)[position].item<int64_t>(),
                    " is out of range for ", p.classes, " rows of class_means");
}

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  // (target (N, C), class_means (C, D)) -> (N, D), all of the accumulate type
  m.def("_nd_mixtures(Tensor target, Tensor class_means) -> Tensor");
}

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) { m.impl("_nd_mixtures", nd_mixtures); }

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) { m.impl("_nd_mixtures", nd_mixtures); }
#endif

}  // namespace dnkd
