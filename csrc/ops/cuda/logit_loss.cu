#include <type_traits>

#include "common/cluster.cuh"
#include "common/rows.cuh"
#include "ops/logit_loss.h"

namespace dnkd {
namespace {

#include "ops/logit_loss_terms.inc"

static_assert(sizeof(LogitRow<float>) == kLogitCoefficients * sizeof(float),
              "coefficients are rows of LogitRow");

// A row is shared by a warp, a block or a large block: the smallest that takes it in few rounds.
// What a large block's shared memory and registers do not keep of a row, the blocks of a cluster
// keep together, or without clusters a huge block.
constexpr int kBlock = 128;
constexpr int kClusterBlock = 256;
constexpr int kLargeBlock = 320;
constexpr int kHugeBlock = 512;
// Vectors per thread up to which a warp, and a block, take a row.
constexpr int kWarpRounds = 4;
constexpr int kBlockRounds = 8;
// Rows that larger blocks count with 32 bits, as good as all there is memory for.
constexpr int64_t kMostLongRows = 1 << 30;
// Elements of a vector that are computed on together: registers for more would spill.
constexpr int kGroup = 4;

template <int kThreads>
constexpr int kBlockOf = kThreads > kBlock ? kThreads : kBlock;

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

// How exp(z') follows from exp(s z') = exp(z' / T): its T-th power for an integer T, or 0: not.
DNKD_INLINE int power_of(bool has_ce, bool standardize, double temperature) {
  if (!has_ce) {
    return 1;  // multiplied by 0
  }
  const bool is_power = temperature == 1 || temperature == 2 || temperature == 4;
  return is_power && !standardize ? static_cast<int>(temperature) : 0;
}

// Vectors of a row that each thread of a large or huge block keeps in registers where the shared
// memory does not take all: one less where a vector is larger, or for DKD.
constexpr int kLargeRegisters = 2, kHugeRegisters = 3;
template <typename S, typename T, bool kDecoupled, int kVec, int kThreads>
constexpr int kInRegisters =
    kThreads <= kClusterBlock || sizeof(S) == 8 || kVec == 1 ? 0
    : kThreads > kLargeBlock ? kHugeRegisters - (sizeof(T) > sizeof(S) ? 1 : 0)
                             : kLargeRegisters - (sizeof(T) > sizeof(S) || kDecoupled ? 1 : 0);
// Vectors that are under way at a time, of those that are not kept. There are none where registers
// keep some, and where a block is small or of a cluster: those are for rows that shared memory
// takes. From sm_100 on nvcc 13 spills where there is more than one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBatched = 1;
#else
constexpr int kMostBatched = 4;
#endif
template <typename T, int kVec, int kThreads, int kRegisters>
constexpr int kBatch = kRegisters > 0 || (kThreads <= kClusterBlock && kVec > 1) ? 1
                       : kVec > 1 && sizeof(Pack<T, kVec>) > 16 ? (kMostBatched + 1) / 2
                       : kVec > 1                               ? kMostBatched
                                                                : 4;

// Where a row begins, and its first vector: where the student's lies as one in memory. The
// teacher's and what else is read or written as vectors lies alike, see can_read_vectors().
template <typename S, typename T, int kVec>
struct RowAt {
  const S* student_vectors;
  const T* teacher_vectors;
  int head = 0;     // elements before the first vector
  int vectors = 0;  // whole ones

