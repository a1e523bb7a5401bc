#include "common/rows.cuh"
#include "ops/cuda/logit_columns.cuh"
#include "ops/cuda/logit_row.cuh"
#include "ops/logit_loss.h"

namespace dnkd {
namespace {

static_assert(sizeof(LogitRow<float>) == kLogitCoefficients * sizeof(float),
              "coefficients are rows of LogitRow");

// Vectors per thread up to which a warp, and a block, take a row.
constexpr int kWarpRounds = 4;
constexpr int kBlockRounds = 8;
// Rows that larger blocks count with 32 bits, as good as all there is memory for.
constexpr int64_t kMostLongRows = 1 << 30;
// Blocks per multiprocessor that the compiler makes room for: as many as need no spilling.
template <typename S, int kThreads>
constexpr int kMinBlocks = sizeof(S) == 8                            ? (kThreads > kBlock ? 1 : 2)
                           : kThreads > kLargeBlock                  ? 1
                           : kThreads > kClusterBlock                ? 2
                           : kThreads > kBlock                       ? 3
                           : sizeof(S) == 2 && kThreads == kWarpSize ? 3
                                                                     : 4;
// Blocks that share a multiprocessor's shared memory, so that some read while others compute. A
// huge one takes all.
template <int kThreads>
constexpr int kSharingBlocks = kThreads > kLargeBlock                          ? 1
                               : kThreads > kBlock&& kThreads <= kClusterBlock ? 3
                                                                               : 2;

template <typename S, typename T, bool kDecoupled, int kVec, int kThreads, int kBlocks,
          int kRegisters>
__global__ void __launch_bounds__(kBlockOf<kThreads>, kMinBlocks<S, kThreads>)
    logit_loss_forward_kernel(const __grid_constant__ LogitLossParams p,
                              const __grid_constant__ RowScratch scratch, int slots) {
  using A = typename Accumulate<S>::type;
  constexpr int kBlockThreads = kBlockOf<kThreads>;
  constexpr int kRowsPerBlock = kBlockThreads / kThreads;
  if constexpr (kBlocks > 1 && !kHasClusters) {
    return;
  }
  using Buffers = std::conditional_t<(kBlocks > 1), ClusterExchange<kBlocks * kThreads / kWarpSize>,
                                     A[2][4][kThreads / kWarpSize]>;
  static_assert(sizeof(Buffers) + 1536 <= kOtherShared, "with the rest, and what the driver takes");
  alignas(16) __shared__ Buffers buffers;
  DNKD_DYNAMIC_SHARED(kept);
  const A nan = __builtin_nanf("");
  const bool is_none = p.reduction == Reduction::kNone;

  // The same for all rows; not in registers, of which there are few.
  __shared__ double weights[2], counts[2];  // of ce and kd; counts: what the sums are divided by
  __shared__ double totals[kRowsPerBlock][2];
  __shared__ A label_gradients[kBlockThreads / kWarpSize];  // of the warp that has the label
  __shared__ LogitOptions<A> options;
  const unsigned long long counted =
      p.reduction == Reduction::kMean ? counted_rows(scratch, p.rows) : 0;
  if (threadIdx.x == 0) {
    weights[0] = p.has_ce ? p.ce_weight : 0;
    weights[1] = p.kd_weight;
    if (p.has_ce && p.ce_scale != nullptr) {
      weights[0] *= static_cast<double>(*static_cast<const A*>(p.ce_scale));
    }
    if (p.kd_scale != nullptr) {
      weights[1] *= static_cast<double>(*static_cast<const A*>(p.kd_scale));
    }
    counts[0] = counts[1] = 1;
    if (p.reduction == Reduction::kMean) {
      counts[0] = counted > 0 ? static_cast<double>(counted) : 1.0;
      counts[1] = kDecoupled ? counts[0] : p.rows > 0 ? static_cast<double>(p.rows) : 1.0;
    }
    options.temperature = static_cast<A>(p.temperature);
    options.ce_weight = static_cast<A>(weights[0] / counts[0]);
    options.kd_weight = static_cast<A>(weights[1] / counts[1]);
    options.alpha = static_cast<A>(p.alpha);
    options.beta = static_cast<A>(p.beta);
    options.smoothing = static_cast<A>(p.label_smoothing);
    options.columns = static_cast<A>(p.columns);
    options.has_ce = p.has_ce;
    options.has_label = p.probabilities == nullptr;
    options.standardize = p.standardize;
  }
  __syncthreads();  // the cluster's barrier would do, but racecheck is not known to see it
  int rank = 0;
  if constexpr (kBlocks > 1) {
    begin_exchange(buffers);
    rank = cluster_rank();
  }
  const int power = power_of(p.has_ce, p.standardize, p.temperature);

  constexpr int kBatched = kBatch<T, kVec, kThreads, kRegisters>;
  Columns<S, T, kVec, kThreads, kBlocks, kRegisters, kBatched> data{{nullptr, nullptr, 0}};
  data.slots = slots;
  data.columns = static_cast<int>(p.columns);
  data.lane = rank * kThreads + threadIdx.x % kThreads;
  data.kept = reinterpret_cast<char*>(kept);
  data.kept_address = shared_address(kept);
  double* const total = totals[threadIdx.x / kThreads];  // of the first lane, which alone uses it
  if (threadIdx.x % kThreads == 0) {
    total[0] = total[1] = 0;
  }
  int turn = 0;
  using Index = std::conditional_t<(kThreads > kBlock && kVec > 1), int, int64_t>;
  const Index step = static_cast<Index>(gridDim.x / kBlocks) * kRowsPerBlock;
  Index row = static_cast<Index>(blockIdx.x / kBlocks) * kRowsPerBlock + threadIdx.x / kThreads;
  const auto at = [&](int64_t of) {
    return typename decltype(data)::Row(static_cast<const S*>(p.student) + of * p.student_stride,
                                        static_cast<const T*>(p.teacher) + of * p.teacher_stride,
                                        data.columns);
  };
  auto next = at(row < p.rows ? row : 0);
  if (row < p.rows) {
    data.fetch(next);
  }
  for (; row < p.rows; row += step) {
    // The same for all threads of a row, and with a block or a cluster per row for all of it: the
    // barriers in sum_row are reached by all or by none.
    int label = -1;
    bool is_ignored = false, is_bad = false;
    if (kDecoupled || (p.has_ce && p.probabilities == nullptr)) {
      const int64_t named = label_of(p.label, p.label_is_int32, row);
      is_ignored = p.probabilities == nullptr && named == p.ignore_index;
      is_bad = !is_ignored && (named < 0 || named >= p.columns);
      label = is_ignored || is_bad ? -1 : static_cast<int>(named);
    }
    data.row = next;
    const bool has_next = row + step < p.rows;
    next = at(has_next ? row + step : row);
    data.arrived();
    const A* probabilities =
        p.has_ce && p.probabilities != nullptr
            ? static_cast<const A*>(p.probabilities) + row * p.probabilities_stride
            : nullptr;
    const bool is_read = !kDecoupled || label >= 0;
    LogitTerms<A> terms = {};
    LabelOf<A> at_label = {label, 0, 0};
    if (is_read) {
      const LogitSums<A> sum =
          sum_row<kDecoupled>(data, label, probabilities, power, options, buffers, turn);
      terms = logit_row_terms<kDecoupled>(sum, options, !is_ignored);
      at_label.student = sum.label;
      at_label.teacher = sum.teacher_label;
    }
    if (is_bad) {
      terms.ce = p.has_ce ? nan : A(0);
      terms.kd = kDecoupled ? nan : terms.kd;
      terms.row = {nan, nan, nan, nan, nan, nan, nan, nan, nan, nan, nan};
    }
    if (data.lane == 0) {
      if (is_none) {
        // Not 0 * weight, which is NaN for an infinite weight.
        const A ce = p.has_ce && !is_ignored ? terms.ce * static_cast<A>(weights[0]) : A(0);
        const A kd = kDecoupled && is_ignored ? A(0) : terms.kd * static_cast<A>(weights[1]);
        static_cast<A*>(p.loss)[row] = ce + kd;
        static_cast<A*>(p.ce)[row] = terms.ce;
        static_cast<A*>(p.kd)[row] = terms.kd;
      } else {
        total[0] += static_cast<double>(terms.ce);
        total[1] += static_cast<double>(terms.kd);
      }
      if (p.coefficients != nullptr) {
        static_cast<LogitRow<A>*>(p.coefficients)[row] = terms.row;
      }
    }
    const bool writes = p.gradient != nullptr && is_read && !is_bad;
    S* out = kept_pointer(static_cast<S*>(p.gradient) + row * p.columns);
    if (writes) {
      write_gradient(out, data, next, has_next, terms.row, at_label,
                     label_gradients[threadIdx.x / kWarpSize], kDecoupled, probabilities, power,
                     p.standardize);
      __syncwarp();  // another lane may write the next row's label gradient to the same place
    } else if (p.gradient != nullptr) {
      fill_gradient(out, data, is_bad ? nan : A(0));
    }
    if (!writes && has_next) {
      data.fetch(next);
    }
  }

  if (is_none || rank > 0) {
    return;
  }
  const bool is_first = threadIdx.x % kThreads == 0;
  double sums[2] = {is_first ? total[0] : 0, is_first ? total[1] : 0};
  if (add_blocks<kBlockThreads>(sums, scratch, kBlocks) && threadIdx.x == 0) {
    const double ce = sums[0] / counts[0], kd = sums[1] / counts[1];
    *static_cast<A*>(p.loss) = static_cast<A>(weights[0] * ce + weights[1] * kd);
    *static_cast<A*>(p.ce) = static_cast<A>(ce);
    *static_cast<A*>(p.kd) = static_cast<A>(kd);
  }
}

template <typename S, typename T, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<S, kThreads>)
    logit_loss_backward_kernel(const __grid_constant__ LogitLossBackwardParams p) {
  using A = typename Accumulate<S>::type;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  const int power = power_of(p.has_ce, p.standardize, p.temperature);
  // Nothing is kept of what is read once.
  Columns<S, T, kVec, kThreads, 1, 0, (sizeof(Pack<T, kVec>) > 16 ? 2 : 4)> data{
      {nullptr, nullptr, 0}};
  data.kept = nullptr;
  data.kept_address = {};
  data.slots = 0;
  data.columns = static_cast<int>(p.columns);
  data.lane = threadIdx.x % kThreads;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    LogitRow<A> terms = static_cast<const LogitRow<A>*>(p.coefficients)[row];
    S* out = static_cast<S*>(p.gradient) + row * p.columns;
    // Rows without a gradient stay 0 whatever comes from upstream. NaN makes all of the row NaN,
    // and marks rows whose label names no class.
    const bool is_zero = terms.plain == 0 && terms.student == 0 && terms.teacher == 0 &&
                         terms.constant == 0 && terms.linear == 0 && terms.label == 0 &&
                         terms.probability == 0;
    if (is_zero || terms.student != terms.student) {
      fill_gradient(out, data, terms.student);
      continue;
    }
    int label = -1;
    if (p.decoupled || (p.has_ce && p.probabilities == nullptr)) {
      const int64_t named = label_of(p.label, p.label_is_int32, row);
      label = named < 0 || named >= p.columns ? -1 : static_cast<int>(named);
    }
    const A up = static_cast<const A*>(p.upstream)[row * p.upstream_stride];
    terms.plain *= up;
    terms.student *= up;
    terms.teacher *= up;
    terms.constant *= up;
    terms.linear *= up;
    terms.label *= up;
    terms.probability *= up;
    const typename decltype(data)::Row here(
        static_cast<const S*>(p.student) + row * p.student_stride,
        static_cast<const T*>(p.teacher) + row * p.teacher_stride, data.columns);
    data.row = here;
    const A* probabilities =
        p.has_ce && p.probabilities != nullptr
            ? static_cast<const A*>(p.probabilities) + row * p.probabilities_stride
            : nullptr;
    LabelOf<A> at_label = {label, 0, 0};
    if (data.is_own(label)) {
      at_label.student = widen(*data.row.student_at(label)) - terms.shift;
      at_label.teacher = static_cast<A>(widen(*data.row.teacher_at(label))) - terms.teacher_shift;
    }
    A of_label;
    write_gradient(out, data, here, false, terms, at_label, of_label, p.decoupled, probabilities,
                   power, p.standardize);
  }
}

