#include "common/isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>

namespace dnkd {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    default:
      return "baseline";
  }
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = [] {
    std::vector<Isa> found = {Isa::kBaseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
      found.push_back(Isa::kAvx2);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        found.push_back(Isa::kAvx512);
        if (__builtin_cpu_supports("avx512bf16")) {
          found.push_back(Isa::kAvx512Bf16);
        }
      }
    }
#endif
    return found;
  }();
  return isas;
}

static Isa choose_isa() {
  const char* wanted = std::getenv("DNKD_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    return available_isas().back();
  }
  std::string names;
  for (Isa isa : available_isas()) {
    if (std::string(wanted) == isa_name(isa)) {
      return isa;
    }
    names += std::string(names.empty() ? "" : ", ") + isa_name(isa);
  }
  TORCH_CHECK_VALUE(false, "DNKD_CPU_ISA=", wanted, " cannot be used: this build on this CPU has ",
                    names);
}

bool rounds_to_bfloat16 = false;

Isa active_isa() {
  static const Isa isa = [] {
    const Isa chosen = choose_isa();
    rounds_to_bfloat16 = chosen == Isa::kAvx512Bf16;
    return chosen;
  }();
  return isa;
}

Isa active_isa(bool gains_from_avx512) {
  static const bool is_forced = [] {
    const char* wanted = std::getenv("DNKD_CPU_ISA");
    return wanted != nullptr && *wanted != '\0';
  }();
  const Isa isa = active_isa();
  const bool is_avx512 = isa == Isa::kAvx512 || isa == Isa::kAvx512Bf16;
  return is_avx512 && !gains_from_avx512 && !is_forced ? Isa::kAvx2 : isa;
}

}  // namespace dnkd