  DNKD_INLINE RowAt(const S* student, const T* teacher, int columns) {
    if constexpr (kVec > 1) {
      head = static_cast<int>((0 - reinterpret_cast<uint64_t>(student) / sizeof(S)) & (kVec - 1));
      head = head < columns ? head : columns;
    }
    vectors = (columns - head) / kVec;
    student_vectors = kept_pointer(student + head);
    teacher_vectors = kept_pointer(teacher + head);
  }
  // The logits in a column.
  DNKD_INLINE const S* student_at(int column) const { return student_vectors + (column - head); }
  DNKD_INLINE const T* teacher_at(int column) const { return teacher_vectors + (column - head); }
};

// The columns of a row, read by kThreads threads of which this is `lane`, kVec at a time. Of what a
// thread reads it keeps the first `slots` vectors in shared memory that only it uses, and the next
// kRegisters in registers; the others it reads again, kBatched under way at a time. While a row is
// read for the last time the next one takes its place.
template <typename S, typename T, int kVec, int kThreadsOfBlock_, int kBlocks_, int kRegisters,
          int kBatched>
struct Columns {
  using Row = RowAt<S, T, kVec>;
  using OfStudent = Staged<S, kVec>;
  using OfTeacher = Staged<T, kVec>;
  static constexpr int kThreadsOfBlock = kThreadsOfBlock_;  // those that share the row
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = kThreadsOfBlock * kBlocks;
  static constexpr int kAll = kBlockOf<kThreadsOfBlock>;
  static constexpr int kStudentBytes = OfStudent::bytes_of(kAll);
  static constexpr int kSlotBytes = kStudentBytes + OfTeacher::bytes_of(kAll);
  using LargestStudent = Largest<S>;
  using LargestTeacher = Largest<T>;

  Row row;
  const char* kept;
  SharedAddress kept_address;
  int slots;
  int columns;
  int lane;
  Pack<S, kVec> student_in_registers[kRegisters > 0 ? kRegisters : 1];
  Pack<T, kVec> teacher_in_registers[kRegisters > 0 ? kRegisters : 1];

  // Begins to read a row's vector v, of slot k, or of the k-th that is kept in registers.
  DNKD_INLINE void fetch_slot(const Row& of, int k, int v) const {
    const SharedAddress to = kept_address + k * kSlotBytes;
    OfStudent::template fetch<kAll>(to, of.student_vectors + v * kVec);
    OfTeacher::template fetch<kAll>(to + kStudentBytes, of.teacher_vectors + v * kVec);
  }
  DNKD_INLINE void fetch_register(const Row& of, int k, int v) {
    student_in_registers[k] = load_pack<S, kVec>(of.student_vectors + v * kVec);
    teacher_in_registers[k] = load_pack<T, kVec>(of.teacher_vectors + v * kVec);
  }
  // Begins to read all that is kept of a row; arrived() waits for it.
  DNKD_INLINE void fetch(const Row& of) {
    int v = lane;
    if constexpr (kVec > 1) {
      for (int k = 0; k < slots && v < of.vectors; ++k, v += kThreads) {
        fetch_slot(of, k, v);
      }
    }
#pragma unroll
    for (int k = 0; k < kRegisters; ++k) {
      v = lane + (slots + k) * kThreads;
      if (v < of.vectors) {
        fetch_register(of, k, v);
      }
    }
    end_copy_group();
  }
  DNKD_INLINE void arrived() const { wait_for_groups<0>(); }

  // Whether this thread reads the element in a column, and writes what becomes of it.
  DNKD_INLINE bool is_own(int column) const {
    const int v = (column - row.head) / kVec;
    const bool is_beside = column < row.head || v >= row.vectors;
    const int owner = column < row.head ? column
                      : is_beside       ? column - row.vectors * kVec
                                        : v % kThreads;
    return column >= 0 && owner == lane;
  }

  // Calls each(student, teacher, column) for all vectors, where `column` is that of the first
  // element, and for the elements beside whole vectors one by one.
  template <typename Each>
  DNKD_INLINE void read(const Each& each) {
    visit<false>(row, false, each);
  }
  // The same for the last time: the next row, if there is one, is fetched behind it.
  template <typename Each>
  DNKD_INLINE void read_last(const Row& next, bool has_next, const Each& each) {
    visit<true>(next, has_next, each);
    end_copy_group();
  }

