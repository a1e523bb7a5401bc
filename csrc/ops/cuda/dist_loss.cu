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
    dist_loss_rows_kernel(const __grid_constant__ DistLossMomentsParams p) {
  using A = typename Accumulate<S>::type;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  __shared__ A maxima[2][2][kThreads / kWarpSize];
  __shared__ A sums[2][2][kThreads / kWarpSize];
  __shared__ A deviations[2][5][kThreads / kWarpSize];
  const A units = static_cast<A>(Exponent<A>::kPerNatural / p.tau);
  const A columns = static_cast<A>(p.columns);
  int maxima_turn = 0, sums_turn = 0, deviations_turn = 0;
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
    }
  }
}

// -- columns -------------------------------------------------------------------------------------

// Who adds what: a warp takes kWarpSize vectors of columns and one of `splits` ranges of rows; the
// kWarps of a block take the same columns and add what they found.
struct ColumnPlan {
  bool is_vector;
  int64_t tiles;
  int64_t splits;  // a multiple of kWarps

  __host__ __device__ int64_t parts() const { return splits / kWarps; }
};

// partial: [parts, kDistMoments, C]. kThreads: the warp, whose threads take different columns.
template <typename S, typename T, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinColumnBlocks)
    dist_loss_columns_kernel(const __grid_constant__ DistLossMomentsParams p,
                             const __grid_constant__ ColumnPlan plan, double* partial) {
  using A = typename Accumulate<S>::type;
  const int lane = threadIdx.x % kThreads, warp = threadIdx.x / kThreads;
  const int64_t part = blockIdx.x / plan.tiles;
  const int64_t split = part * kWarps + warp;
  const int64_t column = (blockIdx.x % plan.tiles * kThreads + lane) * kVec;
  const bool is_inside = column < p.columns;
  const int64_t step = (p.rows + plan.splits - 1) / plan.splits;
  const int64_t first = split * step;
  const int64_t last = !is_inside ? first : first + step < p.rows ? first + step : p.rows;
  const A units = static_cast<A>(Exponent<A>::kPerNatural / p.tau);
  const S* student = static_cast<const S*>(p.student) + column;
  const T* teacher = static_cast<const T*>(p.teacher) + column;
  const A* row_values = static_cast<const A*>(p.row_values);
  double sums[kDistMoments][kVec] = {};
  // The next row is under way while this one is added.
  Pack<S, kVec> next_student = {};
  Pack<T, kVec> next_teacher = {};
  if (first < last) {
    next_student = load_pack<S, kVec>(student + first * p.student_stride);
    next_teacher = load_pack<T, kVec>(teacher + first * p.teacher_stride);
  }
  for (int64_t row = first; row < last; ++row) {
    const Pack<S, kVec> s = next_student;
    const Pack<T, kVec> t = next_teacher;
    if (row + 1 < last) {
      next_student = load_pack<S, kVec>(student + (row + 1) * p.student_stride);
      next_teacher = load_pack<T, kVec>(teacher + (row + 1) * p.teacher_stride);
    }
    const A* values = row_values + row * kDistRowValues;
    const A s_largest = values[0], s_inverse = values[1];
    const A t_largest = values[2], t_inverse = values[3];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const double a = exp_of_units((static_cast<A>(s[i]) - s_largest) * units) * s_inverse;
      const double b = exp_of_units((static_cast<A>(t[i]) - t_largest) * units) * t_inverse;
      sums[0][i] += a;
      sums[1][i] += b;
      sums[2][i] += a * a;
      sums[3][i] += b * b;
      sums[4][i] += a * b;
    }
  }
  // One moment after the other, so that the other warps' take little memory; always in their order.
  __shared__ double others[kWarps - 1][kVec][kThreads];
#pragma unroll
  for (int m = 0; m < kDistMoments; ++m) {
    __syncthreads();
    if (warp > 0) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        others[warp - 1][i][lane] = sums[m][i];
      }
    }
    __syncthreads();
    if (warp == 0 && is_inside) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
