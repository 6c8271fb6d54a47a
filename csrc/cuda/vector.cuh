// The one vector type of the kernels: up to 16 bytes that one instruction loads or stores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector_width.h"

namespace embed_ext::cuda {

template <int kBytes>
struct RawVector;
template <>
struct RawVector<1> {
  using type = uint8_t;
};
template <>
struct RawVector<2> {
  using type = uint16_t;
};
template <>
struct RawVector<4> {
  using type = uint32_t;
};
template <>
struct RawVector<8> {
  using type = uint2;
};
template <>
struct RawVector<16> {
  using type = uint4;
};
static_assert(sizeof(uint4) == kMaxVectorBytes && alignof(uint4) == kMaxVectorBytes,
              "a vector is one 16-byte access");

// Sums are kept in float, or in double for double: the only rounding to a narrower type is the
// last.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T narrow(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// kCount neighbouring elements. More than 16 bytes are moved as several vectors.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < kMaxVectorBytes ? sizeof(T) * kCount : kMaxVectorBytes) Packed {
  static constexpr int kSize = kCount;
  T values[kCount];
};

template <class A, class T, int kCount>
__device__ void add(Packed<A, kCount>& sum, const Packed<T, kCount>& value) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    sum.values[i] += widen(value.values[i]);
  }
}

template <class T, int kCount>
struct PackedAccess {
  static constexpr int kWidth = static_cast<int>(alignof(Packed<T, kCount>));
  static constexpr int kVectors = static_cast<int>(sizeof(Packed<T, kCount>)) / kWidth;
  using Raw = typename RawVector<kWidth>::type;
};

template <class T, int kCount>
__device__ Packed<T, kCount> load(const T* source) {
  using Access = PackedAccess<T, kCount>;
  typename Access::Raw raw[Access::kVectors];
#pragma unroll
  for (int v = 0; v < Access::kVectors; ++v) {
    raw[v] = __ldg(reinterpret_cast<const typename Access::Raw*>(source) + v);
  }
  Packed<T, kCount> result;
  memcpy(&result, raw, sizeof(result));
  return result;
}

// The same of memory that the kernel writes too, which must not be read through the read-only path.
template <class T, int kCount>
__device__ Packed<T, kCount> load_written(const T* source) {
  using Access = PackedAccess<T, kCount>;
  typename Access::Raw raw[Access::kVectors];
#pragma unroll
  for (int v = 0; v < Access::kVectors; ++v) {
    raw[v] = *(reinterpret_cast<const typename Access::Raw*>(source) + v);
  }
  Packed<T, kCount> result;
  memcpy(&result, raw, sizeof(result));
  return result;
}

// Spelled out, since the compiler takes a plain store of a computed vector apart into elements.
__device__ inline void store_raw(uint4* target, uint4 raw) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(target)), "r"(raw.x), "r"(raw.y), "r"(raw.z),
                 "r"(raw.w)
               : "memory");
}
__device__ inline void store_raw(uint2* target, uint2 raw) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(target)), "r"(raw.x), "r"(raw.y)
               : "memory");
}
template <class Raw>
__device__ void store_raw(Raw* target, Raw raw) {
  *target = raw;
}

template <class T, int kCount>
__device__ void store(T* target, const Packed<T, kCount>& value) {
  using Access = PackedAccess<T, kCount>;
  typename Access::Raw raw[Access::kVectors];
  memcpy(raw, &value, sizeof(value));
#pragma unroll
  for (int v = 0; v < Access::kVectors; ++v) {
    store_raw(reinterpret_cast<typename Access::Raw*>(target) + v, raw[v]);
  }
}

}  // namespace embed_ext::cuda
