// CPU memory kept for the next buffer of its size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace dnkd {

// Large freed memory goes back to the system, and every buffer made anew pays for it in page
// faults: as much time as a loss takes. A block given back here is handed out again instead, as the
// caching allocator of a GPU does. What is kept is bounded, and what stays unused for a while is
// freed.
class BufferPool {
 public:
  struct Block {
    void* data;
    size_t bytes;
    uint64_t last_used;
  };

  explicit BufferPool(size_t limit) : limit_(limit) {}

  // The pool of gradients: DNKD_CPU_CACHE_MB mebibytes, 256 by default. Never destroyed, since
  // tensors may outlive static objects.
  static BufferPool& gradients();

  // A block of at least so many bytes, and at most a quarter more; new where none is kept.
  Block take(size_t bytes);
  void give(Block block);
  // Frees everything kept and returns how many bytes that was; nothing while another thread takes
  // or gives.
  size_t clear();

 private:
  // Blocks that this many requests found no use for are freed.
  static constexpr uint64_t kIdleRequests = 64;

  // Frees the least recently used until the rest fits and none is idle.
  void trim(size_t limit);

  const size_t limit_;
  // Only ever tried: where another thread holds it, and in the child of a fork it may do so
  // forever, memory is allocated and freed without the pool.
  std::mutex mutex_;
  std::vector<Block> blocks_;  // least recently used first
  size_t kept_ = 0;
  uint64_t requests_ = 0;
};

}  // namespace dnkd
