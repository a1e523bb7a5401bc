#include "ops/dist_loss.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>

#include "common/allocate.h"
#include "common/autograd.h"
#include "common/checks.h"
#include "common/launch.h"
#include "common/operators.h"
#include "common/tensors.h"

namespace dnkd {
namespace {

using at::Tensor;

// ---------------------------------------------------------------------------------------------
// Arguments: checked, then brought to the few types the kernels know.
// ---------------------------------------------------------------------------------------------

struct Arguments {
  const Tensor& student;
  const Tensor& teacher;
  // What _dist_loss_moments returned, the moments added over processes; none: those of this batch.
  const OptionalTensor& rows;
  const OptionalTensor& moments;
  double beta;
  double gamma;
  double tau;
  int64_t processes;
};

void check_arguments(const Arguments& a) {
  check_floating(a.student, "student_logits");
  check_floating(a.teacher, "teacher_logits");
  TORCH_CHECK_VALUE(a.student.dim() >= 1, "student_logits must be (..., C), got a 0-dim tensor");
  TORCH_CHECK_VALUE(a.student.sym_size(-1) > 0, "student_logits must have at least 1 class, got 0");
  check_same_device(a.teacher, "teacher_logits", a.student, "student_logits");
  TORCH_CHECK_VALUE(a.teacher.sym_sizes() == a.student.sym_sizes(),
                    "teacher_logits must have the shape of student_logits ", shape_of(a.student),
                    ", got shape ", shape_of(a.teacher));
  TORCH_CHECK_VALUE(std::isfinite(a.beta), "beta must be finite, got ", a.beta);
  TORCH_CHECK_VALUE(std::isfinite(a.gamma), "gamma must be finite, got ", a.gamma);
  TORCH_CHECK_VALUE(std::isfinite(a.tau) && a.tau > 0,
                    "tau must be finite and greater than 0, got ", a.tau);
  TORCH_CHECK(a.rows.has_value() == a.moments.has_value(),
              "rows and moments must be given together");
  TORCH_CHECK(a.processes >= 1, "processes must be at least 1, got ", a.processes);
}

// What the kernels take: rows of stride-1 logits (N, C), the teacher's of the student's dtype or
// the accumulate type.
struct Prepared {
  Tensor student;
  Tensor teacher;
};

Prepared prepare(const Tensor& student, const Tensor& teacher) {
  // The cast is chosen for exactness; autocast has no say in it.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto accumulate = accumulate_type(student.scalar_type());
  const bool readable =
      teacher.scalar_type() == student.scalar_type() || teacher.scalar_type() == accumulate;
  return {as_rows(student), as_rows(readable ? teacher : teacher.to(accumulate))};
}

// ---------------------------------------------------------------------------------------------
// The operators without autograd.
// ---------------------------------------------------------------------------------------------

// These operators are also reached from exported programs and torch.ops, so they check, too, what
// would otherwise read out of bounds.
void check_kernel_logits(const Tensor& student, const Tensor& teacher, double tau) {
  TORCH_CHECK(
      has_stride_1_rows(student) && student.size(1) > 0 && is_loss_dtype(student.scalar_type()),
      "student_logits must be (N, C) with stride-1 logits");
  check_row_length(student, "student_logits", "classes");
  TORCH_CHECK(has_stride_1_rows(teacher) && teacher.sizes() == student.sizes() &&
                  teacher.device() == student.device() &&
                  (teacher.scalar_type() == student.scalar_type() ||
                   teacher.scalar_type() == accumulate_type(student.scalar_type())),
              "teacher_logits must be (N, C), stride-1, of the student's dtype or the accumulate "
              "type, on ",
              student.device());
  TORCH_CHECK_VALUE(std::isfinite(tau) && tau > 0, "tau must be finite and greater than 0, got ",
                    tau);
}

void check_rows(const Tensor& rows) {
  TORCH_CHECK(rows.dim() == 2 && rows.size(1) == kDistRowValues && rows.is_contiguous() &&
                  (rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kDouble),
              "rows must be (N, ", kDistRowValues, ") contiguous, of the accumulate type");
}

DistLossMomentsParams moments_params(const Tensor& student, const Tensor& teacher, double tau,
                                     const Tensor& rows) {
  DistLossMomentsParams p{};
  p.dtype = to_dtype(student.scalar_type());
  p.teacher_is_wide = teacher.scalar_type() != student.scalar_type();
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.tau = tau;
  p.student = student.const_data_ptr();
  p.teacher = teacher.const_data_ptr();
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.stride(0);
  p.row_values = rows.mutable_data_ptr();
  return p;
}

Tensor empty_rows(const Tensor& student) {
  return at::empty({student.size(0), kDistRowValues},
                   student.options().dtype(accumulate_type(student.scalar_type())));
}

Tensor empty_moments(const Tensor& like, int64_t columns) {
  return at::empty({kDistMoments * columns + 1}, like.options().dtype(at::kDouble));
}

// Returns (rows, moments): [N, kDistRowValues] accumulate type, [kDistMoments * C + 1] float64.
// Moments of several batches add up to those of all of them.
std::tuple<Tensor, Tensor> dist_loss_moments(const Tensor& student, const Tensor& teacher,
                                             double tau) {
  check_kernel_logits(student, teacher, tau);
  Tensor rows = empty_rows(student);
  Tensor moments = empty_moments(student, student.size(1));
  DistLossMomentsParams p = moments_params(student, teacher, tau, rows);
  p.moments = moments.mutable_data_ptr<double>();
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    launch_cuda(student, dist_loss_moments_cuda, dist_loss_forward_scratch_bytes_cuda, p);
    return {rows, moments};
  }
#endif
  dist_loss_moments_cpu(p);
  return {rows, moments};
}

// The loss, and what the gradient takes of the columns: [kDistColumnValues, C] or, where no
// gradient is needed, [0].
struct Finish {
  DistLossFinishParams params;
  Tensor loss;
  Tensor columns;
};

Finish prepare_finish(const Tensor& rows, int64_t columns, double beta, double gamma, double tau,
                      int64_t processes, bool needs_gradient) {
  Finish finish{};
  DistLossFinishParams& p = finish.params;
  p.is_double = rows.scalar_type() == at::kDouble;
  p.rows = rows.size(0);
  p.columns = columns;
  p.beta = beta;
  p.gamma = gamma;
  p.tau = tau;
  p.processes = static_cast<double>(processes);
  p.row_values = rows.const_data_ptr();
  finish.loss = at::empty({}, rows.options());
  p.loss = finish.loss.mutable_data_ptr();
  if (needs_gradient) {
    finish.columns = at::empty({kDistColumnValues, p.columns}, rows.options());
    p.column_values = finish.columns.mutable_data_ptr();
  } else {
    finish.columns = at::empty({0}, rows.options());
  }
  return finish;
}

// Returns (loss, columns); see Finish.
std::tuple<Tensor, Tensor> dist_loss_finish(const Tensor& rows, const Tensor& moments, double beta,
                                            double gamma, double tau, int64_t processes,
                                            bool needs_gradient) {
  check_rows(rows);
  TORCH_CHECK(moments.dim() == 1 && moments.size(0) > 1 &&
                  (moments.size(0) - 1) % kDistMoments == 0 && moments.is_contiguous() &&
                  moments.scalar_type() == at::kDouble && moments.device() == rows.device(),
              "moments must be (", kDistMoments, " C + 1,) contiguous float64 on ", rows.device());
  Finish finish = prepare_finish(rows, (moments.size(0) - 1) / kDistMoments, beta, gamma, tau,
                                 processes, needs_gradient);
  DistLossFinishParams& p = finish.params;
  p.moments = moments.const_data_ptr<double>();
#ifdef DNKD_WITH_CUDA
  if (rows.is_cuda()) {
    launch_cuda(rows, dist_loss_finish_cuda, dist_loss_finish_scratch_bytes_cuda, p);
    return {finish.loss, finish.columns};
  }
#endif
  dist_loss_finish_cpu(p);
  return {finish.loss, finish.columns};
}

// The two steps in one, for the rows of this process alone. Returns (loss, rows, columns).
std::tuple<Tensor, Tensor, Tensor> dist_loss_forward(const Tensor& student, const Tensor& teacher,
                                                     double beta, double gamma, double tau,
                                                     bool needs_gradient) {
  check_kernel_logits(student, teacher, tau);
  const Tensor rows = empty_rows(student);
  DistLossMomentsParams p = moments_params(student, teacher, tau, rows);
  Finish finish =
      prepare_finish(rows, p.columns, beta, gamma, tau, /*processes=*/1, needs_gradient);
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    const auto launch = [&](const DistLossMomentsParams& moments, void* scratch, void* stream) {
      return dist_loss_forward_cuda(moments, finish.params, scratch, stream);
    };
    launch_cuda(student, launch, dist_loss_forward_scratch_bytes_cuda, p);
    return {finish.loss, rows, finish.columns};
  }
#endif
  const Tensor moments = empty_moments(student, p.columns);
  p.moments = moments.mutable_data_ptr<double>();
  finish.params.moments = p.moments;
  dist_loss_moments_cpu(p);
  dist_loss_finish_cpu(finish.params);
  return {finish.loss, rows, finish.columns};
}

