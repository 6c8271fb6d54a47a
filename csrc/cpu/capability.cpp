#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#include "row_kernels.h"

namespace embed_ext::cpu {
namespace {

Capability best_of_this_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Capability::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Capability::kAvx2;
  }
#endif
  return Capability::kPortable;
}

// EMBED_EXT_CPU_CAPABILITY can only lower the choice: asking for more than the machine has would
// end in an illegal instruction.
Capability chosen() {
  const auto best = best_of_this_machine();
  const char* wanted = std::getenv("EMBED_EXT_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    return best;
  }
  for (const auto value : {Capability::kPortable, Capability::kAvx2, Capability::kAvx512}) {
    if (std::string(wanted) == capability_name(value)) {
      TORCH_CHECK(value <= best, "EMBED_EXT_CPU_CAPABILITY: this machine supports at most ",
                  capability_name(best), ", but got ", wanted);
      return value;
    }
  }
  TORCH_CHECK(false, "EMBED_EXT_CPU_CAPABILITY: expected portable, avx2 or avx512, but got ",
              wanted);
}

}  // namespace

Capability capability() {
  static const Capability value = chosen();
  return value;
}

// Intel's cores fetch each line that memset clears, so that clearing past the caches takes half of
// the time; AMD's do not, and Skylake's server cores stream slowly (glibc's memset spares both).
// The instructions asked for came with the core after.
bool streams_zeros_faster() {
#if defined(__x86_64__)
  static const bool value = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512vbmi2");
  }();
  return value;
#else
  return false;
#endif
}

const char* capability_name(Capability value) {
  switch (value) {
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace embed_ext::cpu
