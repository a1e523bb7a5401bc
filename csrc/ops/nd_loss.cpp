#include "ops/nd_loss.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <utility>

#include "common/allocate.h"
#include "common/autograd.h"
#include "common/checks.h"
#include "common/launch.h"
#include "common/operators.h"
#include "common/tensors.h"
#include "ops/nd_arguments.h"

namespace dnkd {
namespace {

using at::Tensor;

// ---------------------------------------------------------------------------------------------
// The operators without autograd.
// ---------------------------------------------------------------------------------------------

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
  TORCH_CHECK(has_stride_1_rows(student) && is_loss_dtype(student.scalar_type()),
              "student_features must be (N, D) with stride-1 features");
  check_row_length(student, "student_features", "features");
  const auto has_student_columns = [&](const Tensor& t) {
    return has_stride_1_rows(t) && t.size(1) == student.size(1);
  };
  TORCH_CHECK(
      has_student_columns(directions) && (directions.scalar_type() == at::kFloat ||
                                          directions.scalar_type() == student.scalar_type()),
      "directions must be (C, D), stride-1, of the student's dtype or float32");
  TORCH_CHECK(target.has_value() || directions.size(0) == student.size(0),
              "directions must have one row per row of student_features");
  TORCH_CHECK(
      !target.has_value() ||
          (target->dim() == 1 && target->size(0) == student.size(0) && target->is_contiguous() &&
           (target->scalar_type() == at::kLong || target->scalar_type() == at::kInt)),
      "target must be (N,) contiguous int64 or int32");
  TORCH_CHECK(!teacher.has_value() ||
                  (has_student_columns(*teacher) && teacher->size(0) == student.size(0) &&
                   teacher->scalar_type() == student.scalar_type()),
              "teacher_features must be (N, D), stride-1, of the student's dtype");
  TORCH_CHECK(
      !per_row.has_value() ||
          (per_row->dim() >= 1 && per_row->size(0) == student.size(0) && per_row->is_contiguous() &&
           per_row->scalar_type() == accumulate_type(student.scalar_type())),
      "row values must be (N, ...) contiguous, of the accumulate type");
}

void check_base(const Tensor& base, const Tensor& student) {
  const auto accumulate = accumulate_type(student.scalar_type());
  TORCH_CHECK(
      base.dim() == 0 && base.scalar_type() == accumulate && base.device() == student.device(),
      "base must be a 0-dim tensor of type ", accumulate, " on ", student.device());
}

// Returns (loss, nd, saved): loss is [N] for reduction 'none', else [], and then added to `base`
// where that is given; nd is the loss without base and weights, undefined without base; saved is
// what the backward pass needs: the gradient (N, D), or two scalars per row (N, 2), or nothing
// (0,).
std::tuple<Tensor, Tensor, Tensor> run_forward(
    const OptionalTensor& base, const Tensor& student, const OptionalTensor& target,
    const Tensor& directions, const OptionalTensor& teacher, const OptionalTensor& teacher_norms,
    const OptionalTensor& weight, double loss_weight, int64_t ignore_index,
    std::string_view reduction_name, double eps, bool needs_gradient) {
  check_kernel_arguments(student, target, directions, teacher, teacher_norms);
  const auto accumulate = accumulate_type(student.scalar_type());
  TORCH_CHECK(!weight.has_value() || (weight->dim() == 0 && weight->scalar_type() == accumulate &&
                                      weight->device() == student.device()),
              "weight must be a 0-dim tensor of the accumulate type on ", student.device());
  const Reduction reduction = to_reduction(reduction_name);
  NdLossParams p{nd_inputs(student, target, directions, teacher, teacher_norms, ignore_index, eps)};
  p.reduction = reduction;
  p.loss_weight = loss_weight;
  p.weight = data_or_null(weight);
  if (p.target != nullptr) {
    check_nd_target(p, *target);
  }
  const auto scalars = student.options().dtype(accumulate);
  Tensor loss =
      reduction == Reduction::kNone ? at::empty({p.rows}, scalars) : at::empty({}, scalars);
  p.loss = loss.mutable_data_ptr();
  Tensor nd, saved;
  if (base.has_value()) {
    check_base(*base, student);
    p.base = base->const_data_ptr();
    nd = at::empty({}, scalars);
    p.nd = nd.mutable_data_ptr();
  }
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
    launch_cuda(student, nd_loss_forward_cuda, nd_loss_scratch_bytes_cuda, p);
    return {std::move(loss), std::move(nd), std::move(saved)};
  }
#endif
  nd_loss_forward_cpu(p);
  return {std::move(loss), std::move(nd), std::move(saved)};
}