 private:
  template <bool kLast, typename Each>
  DNKD_INLINE void visit(const Row next, bool has_next, const Each& each) {
    const int end = row.vectors, head = row.head;
    const int next_end = kLast && has_next ? next.vectors : 0;
    int v = lane;
    if constexpr (kVec > 1) {  // elements one by one have no slots
      const auto in_slots = [&](int vectors) {
        const int own = vectors > lane ? (vectors - lane + kThreads - 1) / kThreads : 0;
        return own < slots ? own : slots;
      };
      const auto each_slot = [&](int k) {
        const char* at = kept + k * kSlotBytes;
        each(OfStudent::template load<kAll>(at), OfTeacher::template load<kAll>(at + kStudentBytes),
             head + v * kVec);
      };
      const int here = in_slots(end);
      int k = 0;
      if constexpr (kLast) {
        const int there = in_slots(next_end);  // rows may have a vector more or less
        const int both = here < there ? here : there;
#pragma unroll 1
        for (; k < both; ++k, v += kThreads) {
          each_slot(k);
          fetch_slot(next, k, v);
        }
        if (k < there) {
          fetch_slot(next, k, v);
        }
      }
#pragma unroll 1
      for (; k < here; ++k, v += kThreads) {
        each_slot(k);
      }
    }
    if constexpr (kRegisters > 0) {
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) {
        v = lane + (slots + r) * kThreads;
        if (v < end) {
          each(student_in_registers[r], teacher_in_registers[r], head + v * kVec);
        }
        if (kLast && v < next_end) {
          fetch_register(next, r, v);
        }
      }
    }
    v = lane + (slots + kRegisters) * kThreads;
#pragma unroll 1
    for (; v < end; v += kBatched * kThreads) {
      Pack<S, kVec> s[kBatched];
      Pack<T, kVec> t[kBatched];
#pragma unroll
      for (int i = 0; i < kBatched; ++i) {
        const int element = (v + i * kThreads) * kVec;
        if (v + i * kThreads < end) {
          s[i] = load_pack<S, kVec>(row.student_vectors + element);
          t[i] = load_pack<T, kVec>(row.teacher_vectors + element);
        }
      }
#pragma unroll
      for (int i = 0; i < kBatched; ++i) {
        if (v + i * kThreads < end) {
          each(s[i], t[i], head + (v + i * kThreads) * kVec);
        }
      }
    }
    if constexpr (kVec > 1) {
      static_assert(2 * kVec <= kWarpSize, "an element for every thread");
      const int column = lane < head ? lane : lane + end * kVec;
      if (column < columns) {
        each(load_pack<S, 1>(row.student_at(column)), load_pack<T, 1>(row.teacher_at(column)),
             column);
      }
    }
  }
};

// The power is asked for where the code is not made for one.
constexpr int kAnyPower = -1;

// Calls function(the power as a constant), with the usual power or with kAnyPower. Small blocks are
// for short rows, which gain nothing.
template <int kThreads, typename Function>
DNKD_INLINE void with_power(int power, const Function& function) {
  if constexpr (kThreads > kBlock) {
    if (power == 4) {
      function(std::integral_constant<int, 4>{});
      return;
    }
  }
  function(std::integral_constant<int, kAnyPower>{});
}

// What the exponentials of a row are formed with.
template <typename A>
struct Scales {
  static constexpr A kUnit = static_cast<A>(Exponent<A>::kPerNatural);
  A shift;
  A teacher_shift;
  A units;          // times z', the exponent of the student
  A teacher_units;  // times t', that of the teacher
  int power;        // power_of()

