// Which CPU instruction set the kernels run with, chosen once per process.
#pragma once

#include <string>
#include <vector>

namespace dnkd {

// kAvx512Bf16 is AVX-512 together with its instruction that rounds floats to bfloat16.
enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

const char* isa_name(Isa isa);

// Instruction sets that this library was compiled for and this CPU runs, slowest first.
const std::vector<Isa>& available_isas();

// The fastest available one, or the one DNKD_CPU_ISA names. Throws when DNKD_CPU_ISA names one
// that does not exist or that this CPU cannot run.
Isa active_isa();

// active_isa(), but AVX2 instead of an AVX-512 that DNKD_CPU_ISA did not ask for, where a kernel
// measured no gain from it.
Isa active_isa(bool gains_from_avx512);

}  // namespace dnkd
