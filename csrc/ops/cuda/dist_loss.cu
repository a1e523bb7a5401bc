#include <type_traits>

#include "common/device.cuh"
#include "ops/dist_loss.h"

namespace dnkd {
namespace {

#include "ops/dist_loss_terms.inc"

// A row is read by a warp while it fits in the warp's registers, otherwise by a block.
constexpr int kBlock = 128;
// 16-byte vectors of a row of the student that each thread keeps in registers between its passes,
// and as many elements of the teacher's; what is beyond is read again.
template <typename S>
constexpr int kKept = sizeof(S) == 4 ? 4 : 2;
// Blocks per multiprocessor that the compiler makes room for: as many as need no spilling.
constexpr int kMinBlocks = 4;
constexpr int kMinColumnBlocks = 3;
constexpr int kWarps = kBlock / kWarpSize;

// Sums of the correlations, by who formed them.
struct DistSums {
  double* rows;     // [row_sums]
  double* columns;  // [column_sums]
  int row_sums;
  int column_sums;
};

// Device scratch of a forward pass.
struct DistScratch {
  unsigned* tickets;  // [tiles + 1] blocks that have finished of each tile, tiles that have
  double* partial;    // [tiles, parts, kDistMoments, columns of a tile]
  DistSums sums;      // by kThreads threads of the rows kernel; by tile
};

// -- rows ----------------------------------------------------------------------------------------

DNKD_INLINE float lowest(float) { return -3.402823466e+38f; }
DNKD_INLINE double lowest(double) { return -1.7976931348623157e+308; }

// One row of the student's and the teacher's logits, read by kThreads threads of which this is
// `lane`: the first kKept<S> vectors from registers.
template <typename S, typename T, int kVec, int kThreads>
struct RowOfBoth {
  const S* student;
  const T* teacher;
  int vectors;
  int lane;
  Pack<S, kVec> kept_student[kKept<S>];
  Pack<T, kVec> kept_teacher[kKept<S>];

  // All loads of the kept part are under way before the first is used.
  DNKD_INLINE void keep() {
#pragma unroll
    for (int k = 0; k < kKept<S>; ++k) {
      const int v = lane + k * kThreads;
      if (v < vectors) {
        kept_student[k] = load_pack<S, kVec>(student + static_cast<int64_t>(v) * kVec);
        kept_teacher[k] = load_pack<T, kVec>(teacher + static_cast<int64_t>(v) * kVec);
      }
    }
  }

  // Calls body(student vector, teacher vector, first column) for this thread's vectors.
  template <typename Body>
  DNKD_INLINE void for_each(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kKept<S>; ++k) {
      const int v = lane + k * kThreads;
      if (v < vectors) {
        body(kept_student[k], kept_teacher[k], static_cast<int64_t>(v) * kVec);
      }
    }
    for (int v = lane + kKept<S> * kThreads; v < vectors; v += kThreads) {
      const int64_t column = static_cast<int64_t>(v) * kVec;
      body(load_pack<S, kVec>(student + column), load_pack<T, kVec>(teacher + column), column);
    }
  }
};

// Largest value and sum of exponentials relative to it, of a vector more.
template <typename T, int kVec, typename A>
DNKD_INLINE void add_exponentials(const Pack<T, kVec>& pack, A units, A& largest, A& sum) {
  A most = largest;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    most = larger(most, static_cast<A>(pack[i]));
  }
  if (most > largest) {
    sum *= exp_of_units((largest - most) * units);
    largest = most;
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    sum += exp_of_units((static_cast<A>(pack[i]) - largest) * units);
  }
}

