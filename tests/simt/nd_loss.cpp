// Runs the launchers of the ND loss; see harness.h.
#define DNKD_WITH_CUDA
#include "ops/cuda/nd_loss.cu"

#include "common/scale.cu"
#include "harness.h"

namespace {

void nd_loss() {
  NdLossParams p{};
  p.dtype = static_cast<Dtype>(integer("dtype"));
  p.directions_are_float = integer("directions_are_float") != 0;
  p.target_is_int32 = integer("target") == 32;
  p.rows = integer("rows");
  p.columns = integer("columns");
  p.classes = integer("classes");
  p.ignore_index = integer("ignore_index");
  p.reduction = static_cast<Reduction>(integer("reduction"));
  p.eps = number("eps");
  p.loss_weight = number("loss_weight");
  p.student_stride = p.teacher_stride = integer("stride");
  p.directions_stride = integer("directions_stride");
  const int64_t size = size_of(p.dtype);
  const int64_t scalar = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t shift = integer("shift");
  const bool is_none = p.reduction == Reduction::kNone;
  const int64_t features = span(p.rows, p.columns, p.student_stride);

  Array student(features, size, shift), teacher(features, size, shift), norms(p.rows, scalar, 0);
  Array directions(span(p.classes, p.columns, p.directions_stride),
                   p.directions_are_float ? 4 : size, shift);
  Array target(p.rows, p.target_is_int32 ? 4 : 8, 0), weight(1, scalar, 0),
      upstream(p.rows, scalar, 0), base(1, scalar, 0), nd(1, scalar, 0);
  Array loss(is_none ? p.rows : 1, scalar, 0), gradient(p.rows * p.columns, size, 0),
      coefficients(2 * p.rows, scalar, 0);

  p.student = student.read();
  if (integer("teacher") == 1) {
    p.teacher = teacher.read();
  } else if (integer("teacher") == 2) {
    p.teacher_norms = norms.read();
  }
  p.directions = directions.read();
  if (integer("target") != 0) {
    p.target = target.read();
  }
  if (integer("weight_tensor") != 0) {
    p.weight = weight.read();
  }
  if (integer("base") != 0) {
    p.base = base.read();
    p.nd = nd.data();
  }
  p.classes += integer("phantom_classes");  // to see that reading behind the table is caught
  p.loss = loss.data();
  const bool keeps_coefficients = integer("saves") == 2;
  if (integer("saves") == 1) {
    p.gradient = gradient.data();
  } else if (keeps_coefficients) {
    p.coefficients = coefficients.data();
  }
  Array scratch(nd_loss_scratch_bytes_cuda(p), 1, 0);
  check(nd_loss_forward_cuda(p, scratch.data(), nullptr));
  loss.write();
  if (keeps_coefficients) {
    NdLossBackwardParams b{};
    b.dtype = p.dtype;
    b.directions_are_float = p.directions_are_float;
    b.target_is_int32 = p.target_is_int32;
    b.rows = p.rows;
    b.columns = p.columns;
    b.classes = p.classes;
    b.upstream = upstream.read();
    b.upstream_stride = is_none ? 1 : 0;
    b.student = p.student;
    b.directions = p.directions;
    b.target = p.target;
    b.coefficients = p.coefficients;
    b.student_stride = p.student_stride;
    b.directions_stride = p.directions_stride;
    b.gradient = gradient.data();
    check(nd_loss_backward_cuda(b, nullptr));
  }
  if (integer("saves") != 0) {
    gradient.write();
  }
  if (p.nd != nullptr) {
    nd.write();
  }
}

void scale() {
  const auto dtype = static_cast<Dtype>(integer("dtype"));
  const int64_t count = integer("count");
  Array gradient(count, size_of(dtype), 0), upstream(1, dtype == Dtype::kFloat64 ? 8 : 4, 0);
  gradient.read();
  upstream.read();
  check(scale_cuda(dtype, count, gradient.data(), upstream.data(), nullptr));
  gradient.write();
}

}  // namespace

int main() { return run({{"nd_loss", nd_loss}, {"scale", scale}}); }
