// The inner loops of an optimizer's update of some rows. As those of row_kernels.h they are
// compiled once for each CPU capability, from update_kernels.inl, and give the same bits in all.
#pragma once

#include <cstdint>

#include "../update_methods.h"
#include "row_kernels.h"

namespace embed_ext::cpu {

#define EMBED_EXT_DECLARE_UPDATE_KERNELS(ns)                                                  \
  namespace ns {                                                                              \
  template <class T, class Method>                                                            \
  void update_rows(const UpdateTask& task, const Method& method, int64_t begin, int64_t end); \
  }
EMBED_EXT_DECLARE_UPDATE_KERNELS(portable)
#if defined(__x86_64__)
EMBED_EXT_DECLARE_UPDATE_KERNELS(avx2)
EMBED_EXT_DECLARE_UPDATE_KERNELS(avx512)
#endif
#undef EMBED_EXT_DECLARE_UPDATE_KERNELS

template <class T, class Method>
void update_rows(const UpdateTask& task, const Method& method, int64_t begin, int64_t end) {
  switch (capability()) {
#if defined(__x86_64__)
    case Capability::kAvx512:
      return avx512::update_rows<T>(task, method, begin, end);
    case Capability::kAvx2:
      return avx2::update_rows<T>(task, method, begin, end);
#endif
    default:
      return portable::update_rows<T>(task, method, begin, end);
  }
}

}  // namespace embed_ext::cpu