#pragma unroll
        for (int w = 0; w < kWarps - 1; ++w) {
          sums[m][i] += others[w][i][lane];
        }
      }
      store_pack(partial + (part * kDistMoments + m) * p.columns + column,
                 Pack<double, kVec>::of(sums[m]));
    }
  }
}

// Adds the parts in an order of their own: each warp every kWarps-th, then the warps. A thread per
// sum of a column.
__global__ void __launch_bounds__(kBlock)
    dist_loss_reduce_kernel(const __grid_constant__ DistLossMomentsParams p,
                            const __grid_constant__ ColumnPlan plan, const double* partial) {
  __shared__ double shared[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t count = kDistMoments * p.columns;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  double sum = 0;
  if (at < count) {
    for (int64_t part = warp; part < plan.parts(); part += kWarps) {
      sum += partial[part * count + at];
    }
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && at < count) {
    sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += shared[w][lane];
    }
    p.moments[at] = sum;
  }
  if (at == 0 && warp == 0) {
    p.moments[count] = static_cast<double>(p.rows);
  }
}

// -- loss ----------------------------------------------------------------------------------------

template <typename A>
DNKD_INLINE void write_loss(const DistLossFinishParams& p, double row_sum, double column_sum) {
  *static_cast<A*>(p.loss) = static_cast<A>(dist_total(
      row_sum, column_sum, static_cast<double>(p.rows), p.moments[kDistMoments * p.columns],
      static_cast<double>(p.columns), p.beta, p.gamma, p.tau));
}

