// Rows over the threads of at::parallel_for.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace dnkd {

// Calls body(begin, end) over [0, rows), from several threads where each gets enough elements to
// pay for waking it. The caller's results must not depend on where the ranges end.
template <typename Body>
void parallel_rows(int64_t rows, int64_t columns, const Body& body) {
  constexpr int64_t kElementsPerTask = 16384;
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(columns, 1));
  if (rows <= grain) {
    if (rows > 0) {
      body(int64_t{0}, rows);
    }
    return;
  }
  at::parallel_for(0, rows, grain, body);
}

}  // namespace dnkd