// (loss, saved)
std::tuple<Tensor, Tensor> nd_loss_forward(const Tensor& student, const OptionalTensor& target,
                                           const Tensor& directions, const OptionalTensor& teacher,
                                           const OptionalTensor& teacher_norms,
                                           const OptionalTensor& weight, double loss_weight,
                                           int64_t ignore_index, std::string_view reduction,
                                           double eps, bool needs_gradient) {
  auto [loss, nd, saved] =
      run_forward(std::nullopt, student, target, directions, teacher, teacher_norms, weight,
                  loss_weight, ignore_index, reduction, eps, needs_gradient);
  return {std::move(loss), std::move(saved)};
}

// (base + loss, nd, saved)
std::tuple<Tensor, Tensor, Tensor> nd_loss_added_forward(
    const Tensor& base, const Tensor& student, const OptionalTensor& target,
    const Tensor& directions, const OptionalTensor& teacher, const OptionalTensor& teacher_norms,
    const OptionalTensor& weight, double loss_weight, int64_t ignore_index, double eps,
    bool needs_gradient) {
  return run_forward(base, student, target, directions, teacher, teacher_norms, weight, loss_weight,
                     ignore_index, "mean", eps, needs_gradient);
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
    launch_cuda(student, nd_loss_backward_cuda, p);
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
  OptionalTensor base = std::nullopt;  // what the loss is added to, with reduction 'mean'
};

// (loss, nd, saved), see run_forward()
std::tuple<Tensor, Tensor, Tensor> call_forward(const NdArguments& in, const Arguments& a,
                                                bool needs_gradient) {
  if (a.base.has_value()) {
    static const auto added =
        find_operator<decltype(nd_loss_added_forward)>("dnkd_ext::_nd_loss_added_forward");
    return added.call(*a.base, in.student, in.target, in.directions, in.teacher, in.teacher_norms,
                      in.weight, a.loss_weight, a.ignore_index, a.eps, needs_gradient);
  }
  static const auto op = find_operator<decltype(nd_loss_forward)>("dnkd_ext::_nd_loss_forward");
  auto [loss, saved] =
      op.call(in.student, in.target, in.directions, in.teacher, in.teacher_norms, in.weight,
              a.loss_weight, a.ignore_index, a.reduction, a.eps, needs_gradient);
  return {std::move(loss), Tensor(), std::move(saved)};
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

// What both functions below share.
template <typename Function>
class NdFunction : public torch::autograd::Function<Function> {
 protected:
  // The results of call_forward(), with what gradient() needs kept if the student is to have one.
  static std::tuple<Tensor, Tensor, Tensor> run(torch::autograd::AutogradContext* ctx,
                                                const Tensor& student, const Arguments* a) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const NdArguments in = prepare_nd(a->student, a->target, a->class_means, a->teacher_features,
                                      a->teacher_norms, a->weight);
    const bool needs_gradient = student.requires_grad();
    auto results = call_forward(in, *a, needs_gradient);
    if (!needs_gradient) {
      return results;
    }
    const Tensor& saved = std::get<2>(results);
    const bool keeps_mixtures =
        !in.target.has_value() &&
        keeps_coefficients(student.scalar_type(), to_reduction(a->reduction));
    // The features are saved even where the gradient is already formed: changing them in place
    // before backward is then an error, as for PyTorch's own losses.
    ctx->save_for_backward(
        {student, a->target, a->class_means, a->weight.value_or(Tensor()), saved,
         keeps_mixtures ? in.directions : Tensor(),
         saves_through_hooks(a->teacher_features) ? *a->teacher_features : Tensor(),
         saves_through_hooks(a->teacher_norms) ? *a->teacher_norms : Tensor()});
    // The teacher is only needed for second derivatives.
    if (a->teacher_features.has_value() && !saves_through_hooks(a->teacher_features)) {
      ctx->saved_data["teacher_features"] = *a->teacher_features;
    }
    if (a->teacher_norms.has_value() && !saves_through_hooks(a->teacher_norms)) {
      ctx->saved_data["teacher_norms"] = *a->teacher_norms;
    }
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(
        {a->loss_weight, a->ignore_index, std::string(a->reduction), a->eps, teacher_version(*a),
         has_saved_tensor_hooks(), capture_of(student)});
    return results;
  }

  // The student's.
  static Tensor gradient(torch::autograd::AutogradContext* ctx, const Tensor& upstream) {
    const auto variables = ctx->get_saved_variables();
    const Tensor &student = variables[0], &target = variables[1], &class_means = variables[2],
                 &saved = variables[4], &mixtures = variables[5];
    const auto options = ctx->saved_data["options"].toTupleRef().elements().asArrayRef();
    const auto kept = [&](int i, const char* name) {
      return variables[i].defined() ? OptionalTensor(variables[i]) : take_kept(ctx, name);
    };
    const OptionalTensor features = kept(6, "teacher_features"), norms = kept(7, "teacher_norms");
    if (is_differentiated(upstream)) {
      const OptionalTensor weight =
          variables[3].defined() ? OptionalTensor(variables[3]) : std::nullopt;
      const Arguments a{student, target, class_means, features, norms, weight, 0, 0, "", 0};
      const bool is_hooked = variables[6].defined() || variables[7].defined();
      TORCH_CHECK(is_hooked || teacher_version(a) == options[4].toInt(),
                  "the teacher's features or norms were modified by an inplace operation between "
                  "the loss and its second derivative");
      return differentiable_gradient("dnkd_ext::_nd_loss_reference",
                                     {student, target, class_means, features, norms, weight,
                                      options[0], options[1], options[2], options[3]},
                                     student, upstream);
    }
    const Reduction reduction = to_reduction(options[2].toStringRef());
    if (!keeps_coefficients(student.scalar_type(), reduction)) {
      const Tensor gradient =
          chain(saved, upstream, options[5].toBool() || capture_of(saved) != options[6].toInt());
      return student.dim() == 2 ? gradient : gradient.view_symint(student.sym_sizes());
    }
    OptionalTensor labels;
    Tensor directions = mixtures;
    if (!mixtures.defined()) {
      const NdArguments in =
          prepare_nd(student, target, class_means, std::nullopt, std::nullopt, std::nullopt);
      labels = in.target;
      directions = in.directions;
    }
    static const auto op = find_operator<decltype(nd_loss_backward)>("dnkd_ext::_nd_loss_backward");
    const Tensor gradient = op.call(upstream.dim() > 1 ? upstream.reshape({-1}) : upstream,
                                    as_rows(student), labels, directions, saved);
    return gradient.view_symint(student.sym_sizes());
  }
};

