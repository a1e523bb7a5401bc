#include "ops/logit_loss.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <string>
#include <utility>

#include "common/allocate.h"
#include "common/autograd.h"
#include "common/checks.h"
#include "common/launch.h"
#include "common/operators.h"
#include "common/tensors.h"

namespace dnkd {
namespace {

using at::Tensor;

// What a call computes: "kd", "dkd", each alone or, as "ce_kd" and "ce_dkd", beside a cross
// entropy.
struct Kind {
  bool has_ce;
  bool decoupled;
  bool has_target() const { return has_ce || decoupled; }
};

Kind to_kind(std::string_view name) {
  const bool has_ce = name.substr(0, 3) == "ce_";
  const std::string_view rest = has_ce ? name.substr(3) : name;
  TORCH_CHECK_VALUE(rest == "kd" || rest == "dkd",
                    "kind must be 'kd', 'ce_kd', 'dkd' or 'ce_dkd', got '", name, "'");
  return {has_ce, rest == "dkd"};
}

// The arguments of the operator. Tensors are kept by the caller.
struct Arguments {
  const Tensor& student;
  const Tensor& teacher;
  const OptionalTensor& target;
  const OptionalTensor& ce_scale;
  const OptionalTensor& kd_scale;
  std::string_view kind;
  double temperature;
  double ce_weight;
  double kd_weight;
  double alpha;
  double beta;
  double label_smoothing;
  int64_t ignore_index;
  std::string_view reduction;
  bool standardize;
};

// ---------------------------------------------------------------------------------------------
// Arguments: checked, then brought to the few types the kernels know.
// ---------------------------------------------------------------------------------------------

void check_target(const Tensor& target, const Tensor& student) {
  check_same_device(target, "target", student, "student_logits");
  if (at::isFloatingType(target.scalar_type())) {
    check_floating(target, "target");
    TORCH_CHECK_VALUE(target.sym_sizes() == student.sym_sizes(),
                      "target of class probabilities must have the shape of student_logits ",
                      shape_of(student), ", got shape ", shape_of(target));
    return;
  }
  check_class_indices(target);
  TORCH_CHECK_VALUE(is_row_shape(target, student),
                    "target of class indices must have the leading shape of student_logits ",
                    shape_of(student), ", got shape ", shape_of(target),
                    "; classes come last, and class probabilities are floating");
}

void check_arguments(const Arguments& a) {
  const Kind kind = to_kind(a.kind);
  check_floating(a.student, "student_logits");
  check_floating(a.teacher, "teacher_logits");
  TORCH_CHECK_VALUE(a.student.dim() >= 1, "student_logits must be (..., C), got a 0-dim tensor");
  const int64_t wanted = kind.decoupled ? 2 : 1;
  TORCH_CHECK_VALUE(a.student.sym_size(-1) >= wanted, "student_logits must have at least ", wanted,
                    wanted == 1 ? " class" : " classes", ", got ", a.student.sym_size(-1));
  check_same_device(a.teacher, "teacher_logits", a.student, "student_logits");
  TORCH_CHECK_VALUE(a.teacher.sym_sizes() == a.student.sym_sizes(),
                    "teacher_logits must have the shape of student_logits ", shape_of(a.student),
                    ", got shape ", shape_of(a.teacher));
  if (kind.has_target()) {
    TORCH_CHECK_TYPE(a.target.has_value(), "target must be a torch.Tensor, got NoneType");
    check_target(*a.target, a.student);
  }
  check_weight(a.ce_scale, "ce_weight", a.student, "student_logits");
  check_weight(a.kd_scale, "kd_weight", a.student, "student_logits");
  TORCH_CHECK_VALUE(std::isfinite(a.temperature) && a.temperature > 0,
                    "temperature must be finite and greater than 0, got ", a.temperature);
  TORCH_CHECK_VALUE(std::isfinite(a.alpha), "alpha must be finite, got ", a.alpha);
  TORCH_CHECK_VALUE(std::isfinite(a.beta), "beta must be finite, got ", a.beta);
  TORCH_CHECK_VALUE(a.label_smoothing >= 0 && a.label_smoothing <= 1,
                    "label_smoothing must be between 0 and 1, got ", a.label_smoothing);
}

// What the kernels take: (N, C) rows of stride-1 logits, (N,) labels.
struct Prepared {
  Tensor student;
  Tensor teacher;                // of the student's dtype or the accumulate type
  OptionalTensor label;          // (N,) int64 or int32
  OptionalTensor probabilities;  // (N, C) accumulate type
};

Prepared prepare(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                 Kind kind) {
  // The casts below are chosen for exactness; autocast has no say in them.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = student.scalar_type();
  const auto accumulate = accumulate_type(type);
  Prepared result;
  result.student = as_rows(student);
  const auto teacher_type = teacher.scalar_type();
  result.teacher = as_rows(
      teacher_type == type || teacher_type == accumulate ? teacher : teacher.to(accumulate));
  if (!kind.has_target()) {
    return result;
  }
  if (!at::isFloatingType(target->scalar_type())) {
    result.label = flat(*target);
    return result;
  }
  if (kind.decoupled) {
    result.label = as_rows(*target).argmax(-1);
  }
  result.probabilities = as_rows(cast(*target, accumulate));
  return result;
}

// ---------------------------------------------------------------------------------------------
// The operators without autograd.
// ---------------------------------------------------------------------------------------------

// These are also reached from exported programs and torch.ops, so they check, too, what would
// otherwise read out of bounds.
void check_kernel_arguments(const Tensor& student, const Tensor& teacher,
                            const OptionalTensor& label, const OptionalTensor& probabilities,
                            Kind kind) {
  const auto accumulate = accumulate_type(student.scalar_type());
  const auto is_like_student = [&](const Tensor& t) {
    return t.device() == student.device() && has_stride_1_rows(t) && t.sizes() == student.sizes();
  };
  TORCH_CHECK(has_stride_1_rows(student) && is_loss_dtype(student.scalar_type()) &&
                  student.size(1) >= (kind.decoupled ? 2 : 1),
              "student_logits must be (N, C) with stride-1 logits");
  check_row_length(student, "student_logits", "classes");
  TORCH_CHECK(is_like_student(teacher) && (teacher.scalar_type() == student.scalar_type() ||
                                           teacher.scalar_type() == accumulate),
              "teacher_logits must be like student_logits, of its dtype or ", accumulate);
  TORCH_CHECK(!label.has_value() ||
                  (label->device() == student.device() && label->dim() == 1 &&
                   label->size(0) == student.size(0) && label->is_contiguous() &&
                   (label->scalar_type() == at::kLong || label->scalar_type() == at::kInt)),
              "labels must be (N,) contiguous int64 or int32 on ", student.device());
  TORCH_CHECK(!probabilities.has_value() ||
                  (is_like_student(*probabilities) && probabilities->scalar_type() == accumulate),
              "probabilities must be like student_logits, of type ", accumulate);
  TORCH_CHECK(!kind.decoupled || label.has_value(), "DKD needs labels");
  TORCH_CHECK(!kind.has_ce || label.has_value() || probabilities.has_value(),
              "the cross entropy needs labels or probabilities");
}

// On the CPU always; elsewhere where asked for, because it synchronises.
void check_labels(const LogitLossParams& p, const Tensor& label) {
  const OptionalTensor on_cpu = target_to_check(label);
  if (!on_cpu.has_value()) {
    return;
  }
  LogitLossParams readable = p;
  readable.label = on_cpu->const_data_ptr();
  const int64_t position = logit_loss_find_bad_label_cpu(readable);
  TORCH_CHECK_INDEX(position < 0, "target[", position, "] = ", (*on_cpu)[position].item<int64_t>(),
                    " is out of range for ", p.columns, " classes");
}

// Returns (loss, ce, kd, saved): the first three are [N] for reduction 'none', else []; saved is
// what the backward pass needs: the gradient (N, C), or scalars per row (N, kLogitCoefficients), or
// nothing (0,).
std::tuple<Tensor, Tensor, Tensor, Tensor> logit_loss_forward(
    const Tensor& student, const Tensor& teacher, const OptionalTensor& label,
    const OptionalTensor& probabilities, const OptionalTensor& ce_scale,
    const OptionalTensor& kd_scale, std::string_view kind_name, double temperature,
    double ce_weight, double kd_weight, double alpha, double beta, double label_smoothing,
    int64_t ignore_index, std::string_view reduction_name, bool logit_standardization,
    bool needs_gradient) {
  const Kind kind = to_kind(kind_name);
  check_kernel_arguments(student, teacher, label, probabilities, kind);
  const auto accumulate = accumulate_type(student.scalar_type());
  for (const OptionalTensor& scale : {ce_scale, kd_scale}) {
    TORCH_CHECK(!scale.has_value() || (scale->dim() == 0 && scale->scalar_type() == accumulate &&
                                       scale->device() == student.device()),
                "weights must be 0-dim tensors of the accumulate type on ", student.device());
  }
  const Reduction reduction = to_reduction(reduction_name);
  LogitLossParams p{};
  p.dtype = to_dtype(student.scalar_type());
  p.teacher_is_wide = teacher.scalar_type() != student.scalar_type();
  p.label_is_int32 = label.has_value() && label->scalar_type() == at::kInt;
  p.has_ce = kind.has_ce;
  p.decoupled = kind.decoupled;
  p.standardize = logit_standardization;
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.ignore_index = ignore_index;
  p.reduction = reduction;
  p.temperature = temperature;
  p.ce_weight = ce_weight;
  p.kd_weight = kd_weight;
  p.alpha = alpha;
  p.beta = beta;
  p.label_smoothing = label_smoothing;
  p.student = student.const_data_ptr();
  p.teacher = teacher.const_data_ptr();
  p.label = data_or_null(label);
  p.probabilities = data_or_null(probabilities);
  p.ce_scale = data_or_null(ce_scale);
  p.kd_scale = data_or_null(kd_scale);
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.stride(0);
  p.probabilities_stride = probabilities.has_value() ? probabilities->stride(0) : 0;
  if (p.label != nullptr) {
    check_labels(p, *label);
  }
  const auto scalars = student.options().dtype(accumulate);
  const auto term = [&] {
    return reduction == Reduction::kNone ? at::empty({p.rows}, scalars) : at::empty({}, scalars);
  };
  Tensor loss = term(), ce = term(), kd = term();
  p.loss = loss.mutable_data_ptr();
  p.ce = ce.mutable_data_ptr();
  p.kd = kd.mutable_data_ptr();
  Tensor saved;
  if (!needs_gradient) {
    saved = at::empty({0}, scalars);
  } else if (keeps_coefficients(student.scalar_type(), reduction)) {
    saved = at::empty({p.rows, kLogitCoefficients}, scalars);
    p.coefficients = saved.mutable_data_ptr();
  } else {
    saved = empty_gradient({p.rows, p.columns}, student.options());
    p.gradient = saved.mutable_data_ptr();
  }
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    launch_cuda(student, logit_loss_forward_cuda, logit_loss_scratch_bytes_cuda, p);
    return {loss, ce, kd, saved};
  }
#endif
  logit_loss_forward_cpu(p);
  return {loss, ce, kd, saved};
}

// upstream: [N] or []; returns the gradient (N, C).
Tensor logit_loss_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                           const OptionalTensor& label, const OptionalTensor& probabilities,
                           const Tensor& coefficients, std::string_view kind_name,
                           double temperature, bool logit_standardization) {
  const Kind kind = to_kind(kind_name);
  check_kernel_arguments(student, teacher, label, probabilities, kind);
  const auto accumulate = accumulate_type(student.scalar_type());
  TORCH_CHECK(
      coefficients.device() == student.device() && coefficients.dim() == 2 &&
          coefficients.size(0) == student.size(0) && coefficients.size(1) == kLogitCoefficients &&
          coefficients.is_contiguous() && coefficients.scalar_type() == accumulate,
      "coefficients must be (N, ", kLogitCoefficients, ") contiguous, of type ", accumulate);
  TORCH_CHECK(
      upstream.device() == student.device() && upstream.scalar_type() == accumulate &&
          (upstream.dim() == 0 || (upstream.dim() == 1 && upstream.size(0) == student.size(0))),
      "upstream must be (N,) or 0-dim, of the accumulate type");
  Tensor gradient = empty_gradient({student.size(0), student.size(1)}, student.options());
  LogitLossBackwardParams p{};
  p.dtype = to_dtype(student.scalar_type());
  p.teacher_is_wide = teacher.scalar_type() != student.scalar_type();
  p.label_is_int32 = label.has_value() && label->scalar_type() == at::kInt;
  p.has_ce = kind.has_ce;
  p.decoupled = kind.decoupled;
  p.standardize = logit_standardization;
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.temperature = temperature;
  p.upstream = upstream.const_data_ptr();
  p.upstream_stride = upstream.dim() == 0 ? 0 : upstream.stride(0);
  p.student = student.const_data_ptr();
  p.teacher = teacher.const_data_ptr();
  p.label = data_or_null(label);
  p.probabilities = data_or_null(probabilities);
  p.coefficients = coefficients.const_data_ptr();
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.stride(0);
  p.probabilities_stride = probabilities.has_value() ? probabilities->stride(0) : 0;
  p.gradient = gradient.mutable_data_ptr();
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    launch_cuda(student, logit_loss_backward_cuda, p);
    return gradient;
  }
