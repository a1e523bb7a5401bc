// Runs the launchers of the losses on logits; see harness.h.
#define DNKD_WITH_CUDA
#include "ops/cuda/logit_loss.cu"

#include "harness.h"

namespace {

void logit_loss() {
  LogitLossParams p{};
  p.dtype = static_cast<Dtype>(integer("dtype"));
  p.teacher_is_wide = integer("teacher_is_wide") != 0;
  p.label_is_int32 = integer("label") == 32;
  p.has_ce = integer("has_ce") != 0;
  p.decoupled = integer("decoupled") != 0;
  p.standardize = integer("standardize") != 0;
  p.rows = integer("rows");
  p.columns = integer("columns");
  p.ignore_index = integer("ignore_index");
  p.reduction = static_cast<Reduction>(integer("reduction"));
  p.temperature = number("temperature");
  p.ce_weight = number("ce_weight");
  p.kd_weight = number("kd_weight");
  p.alpha = number("alpha");
  p.beta = number("beta");
  p.label_smoothing = number("label_smoothing");
  p.student_stride = integer("stride");
  p.teacher_stride = integer("teacher_stride");
  p.probabilities_stride = integer("probabilities_stride");
  const int64_t size = size_of(p.dtype);
  const int64_t scalar = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t shift = integer("shift");
  const bool is_none = p.reduction == Reduction::kNone;
  const auto logits = [&](int64_t stride) { return span(p.rows, p.columns, stride); };

  Array student(logits(p.student_stride), size, shift);
  Array teacher(logits(p.teacher_stride), p.teacher_is_wide ? scalar : size,
                integer("teacher_shift"));
  Array label(p.rows, p.label_is_int32 ? 4 : 8, 0);
  Array probabilities(logits(p.probabilities_stride), scalar, integer("probabilities_shift"));
  Array ce_scale(1, scalar, 0), kd_scale(1, scalar, 0), upstream(p.rows, scalar, 0);
  const int64_t terms = is_none ? p.rows : 1;
  Array loss(terms, scalar, 0), ce(terms, scalar, 0), kd(terms, scalar, 0);
  Array gradient(p.rows * p.columns, size, 0);
  Array coefficients(kLogitCoefficients * p.rows, scalar, 0);

  p.student = student.read();
  p.teacher = teacher.read();
  if (integer("label") != 0) {
    p.label = label.read();
  }
  if (integer("probabilities") != 0) {
    p.probabilities = probabilities.read();
  }
  if (integer("scale_tensors") != 0) {
    p.ce_scale = ce_scale.read();
    p.kd_scale = kd_scale.read();
  }
  p.columns += integer("phantom_classes");  // to see that reading behind the logits is caught
  p.loss = loss.data();
  p.ce = ce.data();
  p.kd = kd.data();
  const bool keeps_coefficients = integer("saves") == 2;
  if (integer("saves") == 1) {
    p.gradient = gradient.data();
  } else if (keeps_coefficients) {
    p.coefficients = coefficients.data();
  }
  Array scratch(logit_loss_scratch_bytes_cuda(p), 1, 0);
  check(logit_loss_forward_cuda(p, scratch.data(), nullptr));
  loss.write();
  ce.write();
  kd.write();
  if (keeps_coefficients) {
    LogitLossBackwardParams b{};
    b.dtype = p.dtype;
    b.teacher_is_wide = p.teacher_is_wide;
    b.label_is_int32 = p.label_is_int32;
    b.has_ce = p.has_ce;
    b.decoupled = p.decoupled;
    b.standardize = p.standardize;
    b.rows = p.rows;
    b.columns = p.columns;
    b.temperature = p.temperature;
    b.upstream = upstream.read();
    b.upstream_stride = is_none ? 1 : 0;
    b.student = p.student;
    b.teacher = p.teacher;
    b.label = p.label;
    b.probabilities = p.probabilities;
    b.coefficients = p.coefficients;
    b.student_stride = p.student_stride;
    b.teacher_stride = p.teacher_stride;
    b.probabilities_stride = p.probabilities_stride;
    b.gradient = gradient.data();
    check(logit_loss_backward_cuda(b, nullptr));
  }
  if (integer("saves") != 0) {
    gradient.write();
  }
}

}  // namespace

int main() { return run({{"logit_loss", logit_loss}}); }
