// Runs the launchers of the DIST loss; see harness.h.
#define DNKD_WITH_CUDA
#include "ops/cuda/dist_loss.cu"

#include "harness.h"

namespace {

void dist_loss() {
  DistLossMomentsParams p{};
  p.dtype = static_cast<Dtype>(integer("dtype"));
  p.teacher_is_wide = integer("teacher_is_wide") != 0;
  p.rows = integer("rows");
  p.columns = integer("columns");
  p.tau = number("tau");
  p.student_stride = p.teacher_stride = integer("stride");
  const int64_t size = size_of(p.dtype);
  const int64_t scalar = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t shift = integer("shift");
  const int64_t logits = span(p.rows, p.columns, p.student_stride);
  const int64_t sums = kDistMoments * p.columns + 1;

  Array student(logits, size, shift), teacher(logits, p.teacher_is_wide ? scalar : size, shift);
  Array upstream(1, scalar, 0), row_values(p.rows * kDistRowValues, scalar, 0);
  Array moments(sums, 8, 0), column_values(kDistColumnValues * p.columns, scalar, 0);
  Array loss(1, scalar, 0), gradient(p.rows * p.columns, size, 0);
  p.student = student.read();
  p.teacher = teacher.read();
  upstream.read();
  p.row_values = row_values.data();
  DistLossFinishParams f{};
  f.is_double = p.dtype == Dtype::kFloat64;
  f.rows = p.rows;
  f.columns = p.columns;
  f.beta = number("beta");
  f.gamma = number("gamma");
  f.tau = p.tau;
  f.row_values = p.row_values;
  f.loss = loss.data();
  const bool needs_gradient = integer("needs_gradient") != 0;
  f.column_values = needs_gradient ? column_values.data() : nullptr;
  const int64_t processes = integer("processes");
  if (processes == 0) {  // moments and finish in one
    f.processes = 1;
    Array scratch(dist_loss_forward_scratch_bytes_cuda(p), 1, 0);
    check(dist_loss_forward_cuda(p, f, scratch.data(), nullptr));
  } else {
    p.moments = static_cast<double*>(moments.data());
    Array moments_scratch(dist_loss_forward_scratch_bytes_cuda(p), 1, 0);
    check(dist_loss_moments_cuda(p, moments_scratch.data(), nullptr));
    // As an all-reduce over processes with this same batch would leave them.
    for (int64_t j = 0; j < sums; ++j) {
      p.moments[j] *= static_cast<double>(processes);
    }
    f.processes = static_cast<double>(processes);
    f.moments = p.moments;
    Array finish_scratch(dist_loss_finish_scratch_bytes_cuda(f), 1, 0);
    check(dist_loss_finish_cuda(f, finish_scratch.data(), nullptr));
  }
  loss.write();
  if (!needs_gradient) {
    return;
  }
  DistLossBackwardParams b{};
  b.dtype = p.dtype;
  b.teacher_is_wide = p.teacher_is_wide;
  b.rows = p.rows;
  b.columns = p.columns;
  b.beta = f.beta;
  b.tau = p.tau;
  b.upstream = upstream.data();
  b.student = p.student;
  b.teacher = p.teacher;
  b.row_values = p.row_values;
  b.column_values = f.column_values;
  b.student_stride = p.student_stride;
  b.teacher_stride = p.teacher_stride;
  b.gradient = gradient.data();
  check(dist_loss_backward_cuda(b, nullptr));
  gradient.write();
}

}  // namespace

int main() { return run({{"dist_loss", dist_loss}}); }
