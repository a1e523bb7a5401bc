// What the CPU kernels of the ND loss and of its diagnostics share.
#pragma once

#include "common/isa.h"
#include "ops/nd_loss.h"

namespace dnkd {

// The instruction set that measured fastest for rows of this kind.
Isa nd_isa_for(Dtype dtype, int64_t columns);

// Rows that are not ignored.
int64_t nd_counted_rows(const NdInputs& inputs);

}  // namespace dnkd
