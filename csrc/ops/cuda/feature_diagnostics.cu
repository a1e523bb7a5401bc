#include "common/rows.cuh"
#include "ops/cuda/nd_rows.cuh"
#include "ops/feature_diagnostics.h"

namespace dnkd {
namespace {

#include "ops/feature_diagnostics_terms.inc"

constexpr int kSums = sizeof(FeatureSums) / sizeof(double);

template <typename S, typename M, int kVec, int kThreads>
__global__ void __launch_bounds__(kBlock, kMinBlocks<S, M>)
    feature_diagnostics_kernel(const __grid_constant__ FeatureDiagnosticsParams p,
                               const __grid_constant__ RowScratch scratch) {
  using A = typename Accumulate<S>::type;
  constexpr int kKeep = kKept<S>;
  constexpr int kRowsPerBlock = kBlock / kThreads;
  __shared__ A row_buffers[2][4][kThreads / kWarpSize];
  const int lane = threadIdx.x % kThreads;
  const int columns = static_cast<int>(p.columns);
  const int vectors = columns / kVec;
  const A* teacher_norms = static_cast<const A*>(p.teacher_norms);

  double sums[kSums] = {};
  int turn = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kThreads;
       row < p.rows; row += step) {
    // The same for all threads of a row: the barrier in row_sum is reached by all or by none.
    const int64_t label = label_of(p.target, p.target_is_int32, row);
    if (p.target != nullptr && label == p.ignore_index) {
      continue;
    }
    const A nan = __builtin_nanf("");
    FeatureTerms<A> terms = {nan, nan, nan, nan};
    if (label >= 0 && label < p.classes) {
      const S* student = static_cast<const S*>(p.student) + row * p.student_stride;
      const M* direction = static_cast<const M*>(p.directions) + label * p.directions_stride;
      const S* teacher = p.teacher == nullptr
                             ? nullptr
                             : static_cast<const S*>(p.teacher) + row * p.teacher_stride;
      Pack<S, kVec> kept_student[kKeep];
      Pack<M, kVec> kept_direction[kKeep];
#include "ops/cuda/nd_row_sums.inc"
      row_sum<kThreads>(dots, row_buffers, turn);
      const A teacher_norm = teacher != nullptr         ? square_root(dots[3])
                             : teacher_norms != nullptr ? teacher_norms[row]
                                                        : A(0);
      terms = feature_terms<A>(dots[0], dots[1], dots[2], teacher_norm, static_cast<A>(p.eps));
    }
    if (lane == 0) {
      sums[0] += static_cast<double>(terms.student_norm);
      sums[1] += static_cast<double>(terms.teacher_norm);
      sums[2] += static_cast<double>(terms.cosine);
      sums[3] += static_cast<double>(terms.reached);
      sums[4] += 1;
    }
  }

  if (add_blocks<kBlock>(sums, scratch) && threadIdx.x == 0) {
    feature_result(FeatureSums{sums[0], sums[1], sums[2], sums[3], sums[4]},
                   p.teacher != nullptr || p.teacher_norms != nullptr, static_cast<A*>(p.result));
  }
}

template <typename S, typename M, int kVec>
int diagnose_with(const FeatureDiagnosticsParams& p, const RowScratch& scratch, void* stream) {
  if (takes_a_block<S>(p.columns, kVec)) {
    constexpr auto kKernel = feature_diagnostics_kernel<S, M, kVec, kBlock>;
    return launch(kKernel, blocks_for<kKernel>(p.rows, 1, kBlock), kBlock, stream, p, scratch);
  }
  constexpr auto kKernel = feature_diagnostics_kernel<S, M, kVec, kWarpSize>;
  return launch(kKernel, blocks_for<kKernel>(p.rows, kBlock / kWarpSize, kBlock), kBlock, stream, p,
                scratch);
}

template <typename S, typename M>
int diagnose(const FeatureDiagnosticsParams& p, const RowScratch& scratch, void* stream) {
  constexpr int kVec = kVectorWidth<S>;
  const bool aligned =
      rows_are_aligned<S>(p.student, p.student_stride, kVec) &&
      (p.teacher == nullptr || rows_are_aligned<S>(p.teacher, p.teacher_stride, kVec)) &&
      rows_are_aligned<M>(p.directions, p.directions_stride, kVec);
  return aligned ? diagnose_with<S, M, kVec>(p, scratch, stream)
                 : diagnose_with<S, M, 1>(p, scratch, stream);
}

}  // namespace

int64_t feature_diagnostics_scratch_bytes_cuda(const FeatureDiagnosticsParams& p) {
  return row_scratch_bytes(p.rows, kSums);
}

int feature_diagnostics_cuda(const FeatureDiagnosticsParams& p, void* scratch_bytes, void* stream) {
  // The kernel counts for itself; what it needs is a cleared ticket, as a sum does.
  RowScratch scratch;
  const int error = prepare_rows(scratch, scratch_bytes, p.target, p.target_is_int32, p.rows,
                                 p.ignore_index, Reduction::kSum, stream);
  if (error != 0) {
    return error;
  }
  return nd_dispatch(p, [&](auto student, auto direction) {
    return diagnose<decltype(student), decltype(direction)>(p, scratch, stream);
  });
}

}  // namespace dnkd