// Sums of the correlations, by block: partial [blocks, 2]; a single block writes the loss.
template <typename A>
__global__ void __launch_bounds__(kBlock)
    dist_loss_finish_kernel(const __grid_constant__ DistLossFinishParams p, double* partial) {
  const A* row_values = static_cast<const A*>(p.row_values);
  A* column_values = static_cast<A*>(p.column_values);
  const double all_rows = p.moments[kDistMoments * p.columns];
  const double weight = -p.tau * p.gamma * p.processes / static_cast<double>(p.columns);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  double row_sum = 0, column_sum = 0;
  for (int64_t i = first; i < p.rows; i += step) {
    row_sum += static_cast<double>(row_values[i * kDistRowValues + 6]);
  }
  for (int64_t j = first; j < p.columns; j += step) {
    const DistColumn column = dist_column(p.moments, p.columns, j, all_rows > 1 ? all_rows : 1.0,
                                          sizeof(A) == sizeof(double));
    column_sum += column.terms.rho;
    if (column_values != nullptr) {
      column_values[j] = static_cast<A>(weight * column.terms.cross);
      column_values[p.columns + j] = static_cast<A>(weight * column.terms.own);
      column_values[2 * p.columns + j] = static_cast<A>(column.student_mean);
      column_values[3 * p.columns + j] = static_cast<A>(column.teacher_mean);
    }
  }
  row_sum = block_sum<kBlock>(row_sum);
  column_sum = block_sum<kBlock>(column_sum);
  if (threadIdx.x == 0) {
    if (gridDim.x == 1) {
      write_loss<A>(p, row_sum, column_sum);
    } else {
      partial[2 * blockIdx.x] = row_sum;
      partial[2 * blockIdx.x + 1] = column_sum;
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kBlock)
    dist_loss_total_kernel(const __grid_constant__ DistLossFinishParams p, const double* partial,
                           int blocks) {
  double row_sum = 0, column_sum = 0;
  for (int b = threadIdx.x; b < blocks; b += kBlock) {
    row_sum += partial[2 * b];
    column_sum += partial[2 * b + 1];
  }
  row_sum = block_sum<kBlock>(row_sum);
  column_sum = block_sum<kBlock>(column_sum);
  if (threadIdx.x == 0) {
    write_loss<A>(p, row_sum, column_sum);
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
  constexpr int64_t kLeastRows = 16;
  constexpr int64_t kMostSplits = 1024;
  ColumnPlan plan;
  plan.is_vector = reads_vectors<S, T>(p);
  const int64_t width = kWarpSize * (plan.is_vector ? kVectorWidth<S> : 1);
  plan.tiles = (p.columns + width - 1) / width;
  plan.splits = multiprocessors() * kWarpsPerMultiprocessor / plan.tiles;
  const int64_t most = (p.rows + kLeastRows - 1) / kLeastRows;
  plan.splits = plan.splits < most ? plan.splits : most;
  plan.splits = plan.splits < kMostSplits ? plan.splits : kMostSplits;
  plan.splits = (plan.splits < 1 ? 1 : (plan.splits + kWarps - 1) / kWarps) * kWarps;
  return plan;
}

template <typename S, typename T, int kVec>
int moments_with(const DistLossMomentsParams& p, const ColumnPlan& plan, double* partial,
                 void* stream) {
  int error = 0;
  if (p.rows == 0) {  // nothing but the sums to clear
  } else if (takes_a_block<S>(p.columns, kVec)) {
    constexpr auto kKernel = dist_loss_rows_kernel<S, T, kVec, kBlock>;
    error = launch(kKernel, blocks_for<kKernel>(p.rows, 1, kBlock), kBlock, stream, p);
  } else {
    constexpr auto kKernel = dist_loss_rows_kernel<S, T, kVec, kWarpSize>;
    error = launch(kKernel, blocks_for<kKernel>(p.rows, kWarps, kBlock), kBlock, stream, p);
  }
  if (error != 0) {
    return error;
  }
  constexpr auto kColumns = dist_loss_columns_kernel<S, T, kVec, kWarpSize>;
  error = launch(kColumns, plan.tiles * plan.parts(), kBlock, stream, p, plan, partial);
  if (error != 0) {
    return error;
  }
  const int64_t sums = kDistMoments * p.columns;
  return launch(dist_loss_reduce_kernel, (sums + kWarpSize - 1) / kWarpSize, kBlock, stream, p,
                plan, static_cast<const double*>(partial));
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

// A block takes several rows and columns for each of its threads before there are two blocks.
int64_t finish_blocks(const DistLossFinishParams& p) {
  constexpr int64_t kPerBlock = 8 * kBlock;
  constexpr int64_t kMost = 256;
  const int64_t longest = p.rows > p.columns ? p.rows : p.columns;
  const int64_t blocks = (longest + kPerBlock - 1) / kPerBlock;
  return blocks < kMost ? blocks : kMost;
}

template <typename A>
int finish_with(const DistLossFinishParams& p, double* partial, void* stream) {
  const int64_t blocks = finish_blocks(p);
  const int error = launch(dist_loss_finish_kernel<A>, blocks, kBlock, stream, p, partial);
  if (error != 0 || blocks == 1) {
    return error;
  }
  return launch(dist_loss_total_kernel<A>, 1, kBlock, stream, p,
                static_cast<const double*>(partial), static_cast<int>(blocks));
}

}  // namespace

int64_t dist_loss_moments_scratch_bytes_cuda(const DistLossMomentsParams& p) {
  const int64_t parts = dispatch(p, [&](auto student, auto teacher) {
    return column_plan<decltype(student), decltype(teacher)>(p).parts();
  });
  return parts * kDistMoments * p.columns * static_cast<int64_t>(sizeof(double));
}

int dist_loss_moments_cuda(const DistLossMomentsParams& p, void* scratch, void* stream) {
  return dispatch(p, [&](auto student, auto teacher) {
    using S = decltype(student);
    using T = decltype(teacher);
    const ColumnPlan plan = column_plan<S, T>(p);
    double* partial = static_cast<double*>(scratch);
    return plan.is_vector ? moments_with<S, T, kVectorWidth<S>>(p, plan, partial, stream)
                          : moments_with<S, T, 1>(p, plan, partial, stream);
  });
}

int64_t dist_loss_finish_scratch_bytes_cuda(const DistLossFinishParams& p) {
  return finish_blocks(p) * 2 * static_cast<int64_t>(sizeof(double));
}

int dist_loss_finish_cuda(const DistLossFinishParams& p, void* scratch, void* stream) {
  double* partial = static_cast<double*>(scratch);
  return p.is_double ? finish_with<double>(p, partial, stream)
                     : finish_with<float>(p, partial, stream);
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
