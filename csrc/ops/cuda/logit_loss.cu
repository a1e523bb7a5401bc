#include <type_traits>

#include "common/rows.cuh"
#include "ops/logit_loss.h"

namespace dnkd {
namespace {

#include "ops/logit_loss_terms.inc"

static_assert(sizeof(LogitRow<float>) == kLogitCoefficients * sizeof(float),
              "coefficients are rows of LogitRow");

// A row is shared by a warp, a block or a large block, the smallest that takes it in few rounds.
constexpr int kBlock = 128;
constexpr int kLargeBlock = 256;
// Vectors per thread up to which a warp, and a block, take a row.
constexpr int kWarpRounds = 4;
constexpr int kBlockRounds = 8;
// Elements of a vector that are computed on together: registers for more would spill.
constexpr int kGroup = 4;

template <int kThreads>
constexpr int kBlockOf = kThreads > kBlock ? kThreads : kBlock;

// Blocks per multiprocessor that the compiler makes room for: as many as need no spilling.
template <typename S, int kThreads>
constexpr int kMinBlocks = sizeof(S) == 8                            ? (kThreads > kBlock ? 1 : 2)
                           : kThreads > kBlock                       ? 2
                           : sizeof(S) == 2 && kThreads == kWarpSize ? 3
                                                                     : 4;

// How exp(z') follows from exp(s z') = exp(z' / T): its T-th power for an integer T, or 0: not.
DNKD_INLINE int power_of(bool has_ce, bool standardize, double temperature) {
  if (!has_ce) {
    return 1;  // multiplied by 0
  }
  const bool is_power = temperature == 1 || temperature == 2 || temperature == 4;
  return is_power && !standardize ? static_cast<int>(temperature) : 0;
}

// The columns of a row, read by kThreads threads of which this is `lane`, kVec at a time. Each
// thread keeps the first `slots` vectors it reads in shared memory that only it uses; the others it
// reads again.
template <typename S, typename T, int kVec, int kThreads>
struct Columns {
  static constexpr int kSharedBy = kThreads;
  // Vectors per thread whose loads are under way before the first is used.
  static constexpr int kBatch = sizeof(Pack<T, kVec>) > 16 ? 2 : 4;
  static constexpr int kStep = kBlockOf<kThreads> * kVec;  // between a thread's slots

  const S* student;
  const T* teacher;
  S* kept_student;
  T* kept_teacher;
  int slots;
  int columns;
  int lane;