// -- launchers -----------------------------------------------------------------------------------

template <typename S, typename T, bool kDecoupled, int kVec, int kThreads, int kBlocks = 1,
          int kRegisters = kInRegisters<S, T, kDecoupled, kVec, kThreads>>
struct ForwardLaunch {
  static constexpr auto kKernel =
      logit_loss_forward_kernel<S, T, kDecoupled, kVec, kThreads, kBlocks, kRegisters>;
  static constexpr int kBlockThreads = kBlockOf<kThreads>;
  static constexpr int kSharing = kThreads * kBlocks;  // threads that share a row
  static constexpr int kSlotBytes =
      Columns<S, T, kVec, kThreads, kBlocks, kRegisters, 1>::kSlotBytes;

  int64_t wanted;     // vectors of every thread
  int64_t slots = 0;  // those that shared memory keeps; elements one by one are not kept

  explicit ForwardLaunch(const LogitLossParams& p)
      : wanted((p.columns / kVec + kSharing - 1) / kSharing) {
    if constexpr (kVec > 1) {
      slots = dynamic_shared_limit<kKernel, kSharingBlocks<kThreads>>() / kSlotBytes;
      slots = slots < wanted ? slots : wanted;
    }
  }

  // Whether shared memory and registers keep at least this part of a row.
  bool keeps(double part) const {
    return static_cast<double>(slots + kRegisters) >= part * static_cast<double>(wanted);
  }
  int bytes() const { return static_cast<int>(slots) * kSlotBytes; }
  // No more than row_scratch_bytes() has room for, whatever the driver holds to be resident.
  int64_t clusters() const {
    const int64_t resident = resident_clusters<kKernel>(kBlocks, kBlockThreads, bytes());
    const int64_t most = static_cast<int64_t>(multiprocessors()) * kMaxBlocksPerMultiprocessor;
    return resident < most ? resident : most;
  }