// upstream: []; returns the gradient (N, C).
Tensor dist_loss_backward(const Tensor& upstream, const Tensor& student, const Tensor& teacher,
                          const Tensor& rows, const Tensor& columns, double beta, double tau) {
  check_kernel_logits(student, teacher, tau);
  check_rows(rows);
  const auto accumulate = accumulate_type(student.scalar_type());
  TORCH_CHECK(rows.size(0) == student.size(0) && rows.scalar_type() == accumulate &&
                  rows.device() == student.device(),
              "rows must have one row per row of student_logits, of the accumulate type, on ",
              student.device());
  TORCH_CHECK(columns.dim() == 2 && columns.size(0) == kDistColumnValues &&
                  columns.size(1) == student.size(1) && columns.is_contiguous() &&
                  columns.scalar_type() == accumulate && columns.device() == student.device(),
              "columns must be (", kDistColumnValues,
              ", C) contiguous, of the accumulate type, on ", student.device());
  TORCH_CHECK(upstream.dim() == 0 && upstream.scalar_type() == accumulate &&
                  upstream.device() == student.device(),
              "upstream must be 0-dim, of the accumulate type, on ", student.device());
  Tensor gradient = empty_gradient({student.size(0), student.size(1)}, student.options());
  DistLossBackwardParams p{};
  p.dtype = to_dtype(student.scalar_type());
  p.teacher_is_wide = teacher.scalar_type() != student.scalar_type();
  p.rows = student.size(0);
  p.columns = student.size(1);
  p.beta = beta;
  p.tau = tau;
  p.upstream = upstream.const_data_ptr();
  p.student = student.const_data_ptr();
  p.teacher = teacher.const_data_ptr();
  p.row_values = rows.const_data_ptr();
  p.column_values = columns.const_data_ptr();
  p.student_stride = student.stride(0);
  p.teacher_stride = teacher.stride(0);
  p.gradient = gradient.mutable_data_ptr();
#ifdef DNKD_WITH_CUDA
  if (student.is_cuda()) {
    launch_cuda(student, dist_loss_backward_cuda, p);
    return gradient;
  }
#endif
  dist_loss_backward_cpu(p);
  return gradient;
}