#endif
  logit_loss_backward_cpu(p);
  return gradient;
}

// ---------------------------------------------------------------------------------------------
// Autograd.
// ---------------------------------------------------------------------------------------------

using Terms = std::tuple<Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor> call_forward(const Arguments& a, bool needs_gradient) {
  const Prepared in = prepare(a.student, a.teacher, a.target, to_kind(a.kind));
  const auto accumulate = accumulate_type(a.student.scalar_type());
  static const auto op =
      find_operator<decltype(logit_loss_forward)>("dnkd_ext::_logit_loss_forward");
  return op.call(in.student, in.teacher, in.label, in.probabilities, cast(a.ce_scale, accumulate),
                 cast(a.kd_scale, accumulate), a.kind, a.temperature, a.ce_weight, a.kd_weight,
                 a.alpha, a.beta, a.label_smoothing, a.ignore_index, a.reduction, a.standardize,
                 needs_gradient);
}

// A term in the shape the caller sees: that of the rows for reduction 'none'.
Tensor shaped(const Tensor& term, const Tensor& student) {
  return term.dim() == 1 && student.dim() != 2 ? term.reshape_symint(row_shape(student)) : term;
}

// Gives the loss; its terms, which nothing is differentiated by, go past the engine into `terms`.
// As outputs that are marked so, compiled autograd would refuse them.
class LogitLoss : public torch::autograd::Function<LogitLoss> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        const Arguments* a, std::pair<Tensor, Tensor>* terms) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, ce, kd, saved] = call_forward(*a, /*needs_gradient=*/true);
    // The logits are saved even where the gradient is already formed: changing them in place before
    // backward is then an error, as for PyTorch's own losses.
    const bool is_hooked = saves_through_hooks(a->teacher);
    ctx->save_for_backward({student, a->target.value_or(Tensor()), a->ce_scale.value_or(Tensor()),
                            a->kd_scale.value_or(Tensor()), saved,
                            is_hooked ? a->teacher : Tensor()});
    if (!is_hooked) {
      ctx->saved_data["teacher"] = a->teacher;
    }
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(
        {std::string(a->kind), a->temperature, a->ce_weight, a->kd_weight, a->alpha, a->beta,
         a->label_smoothing, a->ignore_index, std::string(a->reduction), a->standardize,
         version_of(a->teacher), has_saved_tensor_hooks(), capture_of(student)});
    // An upstream gradient that never comes is not made zeros.
    ctx->set_materialize_grads(false);
    *terms = {shaped(ce, student), shaped(kd, student)};
    return shaped(loss, student);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list upstreams) {
    const auto variables = ctx->get_saved_variables();
    const Tensor &student = variables[0], &saved = variables[4];
    const auto given = [&](int i) {
      return variables[i].defined() ? OptionalTensor(variables[i]) : std::nullopt;
    };
    const OptionalTensor target = given(1), ce_scale = given(2), kd_scale = given(3);
    const Tensor teacher =
        variables[5].defined() ? variables[5] : take_kept(ctx, "teacher").value();
    const Tensor& upstream = upstreams[0];
    if (!upstream.defined()) {
      return {Tensor(), Tensor(), Tensor()};
    }
    const auto options = ctx->saved_data["options"].toTupleRef().elements().asArrayRef();
    const auto check_teacher = [&] {
      TORCH_CHECK(variables[5].defined() || version_of(teacher) == options[10].toInt(),
                  "the teacher's logits were modified by an inplace operation between the loss "
                  "and its backward");
    };
    if (is_differentiated(upstream)) {
      check_teacher();
      torch::jit::Stack arguments{student, teacher, target, ce_scale, kd_scale};
      arguments.insert(arguments.end(), options.begin(), options.begin() + 10);
      return {differentiable_gradient("dnkd_ext::_logit_loss_reference", std::move(arguments),
                                      student, upstream),
              Tensor(), Tensor()};
    }
    const Reduction reduction = to_reduction(options[8].toStringRef());
    if (!keeps_coefficients(student.scalar_type(), reduction)) {
      const Tensor gradient =
          chain(saved, upstream, options[11].toBool() || capture_of(saved) != options[12].toInt());
      return {student.dim() == 2 ? gradient : gradient.view_symint(student.sym_sizes()), Tensor(),
              Tensor()};
    }
    check_teacher();
    const std::string& kind = options[0].toStringRef();
    const Prepared in = prepare(student, teacher, target, to_kind(kind));
    static const auto op =
        find_operator<decltype(logit_loss_backward)>("dnkd_ext::_logit_loss_backward");
    const Tensor gradient = op.call(upstream.dim() > 1 ? upstream.reshape({-1}) : upstream,
                                    in.student, in.teacher, in.label, in.probabilities, saved, kind,
                                    options[1].toDouble(), options[9].toBool());
    return {gradient.view_symint(student.sym_sizes()), Tensor(), Tensor()};
  }
};