  // Calls each(student, teacher, column) for all vectors, where `column` is that of the first
  // element, and for the elements behind the last whole vector one by one.
  template <typename Each>
  DNKD_INLINE void read(const Each& each) const {
    const int vectors = columns / kVec;
#pragma unroll 1
    for (int k = 0, v = lane; v < vectors; k += kBatch, v += kBatch * kThreads) {
      Pack<S, kVec> s[kBatch];
      Pack<T, kVec> t[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int column = (v + i * kThreads) * kVec;
        if (v + i * kThreads < vectors) {
          s[i] = load_pack<S, kVec>(student + column);
          t[i] = load_pack<T, kVec>(teacher + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (v + i * kThreads < vectors) {
          if (k + i < slots) {
            store_pack(kept_student + (k + i) * kStep, s[i]);
            store_pack(kept_teacher + (k + i) * kStep, t[i]);
          }
          each(s[i], t[i], (v + i * kThreads) * kVec);
        }
      }
    }
    read_rest(each);
  }

  // The same, after read(): from shared memory as far as that went.
  template <typename Each>
  DNKD_INLINE void read_again(const Each& each) const {
    const int vectors = columns / kVec;
#pragma unroll 1
    for (int k = 0, v = lane; v < vectors; ++k, v += kThreads) {
      Pack<S, kVec> s;
      Pack<T, kVec> t;
      if (k < slots) {
        s = load_pack<S, kVec>(kept_student + k * kStep);
        t = load_pack<T, kVec>(kept_teacher + k * kStep);
      } else {
        s = load_pack<S, kVec>(student + v * kVec);
        t = load_pack<T, kVec>(teacher + v * kVec);
      }
      each(s, t, v * kVec);
    }
    read_rest(each);
  }

  template <typename Each>
  DNKD_INLINE void read_rest(const Each& each) const {
    if constexpr (kVec > 1) {
      const int column = columns / kVec * kVec + lane;
      if (column < columns) {
        each(load_pack<S, 1>(student + column), load_pack<T, 1>(teacher + column), column);
      }
    }
  }
};

// Calls each(student, teacher, column, position in the vector) for groups of a vector's elements.
template <typename S, typename T, int kCount, typename Each>
DNKD_INLINE void in_groups(const Pack<S, kCount>& s, const Pack<T, kCount>& t, int column,
                           const Each& each) {
  constexpr int kSize = kCount < kGroup ? kCount : kGroup;
#pragma unroll
  for (int g = 0; g < kCount; g += kSize) {
    Pack<S, kSize> a;
    Pack<T, kSize> b;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      a.elements[i] = s.elements[g + i];
      b.elements[i] = t.elements[g + i];
    }
    each(a, b, column + g, g);
  }
}

// What is formed of each element of a group.
template <typename A, int kCount>
struct Exponentials {
  A centred[kCount];     // z'
  A difference[kCount];  // s' t' - s z'
  A plain[kCount];       // exp(z')
  A student[kCount];     // exp(s z')
  A teacher[kCount];     // exp(s' t')
};

// `excluded`: position of the element that has no exponentials; outside the vector without any.
template <typename S, typename T, typename A, int kCount>
DNKD_INLINE Exponentials<A, kCount> exponentials(const Pack<S, kCount>& s, const Pack<T, kCount>& t,
                                                 const LogitRow<A>& row, int power, int excluded) {
  Exponentials<A, kCount> e;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    e.centred[i] = widen(s.elements[i]) - row.shift;
    const A u = row.scale * e.centred[i];
    const A v = row.teacher_scale * (static_cast<A>(widen(t.elements[i])) - row.teacher_shift);
    e.difference[i] = v - u;
    e.student[i] = exponential(u);
    e.teacher[i] = exponential(v);
    e.plain[i] = e.student[i];
  }
  if (power == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      e.plain[i] = exponential(e.centred[i]);
    }
  }
  for (int p = power; p > 1; p /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      e.plain[i] *= e.plain[i];
    }
  }
  if (static_cast<unsigned>(excluded) < kCount) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i == excluded) {
        e.plain[i] = e.student[i] = e.teacher[i] = 0;
      }
    }
  }
  return e;
}

// The gradient of a row. `label`: its position, or -1 without one.
template <typename A, typename Row, typename S>
DNKD_INLINE void write_gradient(S* out, const Row& data, const LogitRow<A>& row, int label,
                                bool decoupled, const A* probabilities, int power,
                                bool standardize) {
  data.read_again([&](const auto& student, const auto& teacher, int first) {
    auto result = student;
    in_groups(student, teacher, first, [&](const auto& s, const auto& t, int column, int position) {
      constexpr int kCount = sizeof(s.elements) / sizeof(s.elements[0]);
      const int at = label - column;
      const auto e = exponentials(s, t, row, power, decoupled ? at : -1);
      A value[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        value[i] = row.plain * e.plain[i] + row.student * e.student[i] +
                   row.teacher * e.teacher[i] + row.constant;
      }
      if (standardize) {  // otherwise 0, of a logit that may be infinite
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          value[i] += row.linear * e.centred[i];
        }
      }
      if (probabilities != nullptr) {
        const auto r = load_pack<A, kCount>(probabilities + column);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          value[i] += row.probability * r.elements[i];
        }
      }
      if (static_cast<unsigned>(at) < kCount) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          value[i] += i == at ? row.label : A(0);
        }
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        result.elements[position + i] = narrow<S>(value[i]);
      }
    });
    store_pack(out + first, result);
  });
}