  int operator()(const LogitLossParams& p, const RowScratch& scratch, void* stream) const {
    if constexpr (kBlocks > 1) {
      const int64_t resident = clusters(), count = p.rows < resident ? p.rows : resident;
      return launch_clusters(kKernel, count < 1 ? 1 : count, kBlocks, kBlockThreads, bytes(),
                             stream, p, scratch, static_cast<int>(slots));
    }
    const int64_t blocks =
        blocks_for<kKernel>(p.rows, kBlockThreads / kThreads, kBlockThreads, bytes());
    return launch_sharing(kKernel, blocks, kBlockThreads, bytes(), stream, p, scratch,
                          static_cast<int>(slots));
  }
};

// Launches the smallest cluster from kBlocks blocks on that keeps nearly all of a row, or the
// largest; false where the device has no clusters.
template <typename S, typename T, bool kDecoupled, int kVec, int kBlocks = 2>
bool forward_in_clusters(const LogitLossParams& p, const RowScratch& scratch, void* stream,
                         int& error) {
  const ForwardLaunch<S, T, kDecoupled, kVec, kClusterBlock, kBlocks> cluster(p);
  if constexpr (2 * kBlocks <= kMostClusterBlocks) {
    if (!cluster.keeps(0.9) &&
        forward_in_clusters<S, T, kDecoupled, kVec, 2 * kBlocks>(p, scratch, stream, error)) {
      return true;
    }
  }
  if (cluster.clusters() == 0) {
    return false;
  }
  error = cluster(p, scratch, stream);
  return true;
}

