// What the losses share whose rows have labels: counting the rows that are not ignored, and adding
// the row losses of all blocks.
#pragma once

#include "common/device.cuh"

namespace dnkd {

constexpr int kCountThreads = 128;
constexpr int kCountBlocks = 64;

// Device scratch of a forward pass.
struct RowScratch {
  unsigned* ticket;            // blocks that have finished
  unsigned long long* counts;  // [count_blocks] counted rows, by the blocks of the count kernel
  double* partial;             // [blocks, sums] sums of row losses
  int count_blocks;            // 0 where the number of counted rows is that of all rows
};

constexpr int64_t kCountsOffset = 16;
constexpr int64_t kPartialOffset = kCountsOffset + kCountBlocks * sizeof(unsigned long long);

// The label of a row: `row` itself without labels.
DNKD_INLINE int64_t label_of(const void* labels, bool is_int32, int64_t row) {
  if (labels == nullptr) {
    return row;
  }
  return is_int32 ? static_cast<const int32_t*>(labels)[row]
                  : static_cast<const int64_t*>(labels)[row];
}

// Counts the rows that are not ignored, and clears the ticket.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    count_rows_kernel(const void* labels, bool is_int32, int64_t rows, int64_t ignore_index,
                      const __grid_constant__ RowScratch scratch) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *scratch.ticket = 0;
  }
  if (scratch.count_blocks == 0) {
    return;
  }
  unsigned long long counted = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows; i += step) {
    counted += label_of(labels, is_int32, i) != ignore_index;
  }
  counted = block_sum<kThreads>(counted);
  if (threadIdx.x == 0) {
    scratch.counts[blockIdx.x] = counted;
  }
}

// What the count kernel counted: of `rows` rows, those that are not ignored. All threads call it.
DNKD_INLINE unsigned long long counted_rows(const RowScratch& scratch, int64_t rows) {
  if (scratch.count_blocks == 0) {
    return rows;
  }
  unsigned long long counted = 0;
#pragma unroll
  for (int i = 0; i < kCountBlocks; i += kWarpSize) {
    const int b = i + threadIdx.x % kWarpSize;
    counted += b < scratch.count_blocks ? scratch.counts[b] : 0;
  }
  return warp_sum(counted);
}

// Adds kSums values over all threads of all blocks, or of every `every`-th block. Every thread of
// those must call it, once. True in the block that finishes last, which alone gets the sums: in an
// order that does not depend on which one it is.
template <int kThreads, int kSums>
DNKD_INLINE bool add_blocks(double (&sums)[kSums], const RowScratch& scratch, unsigned every = 1) {
  __shared__ bool is_last;
  const unsigned blocks = gridDim.x / every;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    sums[i] = block_sum<kThreads>(sums[i]);
  }
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      scratch.partial[kSums * (blockIdx.x / every) + i] = sums[i];
    }
    __threadfence();
    is_last = atomicAdd(scratch.ticket, 1u) == blocks - 1;
    __threadfence();  // what the others left is read behind the barrier
  }
  __syncthreads();
  if (!is_last) {
    return false;
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    double sum = 0;
    for (unsigned b = threadIdx.x; b < blocks; b += kThreads) {
      sum += static_cast<volatile const double*>(scratch.partial)[kSums * b + i];
    }
    sums[i] = block_sum<kThreads>(sum);
  }
  return true;
}

// Bytes of scratch for kernels that give add_blocks() `sums` values and have at most one block per
// row.
inline int64_t row_scratch_bytes(int64_t rows, int sums) {
  const int64_t most = static_cast<int64_t>(multiprocessors()) * kMaxBlocksPerMultiprocessor;
  const int64_t blocks = rows < 1 ? 1 : rows < most ? rows : most;
  return kPartialOffset + blocks * sums * static_cast<int64_t>(sizeof(double));
}

// Lays out the scratch and launches the count kernel, which all but kNone need. `labels`: null
// where no row can be ignored.
inline int prepare_rows(RowScratch& scratch, void* scratch_bytes, const void* labels, bool is_int32,
                        int64_t rows, int64_t ignore_index, Reduction reduction, void* stream) {
  char* bytes = static_cast<char*>(scratch_bytes);
  scratch = {};
  scratch.ticket = reinterpret_cast<unsigned*>(bytes);
  scratch.counts = reinterpret_cast<unsigned long long*>(bytes + kCountsOffset);
  scratch.partial = reinterpret_cast<double*>(bytes + kPartialOffset);
  if (reduction == Reduction::kNone) {
    return 0;
  }
  if (reduction == Reduction::kMean && labels != nullptr) {
    const int64_t wanted = (rows + 4 * kCountThreads - 1) / (4 * kCountThreads);
    scratch.count_blocks = static_cast<int>(wanted < 1              ? 1
                                            : wanted < kCountBlocks ? wanted
                                                                    : kCountBlocks);
  }
  return launch(count_rows_kernel<kCountThreads>,
                scratch.count_blocks > 0 ? scratch.count_blocks : 1, kCountThreads, stream, labels,
                is_int32, rows, ignore_index, scratch);
}

}  // namespace dnkd