// Fills the gradient of a row that is not read: 0, or NaN.
template <int kVec, int kThreads, typename S>
DNKD_INLINE void fill_gradient(S* out, int columns, int lane, typename Accumulate<S>::type value) {
  Pack<S, kVec> pack;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    pack.elements[i] = narrow<S>(value);
  }
  const int vectors = columns / kVec;
#pragma unroll 1
  for (int v = lane; v < vectors; v += kThreads) {
    store_pack(out + v * kVec, pack);
  }
  const int j = vectors * kVec + lane;
  if (j < columns) {
    out[j] = pack.elements[0];
  }
}

// What the sums over a row become; `label` is its position, or -1 without one. All threads of the
// row call it.
template <bool kDecoupled, typename A, typename Row, typename Buffers>
DNKD_INLINE LogitSums<A> sum_row(const Row& data, int label, const A* probabilities, int power,
                                 const LogitOptions<A>& options, Buffers& buffers, int& turn) {
  constexpr int kThreads = Row::kSharedBy;
  // The label's logit is left out of what DKD sums over.
  const int excluded = kDecoupled ? label : -1;
  A top[2] = {-A(__builtin_inff()), -A(__builtin_inff())};
  data.read([&](const auto& s, const auto& t, int column) {
    constexpr int kCount = sizeof(s.elements) / sizeof(s.elements[0]);
    const int at = excluded - column;
    const bool is_partial = static_cast<unsigned>(at) < kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!(is_partial && i == at)) {
        top[0] = larger(top[0], widen(s.elements[i]));
        top[1] = larger(top[1], static_cast<A>(widen(t.elements[i])));
      }
    }
  });
  row_largest<kThreads>(top, buffers, turn);

  LogitSums<A> sum = {};
  sum.shift = top[0];
  sum.teacher_shift = top[1];
  sum.scale = sum.teacher_scale = 1 / options.temperature;
  if (options.standardize) {
    A means[2] = {0, 0};
    data.read_again([&](const auto& s, const auto& t, int) {
      constexpr int kCount = sizeof(s.elements) / sizeof(s.elements[0]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        means[0] += widen(s.elements[i]) - sum.shift;
        means[1] += static_cast<A>(widen(t.elements[i])) - sum.teacher_shift;
      }
    });
    row_sum<kThreads>(means, buffers, turn);
    means[0] /= options.columns;
    means[1] /= options.columns;
    A squares[2] = {0, 0};
    data.read_again([&](const auto& s, const auto& t, int) {
      constexpr int kCount = sizeof(s.elements) / sizeof(s.elements[0]);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const A a = widen(s.elements[i]) - sum.shift - means[0];
        const A b = static_cast<A>(widen(t.elements[i])) - sum.teacher_shift - means[1];
        squares[0] += a * a;
        squares[1] += b * b;
      }
    });
    row_sum<kThreads>(squares, buffers, turn);
    const A freedom = options.columns > 1 ? options.columns - 1 : A(1);
    const A eps = static_cast<A>(1e-7);
    sum.mean = means[0];
    sum.deviation = square_root(squares[0] / freedom);
    sum.scale = 1 / (options.temperature * (sum.deviation + eps));
    sum.teacher_scale = 1 / (options.temperature * (square_root(squares[1] / freedom) + eps));
  }

  LogitRow<A> row = {};
  row.shift = sum.shift;
  row.teacher_shift = sum.teacher_shift;
  row.scale = sum.scale;
  row.teacher_scale = sum.teacher_scale;
  A sums[5] = {0, 0, 0, 0, 0};  // plain, student, teacher, difference, logits
  A rare[4] = {0, 0, 0, 0};     // probability, expected; student_moment, teacher_moment
  data.read_again([&](const auto& student, const auto& teacher, int first) {
    in_groups(student, teacher, first, [&](const auto& s, const auto& t, int column, int) {
      constexpr int kCount = sizeof(s.elements) / sizeof(s.elements[0]);
      const auto e = exponentials(s, t, row, power, excluded - column);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sums[0] += e.plain[i];
        sums[1] += e.student[i];
        sums[2] += e.teacher[i];
        // Where the teacher has no probability the student's may be as small as it likes.
        sums[3] += e.teacher[i] == 0 ? A(0) : e.teacher[i] * e.difference[i];
        sums[4] += e.centred[i];
      }
      if (probabilities != nullptr) {
        const auto r = load_pack<A, kCount>(probabilities + column);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          rare[0] += r.elements[i];
          rare[1] += r.elements[i] * e.centred[i];
        }
      }
      if (options.standardize) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          rare[2] += e.student[i] * e.centred[i];
          rare[3] += e.teacher[i] * e.centred[i];
        }
      }
    });
  });
  row_sum<kThreads>(sums, buffers, turn);
  if (probabilities != nullptr || options.standardize) {
    row_sum<kThreads>(rare, buffers, turn);
  }
  sum.plain = sums[0];
  sum.student = sums[1];
  sum.teacher = sums[2];
  sum.difference = sums[3];
  sum.logits = sums[4];
  sum.probability = rare[0];
  sum.expected = rare[1];
  sum.student_moment = rare[2];
  sum.teacher_moment = rare[3];
  if (label >= 0) {
    sum.label = widen(data.student[label]) - sum.shift;
    sum.teacher_label = static_cast<A>(widen(data.teacher[label])) - sum.teacher_shift;
  }
  return sum;
}

