// From run-time dtypes and widths to template arguments: the one place that lists them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../checks.h"

namespace embed_ext::cuda {

// Calls f(pointer) with the indices' own type, one that is_index_type() lets pass; on the host or
// on the device, whichever f is for.
#pragma nv_exec_check_disable
template <class F>
__host__ __device__ decltype(auto) with_index_pointer(const void* indices, at::ScalarType type,
                                                      const F& f) {
  switch (type) {
    case at::kInt:
      return f(static_cast<const int32_t*>(indices));
    case at::kShort:
      return f(static_cast<const int16_t*>(indices));
    case at::kChar:
      return f(static_cast<const int8_t*>(indices));
    case at::kByte:
      return f(static_cast<const uint8_t*>(indices));
    case at::kUInt16:
      return f(static_cast<const uint16_t*>(indices));
    case at::kUInt32:
      return f(static_cast<const uint32_t*>(indices));
    default:
      return f(static_cast<const int64_t*>(indices));
  }
}

// The same with indices [...], which check_lookup() or check_grad() has seen.
template <class F>
decltype(auto) with_index_pointer(const at::Tensor& indices, const F& f) {
  TORCH_INTERNAL_ASSERT(is_index_type(indices.scalar_type()));
  return with_index_pointer(indices.const_data_ptr(), indices.scalar_type(), f);
}

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<T>) with the CUDA type of a real floating dtype.
template <class F>
decltype(auto) with_float_type(at::ScalarType type, const F& f) {
  switch (type) {
    case at::kDouble:
      return f(TypeTag<double>{});
    case at::kHalf:
      return f(TypeTag<__half>{});
    case at::kBFloat16:
      return f(TypeTag<__nv_bfloat16>{});
    default:
      TORCH_INTERNAL_ASSERT(type == at::kFloat);
      return f(TypeTag<float>{});
  }
}

// Calls f(TypeTag<In>, TypeTag<Out>) with the CUDA types of a gradient and of the table that its
// sums go to, which is of the same dtype or of float32.
template <class F>
void with_gradient_types(at::ScalarType in, at::ScalarType out, const F& f) {
  with_float_type(in, [&](auto tag) {
    if constexpr (sizeof(typename decltype(tag)::type) < sizeof(float)) {
      if (out == at::kFloat) {
        return f(tag, TypeTag<float>{});
      }
    }
    TORCH_INTERNAL_ASSERT(out == in);
    f(tag, tag);
  });
}

}  // namespace embed_ext::cuda
