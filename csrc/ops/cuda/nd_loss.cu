#include "common/rows.cuh"
#include "ops/cuda/nd_rows.cuh"
#include "ops/nd_loss.h"

namespace dnkd {
namespace {

#include "ops/nd_loss_terms.inc"

// gradient row = alpha * direction + beta * student, by kThreads threads of which this is `lane`.
// The first kKept<S> vectors come from registers.
template <typename S, typename M, int kVec, int kThreads>
DNKD_INLINE void write_gradient(S* out, const S* student, const M* direction,
                                const Pack<S, kVec>* kept_student,
                                const Pack<M, kVec>* kept_direction,
                                typename Accumulate<S>::type alpha,
                                typename Accumulate<S>::type beta, int columns, int lane) {
  using A = typename Accumulate<S>::type;
  constexpr int kKeep = kKept<S>;
  const int vectors = columns / kVec;
  // A row without a gradient must not turn the NaN of an ignored row into NaN * 0; neither may a
  // row without a class read its direction.
  const bool is_constant = (alpha == 0 && beta == 0) || alpha != alpha;
  const auto value = [&](A s, A c) { return alpha * c + beta * s; };
  const auto put = [&](int v, const Pack<S, kVec>& s, const Pack<M, kVec>& c) {
    A values[kVec];
    if (is_constant) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        values[i] = alpha;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        values[i] = value(s[i], static_cast<A>(c[i]));
      }
    }
    store_pack<true>(out + static_cast<int64_t>(v) * kVec, Pack<S, kVec>::of(values));
  };
#pragma unroll
  for (int k = 0; k < kKeep; ++k) {
    const int v = lane + k * kThreads;
    if (v < vectors) {
      put(v, kept_student[k], kept_direction[k]);
    }
  }
  for (int v = lane + kKeep * kThreads; v < vectors; v += kThreads) {
    Pack<S, kVec> s = {};
    Pack<M, kVec> c = {};
    if (!is_constant) {
      s = load_pack<S, kVec>(student + static_cast<int64_t>(v) * kVec);
      c = load_pack<M, kVec>(direction + static_cast<int64_t>(v) * kVec);
    }
    put(v, s, c);
  }
  const int j = vectors * kVec + lane;
  if (j < columns) {
    out[j] = narrow<S>(is_constant ? alpha
                                   : value(widen(student[j]), static_cast<A>(widen(direction[j]))));
  }
}