template <typename S, typename T, bool kDecoupled, int kVec>
int forward_with(const LogitLossParams& p, const RowScratch& scratch, void* stream) {
  const int64_t vectors = p.columns / kVec;
  if (vectors <= kWarpSize * kWarpRounds) {
    return ForwardLaunch<S, T, kDecoupled, kVec, kWarpSize>(p)(p, scratch, stream);
  }
  // Elements one by one are for rows that do not lie alike: few, and not worth more kernels.
  if constexpr (kVec > 1) {
    if (vectors <= kBlock * kBlockRounds || p.rows > kMostLongRows) {
      return ForwardLaunch<S, T, kDecoupled, kVec, kBlock>(p)(p, scratch, stream);
    }
  }
  const ForwardLaunch<S, T, kDecoupled, kVec, kLargeBlock> large(p);
  if constexpr (kVec > 1 && sizeof(S) < 8) {
    // A teacher in float32 beside 16-bit logits is rare, and not worth more kernels either.
    if constexpr (sizeof(S) == sizeof(T)) {
      int error = 0;
      if (!large.keeps(0.95) &&
          forward_in_clusters<S, T, kDecoupled, kVec>(p, scratch, stream, error)) {
        return error;
      }
    }
    // Two blocks hide each other's waits. But of what they cannot keep, those of all
    // multiprocessors together would read more again than the L2 cache holds.
    if (!large.keeps(0.75)) {
      const ForwardLaunch<S, T, kDecoupled, kVec, kHugeBlock> huge(p);
      if (!huge.keeps(1)) {
        return ForwardLaunch<S, T, kDecoupled, kVec, kHugeBlock, 1, 0>(p)(p, scratch, stream);
      }
      return huge(p, scratch, stream);
    }
  }
  return large(p, scratch, stream);
}

