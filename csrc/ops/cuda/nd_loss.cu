#include "common/device.cuh"
#include "ops/cuda/nd_rows.cuh"
#include "ops/nd_loss.h"

namespace dnkd {
namespace {

#include "ops/nd_loss_terms.inc"

constexpr int kCountBlocks = 64;

// Device scratch of the forward pass.
struct Scratch {
  unsigned* ticket;            // blocks that have finished
  unsigned long long* counts;  // [count_blocks] counted rows, by the blocks of the count kernel
  double* partial;             // [blocks] sums of row losses
  int count_blocks;            // 0 where the number of counted rows is that of all rows
};

constexpr int64_t kCountsOffset = 16;
constexpr int64_t kPartialOffset = kCountsOffset + kCountBlocks * sizeof(unsigned long long);

// Counts the rows that are not ignored, and clears the ticket.
__global__ void __launch_bounds__(kBlock)
    nd_loss_count_kernel(const __grid_constant__ NdLossParams p,
                         const __grid_constant__ Scratch scratch) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *scratch.ticket = 0;
  }
  if (scratch.count_blocks == 0) {
    return;
  }
  unsigned long long counted = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < p.rows; i += step) {
    counted += label_of(p.target, p.target_is_int32, i) != p.ignore_index;
  }
  counted = block_sum<kBlock>(counted);
  if (threadIdx.x == 0) {
    scratch.counts[blockIdx.x] = counted;
  }
}

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
  const auto value = [&](S s, M c) {
    return narrow<S>(alpha * static_cast<A>(widen(c)) + beta * widen(s));
  };
  const auto put = [&](int v, const Pack<S, kVec>& s, const Pack<M, kVec>& c) {
    Pack<S, kVec> result;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      result.elements[i] = is_constant ? narrow<S>(alpha) : value(s.elements[i], c.elements[i]);
    }
    store_pack(out + static_cast<int64_t>(v) * kVec, result);
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
    out[j] = is_constant ? narrow<S>(alpha) : value(student[j], direction[j]);
  }
}

template <typename S, typename M, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
    nd_loss_forward_kernel(const __grid_constant__ NdLossParams p,
                           const __grid_constant__ Scratch scratch) {
  using A = typename Accumulate<S>::type;
  constexpr int kKeep = kKept<S>;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  __shared__ A row_buffers[2][4][kThreads / kWarpSize];
  __shared__ bool is_last;
  const int lane = threadIdx.x % kThreads;
  const int columns = static_cast<int>(p.columns);
  const A* teacher_norms = static_cast<const A*>(p.teacher_norms);

  double scale = p.loss_weight;
  if (p.weight != nullptr) {
    scale *= static_cast<double>(*static_cast<const A*>(p.weight));
  }
  if (p.reduction == Reduction::kMean) {
    unsigned long long counted = p.rows;
    if (scratch.count_blocks > 0) {
      counted = 0;
      for (int b = 0; b < scratch.count_blocks; ++b) {
        counted += scratch.counts[b];
      }
    }
    scale /= counted > 0 ? static_cast<double>(counted) : 1.0;
  }

  double block_loss = 0;
  int turn = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    // The same for all threads of a row, and with a block per row for the whole block: the barrier
    // in row_sum is reached by all or by none.
    const int64_t label = label_of(p.target, p.target_is_int32, row);
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
      A sums[4] = {0, 0, 0, 0};  // <s, c>, |s|^2, |c|^2, |t|^2
      nd_row_sums<S, M, kVec, kThreads>(student, direction, teacher, columns, lane, sums,
                                        kept_student, kept_direction);
      row_sum<kThreads>(sums, row_buffers, turn);
      const A teacher_norm = teacher != nullptr         ? square_root(sums[3])
                             : teacher_norms != nullptr ? teacher_norms[row]
                                                        : A(0);
      terms = nd_row_terms<A>(sums[0], sums[1], sums[2], teacher_norm, static_cast<A>(p.eps));
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
        block_loss += static_cast<double>(terms.loss);
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
  // The block that finishes last adds the blocks' sums, in an order that does not depend on which
  // one it is.
  block_loss = block_sum<kBlock>(block_loss);
  if (threadIdx.x == 0) {
    scratch.partial[blockIdx.x] = block_loss;
    __threadfence();
    is_last = atomicAdd(scratch.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  __threadfence();
  double sum = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kBlock) {
    sum += static_cast<volatile const double*>(scratch.partial)[b];
  }
  sum = block_sum<kBlock>(sum);
  if (threadIdx.x == 0) {
    *static_cast<A*>(p.loss) = static_cast<A>(sum * scale);
  }
}

template <typename S, typename M, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks)
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
int forward_with(const NdLossParams& p, const Scratch& scratch, void* stream) {
  if (takes_a_block<S>(p.columns, kVec)) {
    constexpr auto kKernel = nd_loss_forward_kernel<S, M, kVec, kBlock>;
    return launch(kKernel, blocks_for<kKernel>(p.rows, 1), kBlock, stream, p, scratch);
  }
  constexpr auto kKernel = nd_loss_forward_kernel<S, M, kVec, kWarpSize>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, kBlock / kWarpSize), kBlock, stream, p,
                scratch);
}

template <typename S, typename M>
int forward(const NdLossParams& p, const Scratch& scratch, void* stream) {
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
    return launch(kKernel, blocks_for<kKernel>(p.rows, 1), kBlock, stream, p);
  }
  constexpr auto kKernel = nd_loss_backward_kernel<S, M, kVec, kWarpSize>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, kBlock / kWarpSize), kBlock, stream, p);
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

int64_t nd_loss_scratch_bytes_cuda(const NdLossParams& p) {
  const int64_t most = static_cast<int64_t>(multiprocessors()) * kMaxBlocksPerMultiprocessor;
  const int64_t blocks = p.rows < 1 ? 1 : p.rows < most ? p.rows : most;
  return kPartialOffset + blocks * static_cast<int64_t>(sizeof(double));
}

int nd_loss_forward_cuda(const NdLossParams& p, void* scratch_bytes, void* stream) {
  char* bytes = static_cast<char*>(scratch_bytes);
  Scratch scratch = {};
  scratch.ticket = reinterpret_cast<unsigned*>(bytes);
  scratch.counts = reinterpret_cast<unsigned long long*>(bytes + kCountsOffset);
  scratch.partial = reinterpret_cast<double*>(bytes + kPartialOffset);
  if (p.reduction != Reduction::kNone) {
    if (p.reduction == Reduction::kMean && p.target != nullptr) {
      const int64_t wanted = (p.rows + 4 * kBlock - 1) / (4 * kBlock);
      scratch.count_blocks = static_cast<int>(wanted < 1              ? 1
                                              : wanted < kCountBlocks ? wanted
                                                                      : kCountBlocks);
    }
    const int error =
        launch(nd_loss_count_kernel, scratch.count_blocks > 0 ? scratch.count_blocks : 1, kBlock,
               stream, p, scratch);
    if (error != 0) {
      return error;
    }
  } else if (p.rows == 0) {
    return 0;
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
