#include "ops/nd_loss.h"

#include <ATen/Context.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#ifdef DNKD_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <cmath>
#include <string>

#include "common/allocate.h"
#include "common/autograd.h"
#include "common/checks.h"
#include "common/tensors.h"

namespace dnkd {
namespace {

using at::Tensor;

// ---------------------------------------------------------------------------------------------
// Arguments: checked, then brought to the few types the kernels know.
// ---------------------------------------------------------------------------------------------

void check_arguments(const Tensor& student, const Tensor& target, const Tensor& class_means,
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
    TORCH_CHECK_TYPE(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt,
                     "target must hold int64 or int32 class indices or floating class "
                     "probabilities, got ",
                     c10::toString(target.scalar_type()));
    TORCH_CHECK_VALUE(is_row_shape(target, student),
                      "target of class indices must have the leading shape of student_features ",
                      shape_of(student), ", got shape ", shape_of(target));
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
  if (weight.has_value()) {
    check_floating(*weight, "loss_weight");
    check_same_device(*weight, "loss_weight", student, "student_features");
    TORCH_CHECK_VALUE(weight->dim() == 0,
                      "loss_weight must be a float or a 0-dim tensor, got shape ",
                      shape_of(*weight));
    TORCH_CHECK_VALUE(!weight->requires_grad(),
                      "loss_weight must not require a gradient; multiply the loss by it instead");
  }
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, "eps must be finite and not negative, got ",
                    eps);
}

// What the kernels take: rows of stride-1 features, (N, D) and (N,).
struct Prepared {
  Tensor student;
  Tensor directions;             // class means (C, D), or one direction per row (N, D)
  OptionalTensor target;         // (N,) int64 or int32; none: row i takes direction i
  OptionalTensor teacher;        // (N, D)
  OptionalTensor teacher_norms;  // (N,) accumulate type
  OptionalTensor weight;         // [] accumulate type
};

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

Prepared prepare(const Tensor& student, const Tensor& target, const Tensor& class_means,
                 const OptionalTensor& teacher_features, const OptionalTensor& teacher_norms,
                 const OptionalTensor& weight) {
  // The casts below are chosen for exactness; autocast has no say in them.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = student.scalar_type();
  const auto accumulate = accumulate_type(type);
  Prepared result;
  // reshape({-1, D}) has no answer for a tensor without elements and D = 0
  TORCH_CHECK_VALUE(student.sym_size(-1) > 0, "student_features must have at least one feature");
  result.student = as_rows(student);
  if (at::isFloatingType(target.scalar_type())) {
    const at::NoTF32Guard exact;
    // The direction of a mixture of classes: normalise(sum_k p_k c_k), one per row.
    result.directions = cast(as_rows(target), accumulate).matmul(cast(class_means, accumulate));
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
  if (weight.has_value()) {
    result.weight = cast(*weight, accumulate);
  }
  return result;
}

// A float16 gradient formed before the loss scale is known would underflow, and a gradient per row
// has no single upstream value: for these the forward pass keeps two scalars per row instead.
bool keeps_coefficients(at::ScalarType type, Reduction reduction) {
  return type == at::kHalf || reduction == Reduction::kNone;
}

// ---------------------------------------------------------------------------------------------
// The operators without autograd.
// ---------------------------------------------------------------------------------------------

// On the CPU always; elsewhere where asked for, because it synchronises.
void check_target(const NdLossParams& p, const Tensor& target) {
  Tensor on_cpu = target;
  NdLossParams readable = p;
  if (!target.is_cpu()) {
    if (!checks_target_on_device()) {
      return;
    }
    on_cpu = target.cpu();
    readable.target = on_cpu.const_data_ptr();
  }
  const int64_t position = nd_loss_find_bad_target_cpu(readable);
  TORCH_CHECK_INDEX(position < 0, "target[", position, "] = ", on_cpu[position].item<int64_t>(),
                    " is out of range for ", p.classes, " rows of class_means");
}

NdLossParams forward_params(const Tensor& student, const OptionalTensor& target,
                            const Tensor& directions, const OptionalTensor& teacher,
                            const OptionalTensor& teacher_norms, const OptionalTensor& weight,
                            double loss_weight, int64_t ignore_index, Reduction reduction,
                            double eps) {
  NdLossParams p{};
  p.dtype = to_dtype(student.scalar_type());
  p.directions_are_float = directions.scalar_type() == at::kFloat;
  p.target_is_int32 = target.has_value() && target->scalar_type() == at::kInt;
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.classes = directions.size(0);
  p.ignore_index = ignore_index;
  p.reduction = reduction;
  p.eps = eps;
  p.loss_weight = loss_weight;
  p.student = student.const_data_ptr();
  p.teacher = data_or_null(teacher);
  p.teacher_norms = data_or_null(teacher_norms);
  p.directions = directions.const_data_ptr();
  p.target = data_or_null(target);
  p.weight = data_or_null(weight);
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.has_value() ? teacher->stride(0) : 0;
  p.directions_stride = directions.stride(0);
  return p;
}

// These operators are also reached from exported programs and torch.ops, so they check, too, what
// would otherwise read out of bounds.
void check_kernel_arguments(const Tensor& student, const OptionalTensor& target,
                            const Tensor& directions, const OptionalTensor& teacher,
                            const OptionalTensor& per_row) {
  const auto is_here = [&](const OptionalTensor& t) {
    return !t.has_value() || t->device() == student.device();
  };
  TORCH_CHECK(is_here(target) && is_here(directions) && is_here(teacher) && is_here(per_row),
              "all tensors must be on ", student.device());
  const auto is_matrix = [&](const Tensor& t) {
    // Strides mean nothing where there is one column or no row.
    return t.dim() == 2 && t.size(1) == student.size(1) &&
           (t.stride(1) == 1 || t.size(1) == 1 || t.size(0) == 0);
  };
  TORCH_CHECK(student.dim() == 2 && is_matrix(student) && is_loss_dtype(student.scalar_type()),
              "student_features must be (N, D) with stride-1 features");
  TORCH_CHECK(student.is_cpu() || student.size(1) < (int64_t{1} << 31),
              "student_features on a GPU must have fewer than 2^31 features");
  TORCH_CHECK(is_matrix(directions) && (directions.scalar_type() == at::kFloat ||
                                        directions.scalar_type() == student.scalar_type()),
              "directions must be (C, D), stride-1, of the student's dtype or float32");
  TORCH_CHECK(target.has_value() || directions.size(0) == student.size(0),
              "directions must have one row per row of student_features");
  TORCH_CHECK(
      !target.has_value() ||
          (target->dim() == 1 && target->size(0) == student.size(0) && target->is_contiguous() &&
           (target->scalar_type() == at::kLong || target->scalar_type() == at::kInt)),
      "target must be (N,) contiguous int64 or int32");
  TORCH_CHECK(!teacher.has_value() || (is_matrix(*teacher) && teacher->size(0) == student.size(0) &&
                                       teacher->scalar_type() == student.scalar_type()),
              "teacher_features must be (N, D), stride-1, of the student's dtype");
  TORCH_CHECK(
      !per_row.has_value() ||
          (per_row->dim() >= 1 && per_row->size(0) == student.size(0) && per_row->is_contiguous() &&
           per_row->scalar_type() == accumulate_type(student.scalar_type())),
      "row values must be (N, ...) contiguous, of the accumulate type");
}

// Returns (loss, saved): loss is [N] for reduction 'none', else []; saved is what the backward pass
// needs: the gradient (N, D), or two scalars per row (N, 2), or nothing (0,).
std::tuple<Tensor, Tensor> nd_loss_forward(const Tensor& student, const OptionalTensor& target,
                                           const Tensor& directions, const OptionalTensor& teacher,
                                           const OptionalTensor& teacher_norms,
                                           const OptionalTensor& weight, double loss_weight,
                                           int64_t ignore_index, std::string_view reduction_name,
                                           double eps, bool needs_gradient) {
  check_kernel_arguments(student, target, directions, teacher, teacher_norms);
  const auto accumulate = accumulate_type(student.scalar_type());
  TORCH_CHECK(!weight.has_value() || (weight->dim() == 0 && weight->scalar_type() == accumulate &&
                                      weight->device() == student.device()),
              "weight must be a 0-dim tensor of the accumulate type on ", student.device());
  const Reduction reduction = to_reduction(reduction_name);
  NdLossParams p = forward_params(student, target, directions, teacher, teacher_norms, weight,
                                  loss_weight, ignore_index, reduction, eps);
  if (p.target != nullptr) {
    check_target(p, *target);
  }
  const auto scalars = student.options().dtype(accumulate);
  Tensor loss =
      reduction == Reduction::kNone ? at::empty({p.rows}, scalars) : at::empty({}, scalars);
  p.loss = loss.mutable_data_ptr();
  Tensor saved;
  if (!needs_gradient) {
    saved = at::empty({0}, scalars);
  } else if (keeps_coefficients(student.scalar_type(), reduction)) {
    saved = at::empty({p.rows, 2}, scalars);
    p.coefficients = saved.mutable_data_ptr();
  } else {
    saved = empty_gradient({p.rows, p.columns}, student.options());
    p.gradient = saved.mutable_data_ptr();
  }
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    const c10::cuda::CUDAGuard device(student.device());
    const Tensor scratch =
        at::empty({nd_loss_scratch_bytes_cuda(p)}, student.options().dtype(at::kByte));
    C10_CUDA_CHECK(static_cast<cudaError_t>(nd_loss_forward_cuda(
        p, scratch.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream().stream())));
    return {loss, saved};
  }
#endif
  nd_loss_forward_cpu(p);
  return {loss, saved};
}

// upstream: [N] or []; returns the gradient (N, D).
Tensor nd_loss_backward(const Tensor& upstream, const Tensor& student, const OptionalTensor& target,
                        const Tensor& directions, const Tensor& coefficients) {
  check_kernel_arguments(student, target, directions, std::nullopt, coefficients);
  TORCH_CHECK(coefficients.dim() == 2 && coefficients.size(1) == 2, "coefficients must be (N, 2)");
  TORCH_CHECK(
      upstream.device() == student.device() &&
          upstream.scalar_type() == accumulate_type(student.scalar_type()) &&
          (upstream.dim() == 0 || (upstream.dim() == 1 && upstream.size(0) == student.size(0))),
      "upstream must be (N,) or 0-dim, of the accumulate type");
  Tensor gradient = empty_gradient({student.size(0), student.size(1)}, student.options());
  NdLossBackwardParams p{};
  p.dtype = to_dtype(student.scalar_type());
  p.directions_are_float = directions.scalar_type() == at::kFloat;
  p.target_is_int32 = target.has_value() && target->scalar_type() == at::kInt;
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.classes = directions.size(0);
  p.upstream = upstream.const_data_ptr();
  p.upstream_stride = upstream.dim() == 0 ? 0 : upstream.stride(0);
  p.student = student.const_data_ptr();
  p.directions = directions.const_data_ptr();
  p.target = data_or_null(target);
  p.coefficients = coefficients.const_data_ptr();
  p.student_stride = student.stride(0);
  p.directions_stride = directions.stride(0);
  p.gradient = gradient.mutable_data_ptr();
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    const c10::cuda::CUDAGuard device(student.device());
    C10_CUDA_CHECK(static_cast<cudaError_t>(
        nd_loss_backward_cuda(p, c10::cuda::getCurrentCUDAStream().stream())));
    return gradient;
  }
#endif
  nd_loss_backward_cpu(p);
  return gradient;
}