template <typename S, typename M, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<S, M>)
    nd_loss_forward_kernel(const __grid_constant__ NdLossParams p,
                           const __grid_constant__ RowScratch scratch) {
  using A = typename Accumulate<S>::type;
  constexpr int kKeep = kKept<S>;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  __shared__ A row_buffers[2][4][kThreads / kWarpSize];
  const int lane = threadIdx.x % kThreads;
  const int columns = static_cast<int>(p.columns);
  const int vectors = columns / kVec;
  const A* teacher_norms = static_cast<const A*>(p.teacher_norms);

  double scale = p.loss_weight;
  if (p.weight != nullptr) {
    scale *= static_cast<double>(*static_cast<const A*>(p.weight));
  }
  if (p.reduction == Reduction::kMean) {
    const unsigned long long counted = counted_rows(scratch, p.rows);
    scale /= counted > 0 ? static_cast<double>(counted) : 1.0;
  }

  double sums[1] = {0};  // of row losses
  int turn = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
  // A row's reads wait for its label: that of the next one is under way while a row is computed.
  int64_t next_label = row < p.rows ? label_of(p.target, p.target_is_int32, row) : 0;
  for (; row < p.rows; row += step) {
    // The same for all threads of a row, and with a block per row for the whole block: the barrier
    // in row_sum is reached by all or by none.
    const int64_t label = next_label;
    if (row + step < p.rows) {
      next_label = label_of(p.target, p.target_is_int32, row + step);
    }
    const bool is_ignored = p.target != nullptr && label == p.ignore_index;
    const bool is_named = label >= 0 && label < p.classes;
    const bool is_read = is_named && !is_ignored;
    const S* student = static_cast<const S*>(p.student) + row * p.student_stride;
    const M* direction =
        static_cast<const M*>(p.directions) + (is_read ? label : 0) * p.directions_stride;
    Pack<S, kVec> kept_student[kKeep];
    Pack<M, kVec> kept_direction[kKeep];
    NdRowTerms<A> terms = {0, 0, 0};
    if (is_read) {
      const S* teacher = p.teacher == nullptr
                             ? nullptr
                             : static_cast<const S*>(p.teacher) + row * p.teacher_stride;
#include "ops/cuda/nd_row_sums.inc"
      row_sum<kThreads>(dots, row_buffers, turn);
      const A teacher_norm = teacher != nullptr         ? square_root(dots[3])
                             : teacher_norms != nullptr ? teacher_norms[row]
                                                        : A(0);
      terms = nd_row_terms<A>(dots[0], dots[1], dots[2], teacher_norm, static_cast<A>(p.eps));
    } else if (!is_ignored) {
      const A nan = __builtin_nanf("");
      terms = {nan, nan, nan};
    }
    // Not 0 * scale, which is NaN for an infinite weight.
    const A alpha = is_ignored ? A(0) : terms.alpha * static_cast<A>(scale);
    const A beta = is_ignored ? A(0) : terms.beta * static_cast<A>(scale);
    if (lane == 0) {
      if (p.reduction == Reduction::kNone) {
        static_cast<A*>(p.loss)[row] = is_ignored ? A(0) : terms.loss * static_cast<A>(scale);
      } else {
        sums[0] += static_cast<double>(terms.loss);
      }
      if (p.coefficients != nullptr) {
        static_cast<A*>(p.coefficients)[2 * row] = alpha;
        static_cast<A*>(p.coefficients)[2 * row + 1] = beta;
      }
    }
    if (p.gradient != nullptr) {
      write_gradient<S, M, kVec, kThreads>(static_cast<S*>(p.gradient) + row * p.columns, student,
                                           direction, kept_student, kept_direction, alpha, beta,
                                           columns, lane);
    }
  }

  if (p.reduction == Reduction::kNone) {
    return;
  }
  if (add_blocks<kBlock>(sums, scratch) && threadIdx.x == 0) {
    nd_write_loss<A>(p, sums[0], scale);
  }
}

template <typename S, typename M, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<S, M>)
    nd_loss_backward_kernel(const __grid_constant__ NdLossBackwardParams p) {
  using A = typename Accumulate<S>::type;
  constexpr int kKeep = kKept<S>;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  const int lane = threadIdx.x % kThreads;
  const int columns = static_cast<int>(p.columns);
  const int vectors = columns / kVec;
  const A* coefficients = static_cast<const A*>(p.coefficients);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    A alpha = coefficients[2 * row];
    A beta = coefficients[2 * row + 1];
    const S* student = static_cast<const S*>(p.student) + row * p.student_stride;
    const M* direction = static_cast<const M*>(p.directions);
    Pack<S, kVec> kept_student[kKeep] = {};
    Pack<M, kVec> kept_direction[kKeep] = {};
    // Rows without a gradient stay 0 whatever comes from upstream; NaN marks rows whose label may
    // name no class.
    if (alpha != 0 || beta != 0) {
      const A up = static_cast<const A*>(p.upstream)[row * p.upstream_stride];
      const int64_t label = label_of(p.target, p.target_is_int32, row);
      if (label < 0 || label >= p.classes) {
        alpha = __builtin_nanf("");
      } else if (alpha == alpha) {
        direction += label * p.directions_stride;
#pragma unroll
        for (int k = 0; k < kKeep; ++k) {
          const int v = lane + k * kThreads;
          if (v < vectors) {
            kept_student[k] = load_pack<S, kVec>(student + static_cast<int64_t>(v) * kVec);
            kept_direction[k] = load_pack<M, kVec>(direction + static_cast<int64_t>(v) * kVec);
          }
        }
      }
      alpha *= up;
      beta *= up;
    }
    write_gradient<S, M, kVec, kThreads>(static_cast<S*>(p.gradient) + row * p.columns, student,
                                         direction, kept_student, kept_direction, alpha, beta,
                                         columns, lane);
  }
}