template <typename S, typename T, int kVec>
int backward_with(const LogitLossBackwardParams& p, void* stream) {
  if (p.columns / kVec <= kWarpSize * kWarpRounds) {
    constexpr auto kKernel = logit_loss_backward_kernel<S, T, kVec, kWarpSize>;
    return launch(kKernel, blocks_for<kKernel>(p.rows, kBlock / kWarpSize, kBlock), kBlock, stream,
                  p);
  }
  constexpr auto kKernel = logit_loss_backward_kernel<S, T, kVec, kBlock>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, 1, kBlock), kBlock, stream, p);
}

// Elements from the last multiple of `width` elements in memory to the rows' first one.
template <typename T>
int64_t misalignment(const void* base, int width) {
  return reinterpret_cast<uint64_t>(base) / sizeof(T) % width;
}

// Whether in every row the vectors of all that is read and written begin at the same column.
template <typename S, typename T, typename Params>
bool can_read_vectors(const Params& p) {
  using A = typename Accumulate<S>::type;
  constexpr int kVec = kVectorWidth<S>;
  const int64_t first = misalignment<S>(p.student, kVec), step = p.student_stride % kVec;
  const auto alike = [&](int64_t other_first, int64_t stride) {
    return other_first == first && (p.rows <= 1 || stride % kVec == step);
  };
  return alike(misalignment<T>(p.teacher, kVec), p.teacher_stride) &&
         (p.probabilities == nullptr ||
          alike(misalignment<A>(p.probabilities, kVec), p.probabilities_stride)) &&
         (p.gradient == nullptr || alike(misalignment<S>(p.gradient, kVec), p.columns));
}

// Calls function(student element, teacher element, elements per vector), the last as a constant.
template <typename S, typename T, typename Params, typename Function>
int with_vectors(const Params& p, const Function& function) {
  return can_read_vectors<S, T>(p)
             ? function(S{}, T{}, std::integral_constant<int, kVectorWidth<S>>{})
             : function(S{}, T{}, std::integral_constant<int, 1>{});
}

template <typename Params, typename Function>
int dispatch(const Params& p, const Function& function) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return p.teacher_is_wide ? with_vectors<Half, float>(p, function)
                               : with_vectors<Half, Half>(p, function);
    case Dtype::kBFloat16:
      return p.teacher_is_wide ? with_vectors<BFloat16, float>(p, function)
                               : with_vectors<BFloat16, BFloat16>(p, function);
    case Dtype::kFloat64:
      return with_vectors<double, double>(p, function);
    default:
      return with_vectors<float, float>(p, function);
  }
}

}  // namespace

int64_t logit_loss_scratch_bytes_cuda(const LogitLossParams& p) {
  return row_scratch_bytes(p.rows, 2);
}

int logit_loss_forward_cuda(const LogitLossParams& p, void* scratch_bytes, void* stream) {
  if (p.rows == 0 && p.reduction == Reduction::kNone) {
    return 0;
  }
  const bool can_ignore = (p.has_ce || p.decoupled) && p.probabilities == nullptr;
  RowScratch scratch;
  const int error = prepare_rows(scratch, scratch_bytes, can_ignore ? p.label : nullptr,
                                 p.label_is_int32, p.rows, p.ignore_index, p.reduction, stream);
  if (error != 0) {
    return error;
  }
  return dispatch(p, [&](auto student, auto teacher, auto vector) {
    using S = decltype(student);
    using T = decltype(teacher);
    constexpr int kVec = decltype(vector)::value;
    return p.decoupled ? forward_with<S, T, true, kVec>(p, scratch, stream)
                       : forward_with<S, T, false, kVec>(p, scratch, stream);
  });
}

int logit_loss_backward_cuda(const LogitLossBackwardParams& p, void* stream) {
  if (p.rows == 0) {
    return 0;
  }
  return dispatch(p, [&](auto student, auto teacher, auto vector) {
    return backward_with<decltype(student), decltype(teacher), decltype(vector)::value>(p, stream);
  });
}

}  // namespace dnkd
