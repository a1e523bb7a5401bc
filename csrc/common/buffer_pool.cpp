#include "common/buffer_pool.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dnkd {
namespace {

size_t limit_from_environment() {
  constexpr size_t kDefault = 256;
  const char* wanted = std::getenv("DNKD_CPU_CACHE_MB");
  if (wanted == nullptr || *wanted == '\0') {
    return kDefault << 20;
  }
  const std::string text = wanted;
  const bool is_number = text.size() <= 9 && text.find_first_not_of("0123456789") == text.npos;
  TORCH_CHECK_VALUE(is_number, "DNKD_CPU_CACHE_MB must be a whole number of mebibytes, got '", text,
                    "'");
  return static_cast<size_t>(std::stoul(text)) << 20;
}

BufferPool::Block allocate(size_t bytes) {
  void* data = c10::alloc_cpu(bytes);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr size_t kWorthIt = size_t{8} << 20;
  if (bytes >= kWorthIt) {
    // Only whole huge pages inside the buffer; advice, so that a refusal changes nothing.
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return {data, bytes, 0};
}

}  // namespace

BufferPool& BufferPool::gradients() {
  static BufferPool& pool = *new BufferPool(limit_from_environment());
  return pool;
}

BufferPool::Block BufferPool::take(size_t bytes) {
  if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
    ++requests_;
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / 4;
      if (fits && (best == blocks_.end() || block->bytes <= best->bytes)) {
        best = block;
      }
    }
    if (best != blocks_.end()) {
      const Block found = *best;
      blocks_.erase(best);
      kept_ -= found.bytes;
      return found;
    }
    trim(limit_);
  }
  return allocate(bytes);
}

void BufferPool::give(Block block) {
  if (block.bytes <= limit_) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock.owns_lock()) {
      trim(limit_ - block.bytes);
      block.last_used = requests_;
      blocks_.push_back(block);
      kept_ += block.bytes;
      return;
    }
  }
  c10::free_cpu(block.data);
}

size_t BufferPool::clear() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) {
    return 0;
  }
  const size_t kept = kept_;
  trim(0);
  return kept;
}

void BufferPool::trim(size_t limit) {
  auto end = blocks_.begin();
  while (end != blocks_.end() && (kept_ > limit || requests_ - end->last_used > kIdleRequests)) {
    c10::free_cpu(end->data);
    kept_ -= end->bytes;
    ++end;
  }
  blocks_.erase(blocks_.begin(), end);
}

}  // namespace dnkd
