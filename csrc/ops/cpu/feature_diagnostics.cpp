#include "ops/feature_diagnostics.h"

#include <c10/util/SmallVector.h>

#include "common/isa.h"
#include "common/parallel.h"
#include "ops/cpu/nd_rows.h"

#define DNKD_ROWS_FILE "ops/cpu/feature_diagnostics_rows.inc"
#include "common/for_each_isa.h"

namespace dnkd {
namespace {

template <typename Scalar>
void diagnose(const FeatureDiagnosticsParams& p) {
  c10::SmallVector<Scalar, 1024> row_terms;
  row_terms.resize_for_overwrite(4 * p.rows);
  const Isa isa = nd_isa_for(p.dtype, p.columns);
  parallel_rows(p.rows, p.columns, [&](int64_t begin, int64_t end) {
    DNKD_CALL_ISA(isa, feature_diagnostics, p, row_terms.data(), begin, end);
  });
  // In row order whatever the number of threads: the same sums at every run.
  baseline::FeatureSums sums = {};
  for (int64_t i = 0; i < p.rows; ++i) {
    sums.student_norm += static_cast<double>(row_terms[4 * i]);
    sums.teacher_norm += static_cast<double>(row_terms[4 * i + 1]);
    sums.cosine += static_cast<double>(row_terms[4 * i + 2]);
    sums.reached += static_cast<double>(row_terms[4 * i + 3]);
  }
  sums.counted = static_cast<double>(nd_counted_rows(p));
  const bool has_teacher = p.teacher != nullptr || p.teacher_norms != nullptr;
  baseline::feature_result(sums, has_teacher, static_cast<Scalar*>(p.result));
}

}  // namespace

void feature_diagnostics_cpu(const FeatureDiagnosticsParams& p) {
  p.dtype == Dtype::kFloat64 ? diagnose<double>(p) : diagnose<float>(p);
}

}  // namespace dnkd