template <typename S, typename T, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    dist_loss_rows_kernel(const __grid_constant__ DistLossMomentsParams p,
                          const __grid_constant__ DistScratch scratch) {
  using A = typename Accumulate<S>::type;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  __shared__ A maxima[2][2][kThreads / kWarpSize];
  __shared__ A sums[2][2][kThreads / kWarpSize];
  __shared__ A deviations[2][5][kThreads / kWarpSize];
  const A units = static_cast<A>(Exponent<A>::kPerNatural / p.tau);
  const A columns = static_cast<A>(p.columns);
  int maxima_turn = 0, sums_turn = 0, deviations_turn = 0;
  if (blockIdx.x == 0) {  // the columns kernel runs later
    for (int i = threadIdx.x; i <= scratch.sums.column_sums; i += kBlock) {
      scratch.tickets[i] = 0;
    }
  }
  RowOfBoth<S, T, kVec, kThreads> both;
  both.vectors = static_cast<int>(p.columns / kVec);
  both.lane = threadIdx.x % kThreads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    both.student = static_cast<const S*>(p.student) + row * p.student_stride;
    both.teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    both.keep();
    // Finite, so that the difference to a logit of -inf is not NaN.
    A largest[2] = {lowest(A()), lowest(A())};
    A sum[2] = {0, 0};
    both.for_each([&](const Pack<S, kVec>& s, const Pack<T, kVec>& t, int64_t) {
      add_exponentials(s, units, largest[0], sum[0]);
      add_exponentials(t, units, largest[1], sum[1]);
    });
    const A own[2] = {largest[0], largest[1]};
    row_largest<kThreads>(largest, maxima, maxima_turn);
    sum[0] *= exp_of_units((own[0] - largest[0]) * units);
    sum[1] *= exp_of_units((own[1] - largest[1]) * units);
    row_sum<kThreads>(sum, sums, sums_turn);
    // Squares and product of the deviations from the mean, and what rounding left of the mean.
    const A student_mean = sum[0] / columns, teacher_mean = sum[1] / columns;
    A deviation[5] = {0, 0, 0, 0, 0};
    both.for_each([&](const Pack<S, kVec>& s, const Pack<T, kVec>& t, int64_t) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const A a = exp_of_units((static_cast<A>(s[i]) - largest[0]) * units) - student_mean;
        const A b = exp_of_units((static_cast<A>(t[i]) - largest[1]) * units) - teacher_mean;
        deviation[0] += a * a;
        deviation[1] += b * b;
        deviation[2] += a * b;
        deviation[3] += a;
        deviation[4] += b;
      }
    });
    row_sum<kThreads>(deviation, deviations, deviations_turn);
    if (both.lane == 0) {
      constexpr bool kIsDouble = sizeof(A) == sizeof(double);
      const double count = static_cast<double>(p.columns);
      const double s_error = deviation[3] / count, t_error = deviation[4] / count;
      const double s_mean = student_mean + s_error, t_mean = teacher_mean + t_error;
      const double s = 1 / (count * s_mean), t = 1 / (count * t_mean);
      const double s_square = deviation[0] - count * s_error * s_error;
      const double t_square = deviation[1] - count * t_error * t_error;
      const DistTerms terms = dist_terms(
          s * s * dist_deviation(s_square, s_square + count * s_mean * s_mean, kIsDouble),
          t * t * dist_deviation(t_square, t_square + count * t_mean * t_mean, kIsDouble),
          s * t * (deviation[2] - count * s_error * t_error));
      const A values[kDistRowValues] = {largest[0],
                                        static_cast<A>(s),
                                        largest[1],
                                        static_cast<A>(t),
                                        static_cast<A>(terms.cross),
                                        static_cast<A>(terms.own),
                                        static_cast<A>(terms.rho),
                                        0};
      store_pack(static_cast<A*>(p.row_values) + row * kDistRowValues,
                 Pack<A, kDistRowValues>::of(values));
      // In memory, by this thread alone, because a sum in a register costs a block of occupancy.
      double* const rho = scratch.sums.rows + blockIdx.x * kRowsPerBlock + threadIdx.x / kThreads;
      if (row < step) {
        *rho = terms.rho;
      } else {
        atomicAdd(rho, terms.rho);
      }
    }
  }
}

// -- loss ----------------------------------------------------------------------------------------

// True in the last of `blocks` blocks to call it with a ticket, which then sees what the others
// have written. All threads call it.
DNKD_INLINE bool is_last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == blocks - 1;
    __threadfence();  // what the others left is read behind the barrier
  }
  __syncthreads();
  return is_last;
}

// Writes what the gradient takes of a column, and returns its correlation. Its sums are those at
// `place` of [kDistMoments, width].
template <typename A>
DNKD_INLINE double finish_column(const DistLossFinishParams& p, const double* moments,
                                 int64_t width, int64_t place, int64_t column, double all_rows) {
  const double weight = -p.tau * p.gamma * p.processes / static_cast<double>(p.columns);
  const DistColumn values = dist_column(moments, width, place, all_rows > 1 ? all_rows : 1.0,
                                        sizeof(A) == sizeof(double));
  A* to = static_cast<A*>(p.column_values);
  if (to != nullptr) {
    to[column] = static_cast<A>(weight * values.terms.cross);
    to[p.columns + column] = static_cast<A>(weight * values.terms.own);
    to[2 * p.columns + column] = static_cast<A>(values.student_mean);
    to[3 * p.columns + column] = static_cast<A>(values.teacher_mean);
  }
  return values.terms.rho;
}