  DNKD_INLINE Scales(const LogitRow<A>& row, int power_)
      : shift(row.shift),
        teacher_shift(row.teacher_shift),
        units(row.scale * kUnit),
        teacher_units(row.teacher_scale * kUnit),
        power(power_) {}
};

// What is formed of each element of a group.
template <typename A, int kCount>
struct Exponentials {
  A difference[kCount];  // of the teacher's exponent and the student's
  A plain[kCount];       // exp(z')
  A student[kCount];     // exp(s z')
  A teacher[kCount];     // exp(s' t')
};

// Of logits less their shifts. A difference and a product: of a product and a rounded offset the
// largest logit would not give exactly 1, nor a sure row a loss of exactly 0.
template <int kSize, int kPower, typename A>
DNKD_INLINE Exponentials<A, kSize> exponentials_of(const A* student, const A* teacher,
                                                   const Scales<A>& scales) {
  const int power = kPower == kAnyPower ? scales.power : kPower;
  Exponentials<A, kSize> e;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const A u = scales.units * student[i];
    const A v = scales.teacher_units * teacher[i];
    e.difference[i] = v - u;
    e.student[i] = exp_of_units(u);
    e.teacher[i] = exp_of_units(v);
    e.plain[i] = e.student[i];
  }
  if (power == 4) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      e.plain[i] *= e.plain[i];
      e.plain[i] *= e.plain[i];
    }
  } else if (power == 0) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      e.plain[i] = exp_of_units(student[i] * Scales<A>::kUnit);
    }
  } else if (power == 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      e.plain[i] *= e.plain[i];
    }
  }
  return e;
}

// Of kSize elements from `first` on. kExcludes: the one at position `excluded`, counted from there,
// has no exponentials.
template <int kSize, bool kExcludes, int kPower, typename S, typename T, typename A, int kVec>
DNKD_INLINE Exponentials<A, kSize> exponentials(const Pack<S, kVec>& s, const Pack<T, kVec>& t,
                                                int first, const Scales<A>& scales, int excluded) {
  A student[kSize], teacher[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    student[i] = s[first + i] - scales.shift;
    teacher[i] = static_cast<A>(t[first + i]) - scales.teacher_shift;
  }
  auto e = exponentials_of<kSize, kPower>(student, teacher, scales);
  if constexpr (kExcludes) {
    if (static_cast<unsigned>(excluded) < kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i == excluded) {
          e.plain[i] = e.student[i] = e.teacher[i] = 0;
        }
      }
    }
  }
  return e;
}

// A row's label: its column, or -1 without one, and both logits less their shifts.
template <typename A>
struct LabelOf {
  int column;
  A student;
  A teacher;
};

// The gradient of a row, behind which the next one is fetched. kPlain: without probabilities and
// standardization.
template <bool kPlain, typename A, typename Row, typename S>
DNKD_INLINE void write_gradient(S* out, Row& data, const typename Row::Row& next, bool has_next,
                                const LogitRow<A>& row, const LabelOf<A>& label, A& of_label,
                                bool decoupled, const A* probabilities, int power,
                                bool standardize) {
  const Scales<A> scales(row, power);
  const auto value_of = [&](A plain, A student, A teacher) {
    return row.plain * plain + (row.student * student + (row.teacher * teacher + row.constant));
  };
  // The label's gradient has a term of its own, and with DKD no exponentials. It is formed once and
  // written over what the loop makes of that element, by the thread that writes it there.
  // `of_label` is this row's place in shared memory, for want of registers.
  const bool has_label = data.is_own(label.column);
  if (has_label) {
    Exponentials<A, 1> e = {};
    if (!decoupled) {
      e = exponentials_of<1, kAnyPower>(&label.student, &label.teacher, scales);
    }
    A value = value_of(e.plain[0], e.student[0], e.teacher[0]) + row.label;
    if constexpr (!kPlain) {
      value += standardize ? row.linear * label.student : A(0);
      value += probabilities != nullptr ? row.probability * probabilities[label.column] : A(0);
    }
    of_label = value;
  }
  const auto pass = [&](auto constant) {
    constexpr int kPower = decltype(constant)::value;
    data.read_last(next, has_next, [&](const auto& s, const auto& t, int column) {
      constexpr int kVec = std::decay_t<decltype(s)>::kCount;
      constexpr int kSize = kVec < kGroup ? kVec : kGroup;
      A value[kVec];
#pragma unroll
      for (int g = 0; g < kVec; g += kSize) {
        const auto e = exponentials<kSize, false, kPower>(s, t, g, scales, -1);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          value[g + i] = value_of(e.plain[i], e.student[i], e.teacher[i]);
        }
      }
      if constexpr (!kPlain) {
        if (standardize) {  // otherwise 0, of a logit that may be infinite
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            value[i] += row.linear * (s[i] - row.shift);
          }
        }
        if (probabilities != nullptr) {
          const auto r = load_pack<A, kVec>(probabilities + column);
#pragma unroll
          for (int i = 0; i < kVec; ++i) {
            value[i] += row.probability * r[i];
          }
        }
      }
      store_pack(out + column, Pack<S, kVec>::of(value));
    });
  };
  if constexpr (kPlain) {
    with_power<Row::kAll>(power, pass);
  } else {
    pass(std::integral_constant<int, kAnyPower>{});
  }
  if (has_label) {
    store_element(out + label.column, narrow<S>(of_label));
  }
}