class NdLoss : public NdFunction<NdLoss> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        const Arguments* a) {
    return shaped_loss(std::get<0>(run(ctx, student, a)), student);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list upstreams) {
    return {gradient(ctx, upstreams[0]), Tensor()};
  }
};

// Gives base + loss; nd, which nothing is differentiated by, goes past the engine, as the terms of
// LogitLoss do. `base` is that of the arguments, here for the engine to see.
class NdLossAdded : public NdFunction<NdLossAdded> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        const Tensor& base, const Arguments* a, Tensor* nd) {
    // An upstream gradient that never comes is not made zeros.
    ctx->set_materialize_grads(false);
    auto results = run(ctx, student, a);
    *nd = std::move(std::get<1>(results));
    return std::get<0>(results);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list upstreams) {
    const Tensor& upstream = upstreams[0];
    if (upstream.defined() && ctx->needs_input_grad(0)) {
      return {gradient(ctx, upstream), upstream, Tensor(), Tensor()};
    }
    if (is_last_backward()) {
      ctx->saved_data.clear();  // the teacher's tensors among it
    }
    return {Tensor(), upstream, Tensor(), Tensor()};
  }
};

template <Level kLevel>
Tensor nd_loss(const Tensor& student, const Tensor& target, const Tensor& class_means,
               const OptionalTensor& teacher_features, const OptionalTensor& teacher_norms,
               const OptionalTensor& weight, double loss_weight, int64_t ignore_index,
               std::string_view reduction, double eps) {
  check_nd_arguments(student, target, class_means, teacher_features, teacher_norms, weight, eps);
  const Arguments a{student, target,      class_means,  teacher_features, teacher_norms,
                    weight,  loss_weight, ignore_index, reduction,        eps};
  if (has_tangent(student) || has_tangent(weight)) {  // forward-mode differentiation
    return call_reference("dnkd_ext::_nd_loss_reference",
                          {student, target, class_means, teacher_features, teacher_norms, weight,
                           loss_weight, ignore_index, std::string(reduction), eps});
  }
  if (at::GradMode::is_enabled() && student.requires_grad()) {
    return NdLoss::apply(student, &a);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (kLevel == Level::kAutograd && is_traced(student)) {
    static const auto op = find_operator<decltype(nd_loss<kLevel>)>("dnkd_ext::nd_loss");
    return op.call(student, target, class_means, teacher_features, teacher_norms, weight,
                   loss_weight, ignore_index, reduction, eps);
  }
  const NdArguments in =
      prepare_nd(student, target, class_means, teacher_features, teacher_norms, weight);
  return shaped_loss(std::get<0>(call_forward(in, a, /*needs_gradient=*/false)), student);
}

template <Level kLevel>
std::tuple<Tensor, Tensor> nd_loss_added(const Tensor& base, const Tensor& student,
                                         const Tensor& target, const Tensor& class_means,
                                         const OptionalTensor& teacher_features,
                                         const OptionalTensor& teacher_norms,
                                         const OptionalTensor& weight, double loss_weight,
                                         int64_t ignore_index, double eps) {
  check_nd_arguments(student, target, class_means, teacher_features, teacher_norms, weight, eps);
  check_base(base, student);
  const Arguments a{student,       target, class_means, teacher_features,
                    teacher_norms, weight, loss_weight, ignore_index,
                    "mean",        eps,    base};
  const bool is_forward_mode = has_tangent(student) || has_tangent(base) || has_tangent(weight);
  if (!is_forward_mode && at::GradMode::is_enabled() &&
      (student.requires_grad() || base.requires_grad())) {
    Tensor nd;
    Tensor loss = NdLossAdded::apply(student, base, &a, &nd);
    return {std::move(loss), std::move(nd)};
  }
  Tensor sum;
  if (is_forward_mode) {  // the reference's, which has a tangent; nd has none
    sum = base.add(nd_loss<kLevel>(student, target, class_means, teacher_features, teacher_norms,
                                   weight, loss_weight, ignore_index, "mean", eps));
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (kLevel == Level::kAutograd && !is_forward_mode && is_traced(student)) {
    static const auto op =
        find_operator<decltype(nd_loss_added<kLevel>)>("dnkd_ext::_nd_loss_added");
    return op.call(base, student, target, class_means, teacher_features, teacher_norms, weight,
                   loss_weight, ignore_index, eps);
  }
  const NdArguments in =
      prepare_nd(student, target, class_means, teacher_features, teacher_norms, weight);
  auto [loss, nd, saved] = call_forward(in, a, /*needs_gradient=*/false);
  return {std::move(is_forward_mode ? sum : loss), std::move(nd)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  m.def(
      "nd_loss(Tensor student_features, Tensor target, Tensor class_means, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, str reduction, float eps) -> Tensor");
  // (base + nd_loss(..., reduction='mean'), that loss without its weights for logging)
  m.def(
      "_nd_loss_added(Tensor base, Tensor student_features, Tensor target, Tensor class_means, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, float eps) -> (Tensor loss, Tensor nd)");
  m.def(
      "_nd_loss_forward(Tensor student_features, Tensor? target, Tensor directions, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, str reduction, float eps, bool needs_gradient) -> (Tensor, Tensor)");
  m.def(
      "_nd_loss_added_forward(Tensor base, Tensor student_features, Tensor? target, "
      "Tensor directions, Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, "
      "float loss_weight, int ignore_index, float eps, bool needs_gradient) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "_nd_loss_backward(Tensor upstream, Tensor student_features, Tensor? target, "
      "Tensor directions, Tensor coefficients) -> Tensor");
  // Implemented in Python by the reference; the backward pass calls it for create_graph=True.
  m.def(
      "_nd_loss_reference(Tensor student_features, Tensor target, Tensor class_means, "
      "Tensor? teacher_features, Tensor? teacher_norms, Tensor? weight, float loss_weight, "
      "int ignore_index, str reduction, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(dnkd_ext, Autograd, m) {
  m.impl("nd_loss", nd_loss<Level::kAutograd>);
  m.impl("_nd_loss_added", nd_loss_added<Level::kAutograd>);
}

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) {
  m.impl("nd_loss", nd_loss<Level::kBelowAutograd>);
  m.impl("_nd_loss_added", nd_loss_added<Level::kBelowAutograd>);
  m.impl("_nd_loss_forward", nd_loss_forward);
  m.impl("_nd_loss_added_forward", nd_loss_added_forward);
  m.impl("_nd_loss_backward", nd_loss_backward);
}

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) {
  m.impl("nd_loss", nd_loss<Level::kBelowAutograd>);
  m.impl("_nd_loss_added", nd_loss_added<Level::kBelowAutograd>);
  m.impl("_nd_loss_forward", nd_loss_forward);
  m.impl("_nd_loss_added_forward", nd_loss_added_forward);
  m.impl("_nd_loss_backward", nd_loss_backward);
}
#endif

}  // namespace dnkd
