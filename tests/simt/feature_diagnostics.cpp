// Runs the launcher of the feature diagnostics; see harness.h.
#define DNKD_WITH_CUDA
#include "ops/cuda/feature_diagnostics.cu"

#include "harness.h"

namespace {

void feature_diagnostics() {
  FeatureDiagnosticsParams p{};
  p.dtype = static_cast<Dtype>(integer("dtype"));
  p.directions_are_float = integer("directions_are_float") != 0;
  p.target_is_int32 = integer("target") == 32;
  p.rows = integer("rows");
  p.columns = integer("columns");
  p.classes = integer("classes");
  p.ignore_index = integer("ignore_index");
  p.eps = number("eps");
  p.student_stride = p.teacher_stride = p.directions_stride = integer("stride");
  const int64_t size = size_of(p.dtype);
  const int64_t scalar = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t shift = integer("shift");
  const int64_t features = span(p.rows, p.columns, p.student_stride);

  Array student(features, size, shift), teacher(features, size, shift), norms(p.rows, scalar, 0);
  Array directions(span(p.classes, p.columns, p.directions_stride),
                   p.directions_are_float ? 4 : size, shift);
  Array target(p.rows, p.target_is_int32 ? 4 : 8, 0), result(3, scalar, 0);

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
  p.classes += integer("phantom_classes");  // to see that reading behind the table is caught
  p.result = result.data();
  Array scratch(feature_diagnostics_scratch_bytes_cuda(p), 1, 0);
  check(feature_diagnostics_cuda(p, scratch.data(), nullptr));
  result.write();
}

}  // namespace

int main() { return run({{"feature_diagnostics", feature_diagnostics}}); }
