#include "ops/dist_loss.h"

#include <cmath>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"

namespace dnkd {

// Columns that are summed together; a multiple of every vector's lanes.
constexpr int64_t kDistTile = 128;

}  // namespace dnkd

#define DNKD_ROWS_FILE "ops/cpu/dist_loss_rows.inc"
#include "common/for_each_isa.h"

namespace dnkd {
namespace {

// Tasks into which the sums over columns are split whatever the number of threads.
constexpr int64_t kColumnTasks = 64;
constexpr int64_t kRowsPerTask = 256;
constexpr int64_t kColumnsPerSum = 1024;
// An exponential costs more than the reading that parallel_rows reckons with.
constexpr int64_t kCost = 4;

// Time of one thread with AVX-512 over that with AVX2, on an AMD EPYC (Zen 4), measured before the
// loops by which AVX2 takes 30 % less:
//   float32   1.0 at 128 x 100, 0.83 at 512 x 1000 and 32 x 21841
//   bfloat16  0.94, 0.76, 0.69
//   float64   1.08, 1.01, 1.04
Isa isa_for(Dtype dtype) { return active_isa(/*gains_from_avx512=*/dtype != Dtype::kFloat64); }

void sum_columns(const DistLossMomentsParams& p, Isa isa) {
  const int64_t tiles = (p.columns + kDistTile - 1) / kDistTile;
  // Where there are few columns, rows are split as well, and the parts added in order.
  const int64_t most = std::max<int64_t>(1, kColumnTasks / tiles);
  const int64_t parts = std::clamp<int64_t>(p.rows / kRowsPerTask, 1, most);
  const int64_t step = (p.rows + parts - 1) / parts;
  const int64_t size = kDistMoments * p.columns;
  std::vector<double> others((parts - 1) * size);
  parallel_rows(tiles * parts, kCost * kDistTile * step, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / tiles, column = task % tiles * kDistTile;
      double* out = part == 0 ? p.moments : others.data() + (part - 1) * size;
      const int64_t first = std::min(part * step, p.rows), last = std::min(first + step, p.rows);
      DNKD_CALL_ISA(isa, dist_columns, p, first, last, column,
                    std::min(kDistTile, p.columns - column), out);
    }
  });
  for (int64_t part = 1; part < parts; ++part) {
    const double* other = others.data() + (part - 1) * size;
    for (int64_t j = 0; j < size; ++j) {
      p.moments[j] += other[j];
    }
  }
  p.moments[size] = static_cast<double>(p.rows);
}

template <typename Scalar>
void finish(const DistLossFinishParams& p) {
  const auto* row_values = static_cast<const Scalar*>(p.row_values);
  auto* column_values = static_cast<Scalar*>(p.column_values);
  const double all_rows = p.moments[kDistMoments * p.columns];
  const double weight = -p.tau * p.gamma * p.processes / static_cast<double>(p.columns);
  double row_sum = 0, column_sum = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    row_sum += static_cast<double>(row_values[i * kDistRowValues + 6]);
  }
  const int64_t blocks = (p.columns + kColumnsPerSum - 1) / kColumnsPerSum;
  std::vector<double> sums(blocks);
  parallel_rows(blocks, kCost * kColumnsPerSum, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min((block + 1) * kColumnsPerSum, p.columns);
      for (int64_t j = block * kColumnsPerSum; j < last; ++j) {
        const auto column = baseline::dist_column(p.moments, p.columns, j, std::max(all_rows, 1.0),
                                                  sizeof(Scalar) == sizeof(double));
        sums[block] += column.terms.rho;
        if (column_values != nullptr) {
          column_values[j] = static_cast<Scalar>(weight * column.terms.cross);
          column_values[p.columns + j] = static_cast<Scalar>(weight * column.terms.own);
          column_values[2 * p.columns + j] = static_cast<Scalar>(column.student_mean);
          column_values[3 * p.columns + j] = static_cast<Scalar>(column.teacher_mean);
        }
      }
    }
  });
  for (double sum : sums) {
    column_sum += sum;
  }
  *static_cast<Scalar*>(p.loss) = static_cast<Scalar>(
      baseline::dist_total(row_sum, column_sum, static_cast<double>(p.rows), all_rows,
                           static_cast<double>(p.columns), p.beta, p.gamma, p.tau));
}

}  // namespace

void dist_loss_moments_cpu(const DistLossMomentsParams& p) {
  const Isa isa = isa_for(p.dtype);
  parallel_rows(p.rows, kCost * p.columns,
                [&](int64_t begin, int64_t end) { DNKD_CALL_ISA(isa, dist_rows, p, begin, end); });
  sum_columns(p, isa);
}

void dist_loss_finish_cpu(const DistLossFinishParams& p) {
  p.is_double ? finish<double>(p) : finish<float>(p);
}

void dist_loss_backward_cpu(const DistLossBackwardParams& p) {
  const Isa isa = isa_for(p.dtype);
  const int64_t padded = (p.columns + kDistTile - 1) / kDistTile * kDistTile;
  parallel_rows(p.rows, kCost * p.columns, [&](int64_t begin, int64_t end) {
    // Probabilities and slopes of one row.
    const std::unique_ptr<double[]> scratch(
        new double[p.dtype == Dtype::kFloat64 ? 2 * padded : padded]);
    DNKD_CALL_ISA(isa, dist_gradient, p, scratch.get(), begin, end);
  });
}

}  // namespace dnkd