// ---------------------------------------------------------------------------------------------
// Autograd.
// ---------------------------------------------------------------------------------------------

struct Arguments {
  const Tensor& student;
  const Tensor& target;
  const Tensor& class_means;
  const OptionalTensor& teacher_features;
  const OptionalTensor& teacher_norms;
  const OptionalTensor& weight;
  double loss_weight;
  int64_t ignore_index;
  std::string_view reduction;
  double eps;
};

std::tuple<Tensor, Tensor> call_forward(const Prepared& in, const Arguments& a,
                                        bool needs_gradient) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("dnkd_ext::_nd_loss_forward", "")
                             .typed<decltype(nd_loss_forward)>();
  return op.call(in.student, in.target, in.directions, in.teacher, in.teacher_norms, in.weight,
                 a.loss_weight, a.ignore_index, a.reduction, a.eps, needs_gradient);
}

// The loss in the shape the caller sees: that of the rows for reduction 'none'.
Tensor shaped_loss(const Tensor& loss, const Tensor& student) {
  return loss.dim() == 1 && student.dim() != 2 ? loss.reshape_symint(row_shape(student)) : loss;
}

// Tells whether the teacher was overwritten.
int64_t teacher_version(const Arguments& a) {
  const Tensor teacher = a.teacher_features.value_or(a.teacher_norms.value_or(Tensor()));
  return version_of(teacher);
}