template <typename A, typename Row, typename S>
DNKD_INLINE void write_gradient(S* out, Row& data, const typename Row::Row& next, bool has_next,
                                const LogitRow<A>& row, const LabelOf<A>& label, A& of_label,
                                bool decoupled, const A* probabilities, int power,
                                bool standardize) {
  if (probabilities != nullptr || standardize) {
    write_gradient<false>(out, data, next, has_next, row, label, of_label, decoupled, probabilities,
                          power, standardize);
  } else {
    write_gradient<true>(out, data, next, has_next, row, label, of_label, decoupled, probabilities,
                         power, standardize);
  }
}

// Fills the gradient of a row that is not read: 0, or NaN.
template <typename S, typename Row>
DNKD_INLINE void fill_gradient(S* out, const Row& data, typename Accumulate<S>::type value) {
  const S narrowed = narrow<S>(value);
#pragma unroll 1
  for (int j = data.lane; j < data.columns; j += Row::kThreads) {
    out[j] = narrowed;
  }
}

// What the sums over a row become; `label` is its position, or -1 without one. All threads of the
// row call it.
template <bool kDecoupled, typename A, typename Row, typename Buffers>
DNKD_INLINE LogitSums<A> sum_row(Row& data, int label, const A* probabilities, int power,
                                 const LogitOptions<A>& options, Buffers& buffers, int& turn) {
  const auto add = [&](auto& values) {
    if constexpr (Row::kBlocks > 1) {
      cluster_sum<Row::kThreadsOfBlock, Row::kBlocks>(values, buffers, turn);
    } else {
      row_sum<Row::kThreadsOfBlock>(values, buffers, turn);
    }
  };
  // The label's logit is left out of what DKD sums over.
  const int excluded = kDecoupled ? label : -1;
  typename Row::LargestStudent student_top;
  typename Row::LargestTeacher teacher_top;
  data.read([&](const auto& s, const auto& t, int column) {
    constexpr int kVec = std::decay_t<decltype(s)>::kCount;
    const int at = excluded - column;
    if (kDecoupled && static_cast<unsigned>(at) < kVec) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        if (i != at) {
          student_top.add(s[i]);
          teacher_top.add(t[i]);
        }
      }
    } else {
      student_top.add(s);
      teacher_top.add(t);
    }
  });
  A top[2] = {student_top.result(), static_cast<A>(teacher_top.result())};
  if constexpr (Row::kBlocks > 1) {
    cluster_largest<Row::kThreadsOfBlock, Row::kBlocks>(top, buffers, turn);
  } else {
    row_largest<Row::kThreadsOfBlock>(top, buffers, turn);
  }

  LogitSums<A> sum = {};
  sum.shift = top[0];
  sum.teacher_shift = top[1];
  sum.scale = sum.teacher_scale = 1 / options.temperature;
  if (options.standardize) {
    A means[2] = {0, 0};
    data.read([&](const auto& s, const auto& t, int) {
      constexpr int kVec = std::decay_t<decltype(s)>::kCount;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        means[0] += s[i] - sum.shift;
        means[1] += static_cast<A>(t[i]) - sum.teacher_shift;
      }
    });
    add(means);
    means[0] /= options.columns;
    means[1] /= options.columns;
    A squares[2] = {0, 0};
    data.read([&](const auto& s, const auto& t, int) {
      constexpr int kVec = std::decay_t<decltype(s)>::kCount;
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const A a = s[i] - sum.shift - means[0];
        const A b = static_cast<A>(t[i]) - sum.teacher_shift - means[1];
        squares[0] += a * a;
        squares[1] += b * b;
      }
    });
    add(squares);
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
  const Scales<A> scales(row, power);
  A sums[4] = {0, 0, 0, 0};  // plain, student, teacher, difference
  with_power<Row::kAll>(power, [&](auto constant) {
    constexpr int kPower = decltype(constant)::value;
    data.read([&](const auto& s, const auto& t, int column) {
      constexpr int kVec = std::decay_t<decltype(s)>::kCount;
      constexpr int kSize = kVec < kGroup ? kVec : kGroup;
#pragma unroll
      for (int g = 0; g < kVec; g += kSize) {
        const auto e =
            exponentials<kSize, kDecoupled, kPower>(s, t, g, scales, excluded - column - g);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          sums[0] += e.plain[i];
          sums[1] += e.student[i];
          sums[2] += e.teacher[i];
          if (e.teacher[i] != 0) {  // else the student's probability may be as small as it likes
            sums[3] += e.teacher[i] * e.difference[i];
          }
        }
      }
    });
  });
  add(sums);
  sum.plain = sums[0];
  sum.student = sums[1];
  sum.teacher = sums[2];
  sum.difference = sums[3] / Scales<A>::kUnit;
  // What only some calls want is read for by itself.
  if (probabilities != nullptr || (options.has_ce && options.smoothing != 0)) {
    A expectations[3] = {0, 0, 0};  // logits, probability, expected
    data.read([&](const auto& s, const auto&, int column) {
      constexpr int kVec = std::decay_t<decltype(s)>::kCount;
      Pack<A, kVec> r = {};
      if (probabilities != nullptr) {
        r = load_pack<A, kVec>(probabilities + column);
      }
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const A z = s[i] - sum.shift;
        expectations[0] += z;
        expectations[1] += r[i];
        expectations[2] += probabilities == nullptr ? A(0) : r[i] * z;
      }
    });
    add(expectations);
    sum.logits = expectations[0];
    sum.probability = expectations[1];
    sum.expected = expectations[2];
  }
  if (options.standardize) {
    A moments[2] = {0, 0};  // of the student's exponentials, of the teacher's
    data.read([&](const auto& s, const auto& t, int column) {
      constexpr int kVec = std::decay_t<decltype(s)>::kCount;
      constexpr int kSize = kVec < kGroup ? kVec : kGroup;
#pragma unroll
      for (int g = 0; g < kVec; g += kSize) {
        const auto e =
            exponentials<kSize, kDecoupled, kAnyPower>(s, t, g, scales, excluded - column - g);
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          const A z = s[g + i] - sum.shift;
          moments[0] += e.student[i] == 0 ? A(0) : e.student[i] * z;
          moments[1] += e.teacher[i] == 0 ? A(0) : e.teacher[i] * z;
        }
      }
    });
    add(moments);
    sum.student_moment = moments[0];
    sum.teacher_moment = moments[1];
  }
  if (label >= 0) {
    sum.label = widen(*data.row.student_at(label)) - sum.shift;
    sum.teacher_label = static_cast<A>(widen(*data.row.teacher_at(label))) - sum.teacher_shift;
  }
  return sum;
}

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
  __shared__ A label_gradients[kRowsPerBlock];
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
  int rank = 0;
  if constexpr (kBlocks > 1) {
    begin_exchange(buffers);
    rank = cluster_rank();
  } else {
    __syncthreads();
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
                     label_gradients[threadIdx.x / kThreads], kDecoupled, probabilities, power,
                     p.standardize);
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
  int64_t clusters() const { return resident_clusters<kKernel>(kBlocks, kBlockThreads, bytes()); }

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