// One block, all threads of which call it, adds the sums in an order of their own.
template <typename A>
DNKD_INLINE void write_loss(const DistLossFinishParams& p, const DistSums& sums, double all_rows) {
  double row_sum = 0, column_sum = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < sums.row_sums; i += kBlock) {
    row_sum += sums.rows[i];
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < sums.column_sums; i += kBlock) {
    column_sum += sums.columns[i];
  }
  row_sum = block_sum<kBlock>(row_sum);
  column_sum = block_sum<kBlock>(column_sum);
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.loss) =
        static_cast<A>(dist_total(row_sum, column_sum, static_cast<double>(p.rows), all_rows,
                                  static_cast<double>(p.columns), p.beta, p.gamma, p.tau));
  }
}

// After the moments were added over processes: the sums by block; a single block writes the loss.
template <typename A>
__global__ void __launch_bounds__(kBlock)
    dist_loss_finish_kernel(const __grid_constant__ DistLossFinishParams p,
                            const __grid_constant__ DistSums sums) {
  const A* row_values = static_cast<const A*>(p.row_values);
  const double all_rows = p.moments[kDistMoments * p.columns];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  double row_sum = 0, column_sum = 0;
#pragma unroll 4
  for (int64_t i = first; i < p.rows; i += step) {
    row_sum += static_cast<double>(row_values[i * kDistRowValues + 6]);
  }
  for (int64_t j = first; j < p.columns; j += step) {
    column_sum += finish_column<A>(p, p.moments, p.columns, j, j, all_rows);
  }
  row_sum = block_sum<kBlock>(row_sum);
  column_sum = block_sum<kBlock>(column_sum);
  if (threadIdx.x == 0) {
    sums.rows[blockIdx.x] = row_sum;
    sums.columns[blockIdx.x] = column_sum;
  }
  if (gridDim.x == 1) {
    write_loss<A>(p, sums, all_rows);  // thread 0 reads what it wrote
  }
}

template <typename A>
__global__ void __launch_bounds__(kBlock)
    dist_loss_total_kernel(const __grid_constant__ DistLossFinishParams p,
                           const __grid_constant__ DistSums sums) {
  write_loss<A>(p, sums, p.moments[kDistMoments * p.columns]);
}

// -- columns -------------------------------------------------------------------------------------

// Who adds what: a tile of columns is kWarpSize vectors wide; each of its `parts` blocks takes
// kWarps * step rows, a warp `step` of them.
struct ColumnPlan {
  bool rows_in_vectors;
  bool columns_in_vectors;
  int width;  // columns of a tile
  unsigned tiles;
  unsigned parts;
  int64_t step;
};

// Adds what the warps of a block have of the same columns, in their order; the first gets the sums.
DNKD_INLINE void add_warps(double (&sums)[kDistMoments],
                           double (&others)[kWarps - 1][kDistMoments][kWarpSize]) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  __syncthreads();  // an earlier call may still be read
  if (warp > 0) {
#pragma unroll
    for (int m = 0; m < kDistMoments; ++m) {
      others[warp - 1][m][lane] = sums[m];
    }
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int m = 0; m < kDistMoments; ++m) {
#pragma unroll
      for (int w = 0; w < kWarps - 1; ++w) {
        sums[m] += others[w][m][lane];
      }
    }
  }
}