class NdLoss : public torch::autograd::Function<NdLoss> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        const Arguments* a) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Prepared in = prepare(a->student, a->target, a->class_means, a->teacher_features,
                                a->teacher_norms, a->weight);
    auto [loss, saved] = call_forward(in, *a, /*needs_gradient=*/true);
    const bool keeps_mixtures =
        !in.target.has_value() &&
        keeps_coefficients(student.scalar_type(), to_reduction(a->reduction));
    // The features are saved even where the gradient is already formed: changing them in place
    // before backward is then an error, as for PyTorch's own losses.
    ctx->save_for_backward({student, a->target, a->class_means, a->weight.value_or(Tensor()), saved,
                            keeps_mixtures ? in.directions : Tensor()});
    // The teacher is only needed for second derivatives. It may be an inference tensor, and may be
    // overwritten before backward.
    if (a->teacher_features.has_value()) {
      ctx->saved_data["teacher_features"] = *a->teacher_features;
    }
    if (a->teacher_norms.has_value()) {
      ctx->saved_data["teacher_norms"] = *a->teacher_norms;
    }
    ctx->saved_data["options"] =
        c10::ivalue::Tuple::create({a->loss_weight, a->ignore_index, std::string(a->reduction),
                                    a->eps, teacher_version(*a), has_saved_tensor_hooks()});
    return shaped_loss(loss, student);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list upstreams) {
    const auto variables = ctx->get_saved_variables();
    const Tensor &student = variables[0], &target = variables[1], &class_means = variables[2],
                 &saved = variables[4], &mixtures = variables[5];
    const Tensor& upstream = upstreams[0];
    const auto options = ctx->saved_data["options"].toTupleRef().elements().asArrayRef();
    if (at::GradMode::is_enabled()) {
      const auto kept = [&](const char* name) {
        const auto found = ctx->saved_data.find(name);
        return found == ctx->saved_data.end() ? OptionalTensor()
                                              : OptionalTensor(found->second.toTensor());
      };
      const OptionalTensor features = kept("teacher_features"), norms = kept("teacher_norms");
      const OptionalTensor weight =
          variables[3].defined() ? OptionalTensor(variables[3]) : std::nullopt;
      const Arguments a{student, target, class_means, features, norms, weight, 0, 0, "", 0};
      TORCH_CHECK(teacher_version(a) == options[4].toInt(),
                  "the teacher's features or norms were modified by an inplace operation between "
                  "the loss and its second derivative");
      const Tensor gradient =
          differentiable_gradient("dnkd_ext::_nd_loss_reference",
                                  {student, target, class_means, features, norms, weight,
                                   options[0], options[1], options[2], options[3]},
                                  student, upstream);
      return {gradient, Tensor()};
    }
    const Reduction reduction = to_reduction(options[2].toStringRef());
    if (!keeps_coefficients(student.scalar_type(), reduction)) {
      const Tensor gradient = chain(saved, upstream, options[5].toBool());
      return {student.dim() == 2 ? gradient : gradient.view_symint(student.sym_sizes()), Tensor()};
    }
    OptionalTensor labels;
    Tensor directions = mixtures;
    if (!mixtures.defined()) {
      const Prepared in =
          prepare(student, target, class_means, std::nullopt, std::nullopt, std::nullopt);
      labels = in.target;
      directions = in.directions;
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("dnkd_ext::_nd_loss_backward", "")
                               .typed<decltype(nd_loss_backward)>();
    const Tensor gradient = op.call(upstream.dim() > 1 ? upstream.reshape({-1}) : upstream,
                                    as_rows(student), labels, directions, saved);
    return {gradient.view_symint(student.sym_sizes()), Tensor()};
  }
};