// ---------------------------------------------------------------------------------------------
// Autograd.
// ---------------------------------------------------------------------------------------------

struct Forward {
  Tensor loss;
  Tensor rows;
  Tensor columns;
};

Forward call_forward(const Prepared& in, const Arguments& a, bool needs_gradient) {
  if (a.rows.has_value()) {
    static const auto finish =
        find_operator<decltype(dist_loss_finish)>("dnkd_ext::_dist_loss_finish");
    auto [loss, columns] =
        finish.call(*a.rows, *a.moments, a.beta, a.gamma, a.tau, a.processes, needs_gradient);
    return {loss, *a.rows, columns};
  }
  static const auto forward =
      find_operator<decltype(dist_loss_forward)>("dnkd_ext::_dist_loss_forward");
  auto [loss, rows, columns] =
      forward.call(in.student, in.teacher, a.beta, a.gamma, a.tau, needs_gradient);
  return {loss, rows, columns};
}

class DistLoss : public torch::autograd::Function<DistLoss> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        const Arguments* a) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Prepared in = prepare(student, a->teacher);
    const Forward result = call_forward(in, *a, /*needs_gradient=*/true);
    // Itself, not the rows formed of it, unless those are a converted copy: only itself counts how
    // often it is overwritten.
    const bool is_converted = in.teacher.scalar_type() != a->teacher.scalar_type();
    const Tensor& kept = is_converted ? in.teacher : a->teacher;
    const bool is_hooked = saves_through_hooks(kept);
    ctx->save_for_backward({student, result.rows, result.columns, is_hooked ? kept : Tensor()});
    if (!is_hooked) {
      ctx->saved_data["teacher"] = kept;
    }
    ctx->saved_data["options"] = c10::ivalue::Tuple::create(
        {a->beta, a->gamma, a->tau, version_of(kept), a->rows.has_value()});
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list upstreams) {
    const auto variables = ctx->get_saved_variables();
    const Tensor &student = variables[0], &rows = variables[1], &columns = variables[2];
    const Tensor teacher =
        variables[3].defined() ? variables[3] : take_kept(ctx, "teacher").value();
    const auto options = ctx->saved_data["options"].toTupleRef().elements().asArrayRef();
    const double beta = options[0].toDouble(), tau = options[2].toDouble();
    TORCH_CHECK(variables[3].defined() || version_of(teacher) == options[3].toInt(),
                "teacher_logits were modified by an inplace operation between the loss and its "
                "gradient");
    if (is_differentiated(upstreams[0])) {
      TORCH_CHECK(!options[4].toBool(),
                  "dist_loss with a process_group has no second derivative, which would need the "
                  "rows of all processes; call backward without create_graph=True");
      return {differentiable_gradient(
                  "dnkd_ext::_dist_loss_reference",
                  {student, teacher.reshape_symint(student.sym_sizes()), beta, options[1], tau},
                  student, upstreams[0]),
              Tensor()};
    }
    static const auto op =
        find_operator<decltype(dist_loss_backward)>("dnkd_ext::_dist_loss_backward");
    const Tensor gradient =
        op.call(upstreams[0], as_rows(student), as_rows(teacher), rows, columns, beta, tau);
    return {student.dim() == 2 ? gradient : gradient.view_symint(student.sym_sizes()), Tensor()};
  }
};