// Writes the moments, the loss, or both: what is not null. The last block of a tile adds its parts,
// the last tile the correlations, each in an order that does not depend on which one it is.
template <typename S, typename T, int kVec>
__global__ void __launch_bounds__(kBlock, kMinColumnBlocks)
    dist_loss_columns_kernel(const __grid_constant__ DistLossMomentsParams p,
                             const __grid_constant__ DistLossFinishParams f,
                             const __grid_constant__ ColumnPlan plan,
                             const __grid_constant__ DistScratch scratch) {
  using A = typename Accumulate<S>::type;
  constexpr int kWidth = kWarpSize * kVec;
  constexpr int kBatch = kVec > 1 ? 1 : 16 / static_cast<int>(sizeof(A));  // rows at once
  __shared__ double others[kWarps - 1][kDistMoments][kWarpSize];
  __shared__ double totals[kDistMoments][kWidth];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned tile = blockIdx.x % plan.tiles, part = blockIdx.x / plan.tiles;
  const int64_t first_column = static_cast<int64_t>(tile) * kWidth;
  const int64_t column = first_column + lane * kVec;
  const int64_t first = (static_cast<int64_t>(part) * kWarps + warp) * plan.step;
  const int64_t last = column >= p.columns          ? first
                       : first + plan.step < p.rows ? first + plan.step
                                                    : p.rows;
  const A units = static_cast<A>(Exponent<A>::kPerNatural / p.tau);
  const S* student = static_cast<const S*>(p.student) + column;
  const T* teacher = static_cast<const T*>(p.teacher) + column;
  const A* row_values = static_cast<const A*>(p.row_values);
  double sums[kVec][kDistMoments] = {};
  // The next rows are under way while these are added. One behind the last adds 0.
  Pack<S, kVec> next_student[kBatch];
  Pack<T, kVec> next_teacher[kBatch];
  const auto fetch = [&](int64_t row) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      next_student[b] = {};
      next_teacher[b] = {};
      if (row + b < last) {
        next_student[b] = load_pack<S, kVec>(student + (row + b) * p.student_stride);
        next_teacher[b] = load_pack<T, kVec>(teacher + (row + b) * p.teacher_stride);
      }
    }
  };
  fetch(first);
  for (int64_t row = first; row < last; row += kBatch) {
    Pack<S, kVec> s[kBatch];
    Pack<T, kVec> t[kBatch];
    Pack<A, 4> values[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      s[b] = next_student[b];
      t[b] = next_teacher[b];
      values[b] = {};
      if (row + b < last) {
        values[b] = load_pack<A, 4>(row_values + (row + b) * kDistRowValues);
      }
    }
    fetch(row + kBatch);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const A s_largest = values[b][0], s_inverse = values[b][1];
      const A t_largest = values[b][2], t_inverse = values[b][3];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const double x = exp_of_units((static_cast<A>(s[b][i]) - s_largest) * units) * s_inverse;
        const double y = exp_of_units((static_cast<A>(t[b][i]) - t_largest) * units) * t_inverse;
        sums[i][0] += x;
        sums[i][1] += y;
        sums[i][2] += x * x;
        sums[i][3] += y * y;
        sums[i][4] += x * y;
      }
    }
  }
  // Vectors' i-th elements lie together.
  double* const of_tile =
      scratch.partial + static_cast<int64_t>(tile) * plan.parts * kDistMoments * kWidth;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    add_warps(sums[i], others);
    if (warp == 0) {
#pragma unroll
      for (int m = 0; m < kDistMoments; ++m) {
        of_tile[(part * kDistMoments + m) * kWidth + i * kWarpSize + lane] = sums[i][m];
      }
    }
  }
  if (!is_last_block(&scratch.tickets[tile], plan.parts)) {
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kVec; ++i) {
    double sum[kDistMoments] = {};
#pragma unroll 4
    for (unsigned other = warp; other < plan.parts; other += kWarps) {
#pragma unroll
      for (int m = 0; m < kDistMoments; ++m) {
        sum[m] += of_tile[(other * kDistMoments + m) * kWidth + i * kWarpSize + lane];
      }
    }
    add_warps(sum, others);
    if (warp == 0) {
#pragma unroll
      for (int m = 0; m < kDistMoments; ++m) {
        totals[m][i * kWarpSize + lane] = sum[m];
      }
    }
  }
  __syncthreads();
  const double rows = static_cast<double>(p.rows);
  double column_sum = 0;
  for (int j = threadIdx.x; j < kWidth && first_column + j < p.columns; j += kBlock) {
    const int place = j % kVec * kWarpSize + j / kVec;
    if (p.moments != nullptr) {
#pragma unroll
      for (int m = 0; m < kDistMoments; ++m) {
        p.moments[m * p.columns + first_column + j] = totals[m][place];
      }
    }
    if (f.loss != nullptr) {
      column_sum += finish_column<A>(f, totals[0], kWidth, place, first_column + j, rows);
    }
  }
  if (p.moments != nullptr && tile == 0 && threadIdx.x == 0) {
    p.moments[kDistMoments * p.columns] = rows;
  }
  if (f.loss == nullptr) {
    return;
  }
  column_sum = block_sum<kBlock>(column_sum);
  if (threadIdx.x == 0) {
    scratch.sums.columns[tile] = column_sum;
  }
  if (is_last_block(&scratch.tickets[plan.tiles], plan.tiles)) {
    write_loss<A>(f, scratch.sums, rows);
  }
}