Tensor nd_loss_autograd(const Tensor& student, const Tensor& target, const Tensor& class_means,
                        const OptionalTensor& teacher_features, const OptionalTensor& teacher_norms,
                        const OptionalTensor& weight, double loss_weight, int64_t ignore_index,
                        std::string_view reduction, double eps) {
  check_arguments(student, target, class_means, teacher_features, teacher_norms, weight, eps);
  const Arguments a{student, target,      class_means,  teacher_features, teacher_norms,
                    weight,  loss_weight, ignore_index, reduction,        eps};
  if (student._fw_grad(/*level=*/0).defined()) {  // forward-mode differentiation
    torch::jit::Stack arguments{
        student, target,      class_means,  teacher_features,       teacher_norms,
        weight,  loss_weight, ignore_index, std::string(reduction), eps};
    c10::Dispatcher::singleton()
        .findSchemaOrThrow("dnkd_ext::_nd_loss_reference", "")
        .callBoxed(arguments);
    return arguments.at(0).toTensor();
  }
  if (at::GradMode::is_enabled() && student.requires_grad()) {
    return NdLoss::apply(student, &a);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const Prepared in =
      prepare(student, target, class_means, teacher_features, teacher_norms, weight);
  return shaped_loss(std::get<0>(call_forward(in, a, /*needs_gradient=*/false)), student);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  m.def(
      "nd_loss(Tensor student_features, Tensor target, Tensor class_means, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, str reduction, float eps) -> Tensor");
  m.def(
      "_nd_loss_forward(Tensor student_features, Tensor? target, Tensor directions, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, str reduction, float eps, bool needs_gradient) -> (Tensor, Tensor)");
  m.def(
      "_nd_loss_backward(Tensor upstream, Tensor student_features, Tensor? target, "
      "Tensor directions, Tensor coefficients) -> Tensor");
  // Implemented in Python by the reference; the backward pass calls it for create_graph=True.
  m.def(
      "_nd_loss_reference(Tensor student_features, Tensor target, Tensor class_means, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, str reduction, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(dnkd_ext, Autograd, m) { m.impl("nd_loss", nd_loss_autograd); }

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) {
  m.impl("nd_loss", nd_loss_autograd);
  m.impl("_nd_loss_forward", nd_loss_forward);
  m.impl("_nd_loss_backward", nd_loss_backward);
}

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) {
  m.impl("nd_loss", nd_loss_autograd);
  m.impl("_nd_loss_forward", nd_loss_forward);
  m.impl("_nd_loss_backward", nd_loss_backward);
}
#endif

}  // namespace dnkd