template <Level kLevel>
Terms logit_loss(const Tensor& student, const Tensor& teacher, const OptionalTensor& target,
                 const OptionalTensor& ce_scale, const OptionalTensor& kd_scale,
                 std::string_view kind, double temperature, double ce_weight, double kd_weight,
                 double alpha, double beta, double label_smoothing, int64_t ignore_index,
                 std::string_view reduction, bool logit_standardization) {
  const Arguments a{student, teacher,         target,       ce_scale,  kd_scale,
                    kind,    temperature,     ce_weight,    kd_weight, alpha,
                    beta,    label_smoothing, ignore_index, reduction, logit_standardization};
  check_arguments(a);
  if (has_tangent(student) || has_tangent(ce_scale) ||
      has_tangent(kd_scale)) {  // forward-mode differentiation
    const Tensor loss =
        call_reference("dnkd_ext::_logit_loss_reference",
                       {student, teacher, target, ce_scale, kd_scale, std::string(kind),
                        temperature, ce_weight, kd_weight, alpha, beta, label_smoothing,
                        ignore_index, std::string(reduction), logit_standardization});
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto terms = call_forward(a, /*needs_gradient=*/false);
    return {loss, shaped(std::get<1>(terms), student), shaped(std::get<2>(terms), student)};
  }
  if (at::GradMode::is_enabled() && student.requires_grad()) {
    std::pair<Tensor, Tensor> terms;
    Tensor loss = LogitLoss::apply(student, &a, &terms);
    return {std::move(loss), std::move(terms.first), std::move(terms.second)};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (kLevel == Level::kAutograd && is_traced(student)) {
    static const auto op = find_operator<decltype(logit_loss<kLevel>)>("dnkd_ext::logit_loss");
    return op.call(student, teacher, target, ce_scale, kd_scale, kind, temperature, ce_weight,
                   kd_weight, alpha, beta, label_smoothing, ignore_index, reduction,
                   logit_standardization);
  }
  const auto terms = call_forward(a, /*needs_gradient=*/false);
  return {shaped(std::get<0>(terms), student), shaped(std::get<1>(terms), student),
          shaped(std::get<2>(terms), student)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  m.def(
      "logit_loss(Tensor student_logits, Tensor teacher_logits, Tensor? target, Tensor? ce_scale, "
      "Tensor? kd_scale, str kind, float temperature, float ce_weight, float kd_weight, "
      "float alpha, float beta, float label_smoothing, int ignore_index, str reduction, "
      "bool logit_standardization) -> (Tensor loss, Tensor ce, Tensor kd)");
  m.def(
      "_logit_loss_forward(Tensor student_logits, Tensor teacher_logits, Tensor? labels, "
      "Tensor? probabilities, Tensor? ce_scale, Tensor? kd_scale, str kind, float temperature, "
      "float ce_weight, float kd_weight, float alpha, float beta, float label_smoothing, "
      "int ignore_index, str reduction, bool logit_standardization, bool needs_gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_logit_loss_backward(Tensor upstream, Tensor student_logits, Tensor teacher_logits, "
      "Tensor? labels, Tensor? probabilities, Tensor coefficients, str kind, float temperature, "
      "bool logit_standardization) -> Tensor");
  // Implemented in Python by the reference; the backward pass calls it for create_graph=True.
  m.def(
      "_logit_loss_reference(Tensor student_logits, Tensor teacher_logits, Tensor? target, "
      "Tensor? ce_scale, Tensor? kd_scale, str kind, float temperature, float ce_weight, "
      "float kd_weight, float alpha, float beta, float label_smoothing, int ignore_index, "
      "str reduction, bool logit_standardization) -> Tensor");
}

TORCH_LIBRARY_IMPL(dnkd_ext, Autograd, m) { m.impl("logit_loss", logit_loss<Level::kAutograd>); }

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) {
  m.impl("logit_loss", logit_loss<Level::kBelowAutograd>);
  m.impl("_logit_loss_forward", logit_loss_forward);
  m.impl("_logit_loss_backward", logit_loss_backward);
}

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) {
  m.impl("logit_loss", logit_loss<Level::kBelowAutograd>);
  m.impl("_logit_loss_forward", logit_loss_forward);
  m.impl("_logit_loss_backward", logit_loss_backward);
}
#endif

}  // namespace dnkd