// -- gradient ------------------------------------------------------------------------------------

template <typename S, typename T, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    dist_loss_backward_kernel(const __grid_constant__ DistLossBackwardParams p) {
  using A = typename Accumulate<S>::type;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  __shared__ A dots[2][1][kThreads / kWarpSize];
  const A units = static_cast<A>(Exponent<A>::kPerNatural / p.tau);
  const A mean = static_cast<A>(1 / static_cast<double>(p.columns));
  const A up = *static_cast<const A*>(p.upstream);
  const double weight = -p.tau * p.beta / static_cast<double>(p.rows);
  const A* column_values = static_cast<const A*>(p.column_values);
  int turn = 0;
  RowOfBoth<S, T, kVec, kThreads> both;
  both.vectors = static_cast<int>(p.columns / kVec);
  both.lane = threadIdx.x % kThreads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    both.student = static_cast<const S*>(p.student) + row * p.student_stride;
    both.teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    both.keep();
    const A* values = static_cast<const A*>(p.row_values) + row * kDistRowValues;
    const A s_largest = values[0], s_inverse = values[1];
    const A t_largest = values[2], t_inverse = values[3];
    const A cross = static_cast<A>(weight * values[4]), own = static_cast<A>(weight * values[5]);
    // body(probability of the student, slope of the loss by it, place in the vector)
    const auto visit = [&](const Pack<S, kVec>& s, const Pack<T, kVec>& t, int64_t column,
                           const auto& body) {
      const A* at = column_values + column;
      const auto column_cross = load_pack<A, kVec>(at);
      const auto column_own = load_pack<A, kVec>(at + p.columns);
      const auto s_means = load_pack<A, kVec>(at + 2 * p.columns);
      const auto t_means = load_pack<A, kVec>(at + 3 * p.columns);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const A a = exp_of_units((static_cast<A>(s[i]) - s_largest) * units) * s_inverse;
        const A b = exp_of_units((static_cast<A>(t[i]) - t_largest) * units) * t_inverse;
        body(a,
             cross * (b - mean) - own * (a - mean) + column_cross[i] * (b - t_means[i]) -
                 column_own[i] * (a - s_means[i]),
             i);
      }
    };
    A dot[1] = {0};
    both.for_each([&](const Pack<S, kVec>& s, const Pack<T, kVec>& t, int64_t column) {
      visit(s, t, column, [&](A probability, A slope, int) { dot[0] += probability * slope; });
    });
    row_sum<kThreads>(dot, dots, turn);
    S* gradient = static_cast<S*>(p.gradient) + row * p.columns;
    both.for_each([&](const Pack<S, kVec>& s, const Pack<T, kVec>& t, int64_t column) {
      A values[kVec];
      visit(s, t, column, [&](A probability, A slope, int i) {
        values[i] = up * (probability * (slope - dot[0]));
      });
      store_pack(gradient + column, Pack<S, kVec>::of(values));
    });
  }
}

// -- launchers -----------------------------------------------------------------------------------

// A warp reads rows that its registers hold, a block longer ones.
template <typename S>
bool takes_a_block(int64_t columns, int vector) {
  return columns > static_cast<int64_t>(kWarpSize) * kKept<S> * vector;
}

// Whether both can be read as vectors of the student's 16 bytes, none of them cut off.
template <typename S, typename T, typename Params>
bool reads_vectors(const Params& p) {
  constexpr int kVec = kVectorWidth<S>;
  return p.columns % kVec == 0 && rows_are_aligned<S>(p.student, p.student_stride, kVec) &&
         rows_are_aligned<T>(p.teacher, p.teacher_stride, kVec);
}