template <typename S, typename T, bool kDecoupled, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlockOf<kThreads>, kMinBlocks<S, kThreads>)
    logit_loss_forward_kernel(const __grid_constant__ LogitLossParams p,
                              const __grid_constant__ RowScratch scratch, int slots) {
  using A = typename Accumulate<S>::type;
  constexpr int kBlockThreads = kBlockOf<kThreads>;
  constexpr int kRowsPerBlock = kBlockThreads / kThreads;
  alignas(16) __shared__ A buffers[2][5][kThreads / kWarpSize];
  DNKD_DYNAMIC_SHARED(kept);
  const A nan = __builtin_nanf("");
  const bool is_none = p.reduction == Reduction::kNone;

  // The same for all rows; not in registers, of which there are few.
  __shared__ double weights[2], counts[2];  // of ce and kd; counts: what the sums are divided by
  __shared__ LogitOptions<A> options;
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
      const unsigned long long counted = counted_rows(scratch, p.rows);
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
  __syncthreads();
  const int power = power_of(p.has_ce, p.standardize, p.temperature);

  Columns<S, T, kVec, kThreads> data;
  data.slots = slots;
  data.columns = static_cast<int>(p.columns);
  data.lane = threadIdx.x % kThreads;
  data.kept_student = reinterpret_cast<S*>(kept) + threadIdx.x * kVec;
  data.kept_teacher =
      reinterpret_cast<T*>(reinterpret_cast<S*>(kept) + slots * data.kStep) + threadIdx.x * kVec;

  double totals[2] = {0, 0};  // of ce and kd
  int turn = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    // The same for all threads of a row, and with a block per row for the whole block: the
    // barriers in sum_row are reached by all or by none.
    int label = -1;
    bool is_ignored = false, is_bad = false;
    if (kDecoupled || (p.has_ce && p.probabilities == nullptr)) {
      const int64_t named = label_of(p.label, p.label_is_int32, row);
      is_ignored = p.probabilities == nullptr && named == p.ignore_index;
      is_bad = !is_ignored && (named < 0 || named >= p.columns);
      label = is_ignored || is_bad ? -1 : static_cast<int>(named);
    }
    data.student = static_cast<const S*>(p.student) + row * p.student_stride;
    data.teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    const A* probabilities =
        p.has_ce && p.probabilities != nullptr
            ? static_cast<const A*>(p.probabilities) + row * p.probabilities_stride
            : nullptr;
    const bool is_read = !kDecoupled || label >= 0;
    LogitTerms<A> terms = {};
    if (is_read) {
      const LogitSums<A> sum =
          sum_row<kDecoupled>(data, label, probabilities, power, options, buffers, turn);
      terms = logit_row_terms<kDecoupled>(sum, options, !is_ignored);
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
        totals[0] += static_cast<double>(terms.ce);
        totals[1] += static_cast<double>(terms.kd);
      }
      if (p.coefficients != nullptr) {
        static_cast<LogitRow<A>*>(p.coefficients)[row] = terms.row;
      }
    }
    if (p.gradient != nullptr) {
      S* out = static_cast<S*>(p.gradient) + row * p.columns;
      if (is_read && !is_bad) {
        write_gradient(out, data, terms.row, label, kDecoupled, probabilities, power,
                       p.standardize);
      } else {
        fill_gradient<kVec, kThreads>(out, data.columns, data.lane, is_bad ? nan : A(0));
      }
    }
  }

  if (!is_none && add_blocks<kBlockThreads>(totals, scratch) && threadIdx.x == 0) {
    const double ce = totals[0] / counts[0], kd = totals[1] / counts[1];
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
  Columns<S, T, kVec, kThreads> data;
  data.kept_student = nullptr;
  data.kept_teacher = nullptr;
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
      fill_gradient<kVec, kThreads>(out, data.columns, data.lane, terms.student);
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
    data.student = static_cast<const S*>(p.student) + row * p.student_stride;
    data.teacher = static_cast<const T*>(p.teacher) + row * p.teacher_stride;
    const A* probabilities =
        p.has_ce && p.probabilities != nullptr
            ? static_cast<const A*>(p.probabilities) + row * p.probabilities_stride
            : nullptr;
    write_gradient(out, data, terms, label, p.decoupled, probabilities, power, p.standardize);
  }
}

