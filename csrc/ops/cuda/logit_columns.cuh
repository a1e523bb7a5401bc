// How the kernels of the losses on logits read a row: the threads that share it, and what they keep
// of it from one pass over it to the next.
#pragma once

#include "common/device.cuh"

namespace dnkd {
namespace {

// A row is shared by a warp, a block or a large block: the smallest that takes it in few rounds.
// What a large block's shared memory and registers do not keep of a row, the blocks of a cluster
// keep together, or without clusters a huge block.
constexpr int kBlock = 128;
constexpr int kClusterBlock = 256;
constexpr int kLargeBlock = 320;
constexpr int kHugeBlock = 512;

template <int kThreads>
constexpr int kBlockOf = kThreads > kBlock ? kThreads : kBlock;

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

}  // namespace
}  // namespace dnkd