// -- launchers -----------------------------------------------------------------------------------

template <typename S, typename M, int kVec>
int forward_with(const NdLossParams& p, const RowScratch& scratch, void* stream) {
  if (takes_a_block<S>(p.columns, kVec)) {
    constexpr auto kKernel = nd_loss_forward_kernel<S, M, kVec, kBlock>;
    return launch(kKernel, blocks_for<kKernel>(p.rows, 1, kBlock), kBlock, stream, p, scratch);
  }
  constexpr auto kKernel = nd_loss_forward_kernel<S, M, kVec, kWarpSize>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, kBlock / kWarpSize, kBlock), kBlock, stream, p,
                scratch);
}

template <typename S, typename M>
int forward(const NdLossParams& p, const RowScratch& scratch, void* stream) {
  constexpr int kVec = kVectorWidth<S>;
  const bool aligned =
      rows_are_aligned<S>(p.student, p.student_stride, kVec) &&
      (p.teacher == nullptr || rows_are_aligned<S>(p.teacher, p.teacher_stride, kVec)) &&
      rows_are_aligned<M>(p.directions, p.directions_stride, kVec) &&
      (p.gradient == nullptr || rows_are_aligned<S>(p.gradient, p.columns, kVec));
  return aligned ? forward_with<S, M, kVec>(p, scratch, stream)
                 : forward_with<S, M, 1>(p, scratch, stream);
}

template <typename S, typename M, int kVec>
int backward_with(const NdLossBackwardParams& p, void* stream) {
  if (takes_a_block<S>(p.columns, kVec)) {
    constexpr auto kKernel = nd_loss_backward_kernel<S, M, kVec, kBlock>;
    return launch(kKernel, blocks_for<kKernel>(p.rows, 1, kBlock), kBlock, stream, p);
  }
  constexpr auto kKernel = nd_loss_backward_kernel<S, M, kVec, kWarpSize>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, kBlock / kWarpSize, kBlock), kBlock, stream,
                p);
}

template <typename S, typename M>
int backward(const NdLossBackwardParams& p, void* stream) {
  constexpr int kVec = kVectorWidth<S>;
  const bool aligned = rows_are_aligned<S>(p.student, p.student_stride, kVec) &&
                       rows_are_aligned<M>(p.directions, p.directions_stride, kVec) &&
                       rows_are_aligned<S>(p.gradient, p.columns, kVec);
  return aligned ? backward_with<S, M, kVec>(p, stream) : backward_with<S, M, 1>(p, stream);
}

}  // namespace

int64_t nd_loss_scratch_bytes_cuda(const NdLossParams& p) { return row_scratch_bytes(p.rows, 1); }

int nd_loss_forward_cuda(const NdLossParams& p, void* scratch_bytes, void* stream) {
  if (p.rows == 0 && p.reduction == Reduction::kNone) {
    return 0;
  }
  RowScratch scratch;
  const int error = prepare_rows(scratch, scratch_bytes, p.target, p.target_is_int32, p.rows,
                                 p.ignore_index, p.reduction, stream);
  if (error != 0) {
    return error;
  }
  return nd_dispatch(p, [&](auto student, auto direction) {
    return forward<decltype(student), decltype(direction)>(p, scratch, stream);
  });
}

int nd_loss_backward_cuda(const NdLossBackwardParams& p, void* stream) {
  if (p.rows == 0) {
    return 0;
  }
  return nd_dispatch(p, [&](auto student, auto direction) {
    return backward<decltype(student), decltype(direction)>(p, stream);
  });
}

}  // namespace dnkd
