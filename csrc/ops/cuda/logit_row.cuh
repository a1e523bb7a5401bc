// What the losses on logits form of a row that Columns reads: its sums, and its gradient.
#pragma once

#include <type_traits>

#include "common/cluster.cuh"
#include "ops/cuda/logit_columns.cuh"
#include "ops/logit_loss.h"

namespace dnkd {
namespace {

#include "ops/logit_loss_terms.inc"

// Elements of a vector that are computed on together: registers for more would spill.
constexpr int kGroup = 4;

// How exp(z') follows from exp(s z') = exp(z' / T): its T-th power for an integer T, or 0: not.
DNKD_INLINE int power_of(bool has_ce, bool standardize, double temperature) {
  if (!has_ce) {
    return 1;  // multiplied by 0
  }
  const bool is_power = temperature == 1 || temperature == 2 || temperature == 4;
  return is_power && !standardize ? static_cast<int>(temperature) : 0;
}

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
  // `of_label` may be a place in shared memory, for want of registers.
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
  sum.shift = shift_of<kDecoupled>(top[0]);
  sum.teacher_shift = shift_of<kDecoupled>(top[1]);
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

}  // namespace
}  // namespace dnkd