// Calls function(student type, teacher type).
template <typename Params, typename Function>
auto dispatch(const Params& p, const Function& function) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return p.teacher_is_wide ? function(Half{}, float{}) : function(Half{}, Half{});
    case Dtype::kBFloat16:
      return p.teacher_is_wide ? function(BFloat16{}, float{}) : function(BFloat16{}, BFloat16{});
    case Dtype::kFloat64:
      return function(double{}, double{});
    default:
      return function(float{}, float{});
  }
}

template <typename S, typename T>
ColumnPlan column_plan(const DistLossMomentsParams& p) {
  constexpr int64_t kWarpsPerMultiprocessor = 16;
  constexpr int64_t kLeastRows = 8;
  constexpr int64_t kMostParts = 128;
  constexpr int64_t kMostPartsOfVectors = 16;
  const int64_t warps = multiprocessors() * kWarpsPerMultiprocessor;
  const int64_t most = (p.rows + kLeastRows - 1) / kLeastRows;
  ColumnPlan plan;
  plan.rows_in_vectors = reads_vectors<S, T>(p);
  // Vectors make wide tiles: they are for matrices that have work for all warps even so, without
  // many parts per tile, which one block has to add.
  const int64_t whole = p.columns / (kWarpSize * kVectorWidth<S>);
  plan.columns_in_vectors = plan.rows_in_vectors && whole * most >= warps &&
                            whole * kWarps * kMostPartsOfVectors >= warps;
  plan.width = kWarpSize * (plan.columns_in_vectors ? kVectorWidth<S> : 1);
  const int64_t tiles = (p.columns + plan.width - 1) / plan.width;
  const int64_t splits = warps / tiles < most ? warps / tiles : most;
  const int64_t parts = (splits + kWarps - 1) / kWarps;
  plan.tiles = static_cast<unsigned>(tiles);
  plan.parts = static_cast<unsigned>(parts < 1 ? 1 : parts < kMostParts ? parts : kMostParts);
  plan.step = (p.rows + plan.parts * kWarps - 1) / (plan.parts * kWarps);
  return plan;
}

// Lays out the scratch from `bytes` on, which may be null, and returns its size.
int64_t lay_out(DistScratch& scratch, const DistLossMomentsParams& p, const ColumnPlan& plan,
                void* bytes) {
  const uint64_t begin = reinterpret_cast<uint64_t>(bytes);
  uint64_t end = begin;
  const auto take = [&](int64_t count, auto*& array) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(end);
    end += (static_cast<uint64_t>(count) * sizeof(*array) + 15) / 16 * 16;
  };
  const int64_t most =
      static_cast<int64_t>(multiprocessors()) * kMaxBlocksPerMultiprocessor * kWarps;
  const int64_t tiles = plan.tiles;
  take(tiles + 1, scratch.tickets);
  take(tiles * plan.parts * kDistMoments * plan.width, scratch.partial);
  take(p.rows < most ? p.rows : most, scratch.sums.rows);
  take(tiles, scratch.sums.columns);
  scratch.sums.row_sums = 0;  // set when the rows kernel is launched
  scratch.sums.column_sums = static_cast<int>(tiles);
  return static_cast<int64_t>(end - begin);
}

template <auto kKernel>
int launch_rows(const DistLossMomentsParams& p, DistScratch& scratch, int rows_per_block,
                void* stream) {
  const int64_t blocks = blocks_for<kKernel>(p.rows, rows_per_block, kBlock);
  const int64_t most = blocks * rows_per_block;
  scratch.sums.row_sums = static_cast<int>(p.rows < most ? p.rows : most);
  return launch(kKernel, blocks, kBlock, stream, p, scratch);
}

template <typename S, typename T, int kVec>
int rows_with(const DistLossMomentsParams& p, DistScratch& scratch, void* stream) {
  return takes_a_block<S>(p.columns, kVec)
             ? launch_rows<dist_loss_rows_kernel<S, T, kVec, kBlock>>(p, scratch, 1, stream)
             : launch_rows<dist_loss_rows_kernel<S, T, kVec, kWarpSize>>(p, scratch, kWarps,
                                                                         stream);
}