// -- launchers -----------------------------------------------------------------------------------

// Calls function(number of threads that share a row), as a constant.
template <typename Function>
int with_threads(int64_t columns, int vector, const Function& function) {
  const int64_t vectors = columns / vector;
  if (vectors <= kWarpSize * kWarpRounds) {
    return function(std::integral_constant<int, kWarpSize>{});
  }
  if (vectors <= kBlock * kBlockRounds) {
    return function(std::integral_constant<int, kBlock>{});
  }
  return function(std::integral_constant<int, kLargeBlock>{});
}

template <typename S, typename T, bool kDecoupled, int kVec>
int forward_with(const LogitLossParams& p, const RowScratch& scratch, void* stream) {
  return with_threads(p.columns, kVec, [&](auto threads) {
    constexpr int kThreads = decltype(threads)::value;
    constexpr int kBlockThreads = kBlockOf<kThreads>;
    constexpr auto kKernel = logit_loss_forward_kernel<S, T, kDecoupled, kVec, kThreads>;
    constexpr int kSlotBytes = kBlockThreads * kVec * static_cast<int>(sizeof(S) + sizeof(T));
    const int64_t wanted = (p.columns / kVec + kThreads - 1) / kThreads;
    const int64_t most = dynamic_shared_limit<kKernel>() / kSlotBytes;
    const int slots = static_cast<int>(wanted < most ? wanted : most);
    const int bytes = slots * kSlotBytes;
    const int64_t blocks =
        blocks_for<kKernel>(p.rows, kBlockThreads / kThreads, kBlockThreads, bytes);
    return launch_sharing(kKernel, blocks, kBlockThreads, bytes, stream, p, scratch, slots);
  });
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

template <typename S, typename T, typename Params>
bool can_read_vectors(const Params& p) {
  using A = typename Accumulate<S>::type;
  constexpr int kVec = kVectorWidth<S>;
  return rows_are_aligned<S>(p.student, p.student_stride, kVec) &&
         rows_are_aligned<T>(p.teacher, p.teacher_stride, kVec) &&
         (p.probabilities == nullptr ||
          rows_are_aligned<A>(p.probabilities, p.probabilities_stride, kVec)) &&
         (p.gradient == nullptr || rows_are_aligned<S>(p.gradient, p.columns, kVec));
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