template <Level kLevel>
Tensor dist_loss(const Tensor& student, const Tensor& teacher, const OptionalTensor& rows,
                 const OptionalTensor& moments, double beta, double gamma, double tau,
                 int64_t processes) {
  const Arguments a{student, teacher, rows, moments, beta, gamma, tau, processes};
  check_arguments(a);
  if (has_tangent(student)) {  // forward-mode differentiation
    TORCH_CHECK(!rows.has_value(), "dist_loss with a process_group has no forward-mode derivative");
    return call_reference("dnkd_ext::_dist_loss_reference", {student, teacher, beta, gamma, tau});
  }
  if (at::GradMode::is_enabled() && student.requires_grad()) {
    return DistLoss::apply(student, &a);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (kLevel == Level::kAutograd && is_traced(student)) {
    static const auto op = find_operator<decltype(dist_loss<kLevel>)>("dnkd_ext::dist_loss");
    return op.call(student, teacher, rows, moments, beta, gamma, tau, processes);
  }
  return call_forward(prepare(student, teacher), a, /*needs_gradient=*/false).loss;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dnkd_ext, m) {
  m.def(
      "dist_loss(Tensor student_logits, Tensor teacher_logits, Tensor? rows, Tensor? moments, "
      "float beta, float gamma, float tau, int processes) -> Tensor");
  m.def(
      "_dist_loss_forward(Tensor student_logits, Tensor teacher_logits, float beta, float gamma, "
      "float tau, bool needs_gradient) -> (Tensor, Tensor, Tensor)");
  m.def(
      "_dist_loss_moments(Tensor student_logits, Tensor teacher_logits, float tau) -> "
      "(Tensor, Tensor)");
  m.def(
      "_dist_loss_finish(Tensor rows, Tensor moments, float beta, float gamma, float tau, "
      "int processes, bool needs_gradient) -> (Tensor, Tensor)");
  m.def(
      "_dist_loss_backward(Tensor upstream, Tensor student_logits, Tensor teacher_logits, "
      "Tensor rows, Tensor columns, float beta, float tau) -> Tensor");
  // Implemented in Python by the reference; the backward pass calls it for create_graph=True.
  m.def(
      "_dist_loss_reference(Tensor student_logits, Tensor teacher_logits, float beta, float gamma, "
      "float tau) -> Tensor");
}

TORCH_LIBRARY_IMPL(dnkd_ext, Autograd, m) { m.impl("dist_loss", dist_loss<Level::kAutograd>); }

TORCH_LIBRARY_IMPL(dnkd_ext, CPU, m) {
  m.impl("dist_loss", dist_loss<Level::kBelowAutograd>);
  m.impl("_dist_loss_forward", dist_loss_forward);
  m.impl("_dist_loss_moments", dist_loss_moments);
  m.impl("_dist_loss_finish", dist_loss_finish);
  m.impl("_dist_loss_backward", dist_loss_backward);
}

#ifdef DNKD_WITH_CUDA
TORCH_LIBRARY_IMPL(dnkd_ext, CUDA, m) {
  m.impl("dist_loss", dist_loss<Level::kBelowAutograd>);
  m.impl("_dist_loss_forward", dist_loss_forward);
  m.impl("_dist_loss_moments", dist_loss_moments);
  m.impl("_dist_loss_finish", dist_loss_finish);
  m.impl("_dist_loss_backward", dist_loss_backward);
}
#endif

}  // namespace dnkd