// The moments, the loss, or both: what is not null. Without rows, too, the rows kernel clears the
// tickets.
template <typename S, typename T>
int forward_with(const DistLossMomentsParams& p, const DistLossFinishParams& f, void* bytes,
                 void* stream) {
  const ColumnPlan plan = column_plan<S, T>(p);
  DistScratch scratch;
  lay_out(scratch, p, plan, bytes);
  const int error = plan.rows_in_vectors ? rows_with<S, T, kVectorWidth<S>>(p, scratch, stream)
                                         : rows_with<S, T, 1>(p, scratch, stream);
  if (error != 0) {
    return error;
  }
  const auto kernel = plan.columns_in_vectors ? dist_loss_columns_kernel<S, T, kVectorWidth<S>>
                                              : dist_loss_columns_kernel<S, T, 1>;
  return launch(kernel, static_cast<int64_t>(plan.tiles) * plan.parts, kBlock, stream, p, f, plan,
                scratch);
}

template <typename S, typename T, int kVec>
int backward_with(const DistLossBackwardParams& p, void* stream) {
  if (takes_a_block<S>(p.columns, kVec)) {
    constexpr auto kKernel = dist_loss_backward_kernel<S, T, kVec, kBlock>;
    return launch(kKernel, blocks_for<kKernel>(p.rows, 1, kBlock), kBlock, stream, p);
  }
  constexpr auto kKernel = dist_loss_backward_kernel<S, T, kVec, kWarpSize>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, kWarps, kBlock), kBlock, stream, p);
}

// A column per thread before there are two blocks, which are cheap beside the double arithmetic;
// several rows.
int64_t finish_blocks(const DistLossFinishParams& p) {
  constexpr int64_t kRowsPerBlock = 8 * kBlock;
  constexpr int64_t kMost = 512;
  const int64_t by_rows = (p.rows + kRowsPerBlock - 1) / kRowsPerBlock;
  const int64_t by_columns = (p.columns + kBlock - 1) / kBlock;
  const int64_t blocks = by_rows > by_columns ? by_rows : by_columns;
  return blocks < kMost ? blocks : kMost;
}

template <typename A>
int finish_with(const DistLossFinishParams& p, double* scratch, void* stream) {
  const int64_t blocks = finish_blocks(p);
  const int count = static_cast<int>(blocks);
  const DistSums sums = {scratch, scratch + blocks, count, count};
  const int error = launch(dist_loss_finish_kernel<A>, blocks, kBlock, stream, p, sums);
  if (error != 0 || blocks == 1) {
    return error;
  }
  return launch(dist_loss_total_kernel<A>, 1, kBlock, stream, p, sums);
}

}  // namespace

int64_t dist_loss_forward_scratch_bytes_cuda(const DistLossMomentsParams& p) {
  return dispatch(p, [&](auto student, auto teacher) {
    DistScratch scratch;
    const ColumnPlan plan = column_plan<decltype(student), decltype(teacher)>(p);
    return lay_out(scratch, p, plan, nullptr);
  });
}

int dist_loss_forward_cuda(const DistLossMomentsParams& p, const DistLossFinishParams& f,
                           void* scratch, void* stream) {
  return dispatch(p, [&](auto student, auto teacher) {
    return forward_with<decltype(student), decltype(teacher)>(p, f, scratch, stream);
  });
}

int dist_loss_moments_cuda(const DistLossMomentsParams& p, void* scratch, void* stream) {
  return dist_loss_forward_cuda(p, DistLossFinishParams{}, scratch, stream);
}

int64_t dist_loss_finish_scratch_bytes_cuda(const DistLossFinishParams& p) {
  return finish_blocks(p) * 2 * static_cast<int64_t>(sizeof(double));
}

int dist_loss_finish_cuda(const DistLossFinishParams& p, void* scratch, void* stream) {
  double* sums = static_cast<double*>(scratch);
  return p.is_double ? finish_with<double>(p, sums, stream) : finish_with<float>(p, sums, stream);
}

int dist_loss_backward_cuda(const DistLossBackwardParams& p, void* stream) {
  if (p.rows == 0) {
    return 0;
  }
  return dispatch(p, [&](auto student, auto teacher) {
    using S = decltype(student);
    using T = decltype(teacher);
    using A = typename Accumulate<S>::type;
    const bool aligned = reads_vectors<S, T>(p) &&
                         rows_are_aligned<S>(p.gradient, p.columns, kVectorWidth<S>) &&
                         rows_are_aligned<A>(p.column_values, p.columns, kVectorWidth<S>);
    return aligned ? backward_with<S, T, kVectorWidth<S>>(p, stream)
                   : backward_with<S, T, 1>(p, stream);
  });
}

}  // namespace dnkd
