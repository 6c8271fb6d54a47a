// What the methods of update_methods.h do to an element, and how the result is rounded. As in
// csrc/cpu/update_kernels.inl, but that the compiler may round a product and a sum at once.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../update_methods.h"
#include "vector.cuh"

namespace embed_ext::cuda {

// An element, its gradient and its states, one step further. `spread` is what take_row() returned.
template <class Acc>
__device__ void step(const Sgd<Acc>& method, Acc& weight, Acc grad, Acc* /*state*/,
                     Acc /*spread*/) {
  weight -= method.lr * grad;
}

template <class Acc>
__device__ void step(const MomentumSgd<Acc>& method, Acc& weight, Acc grad, Acc* state,
                     Acc /*spread*/) {
  state[0] = method.momentum * state[0] + method.undamped * grad;
  weight -= method.lr * (method.nesterov ? grad + method.momentum * state[0] : state[0]);
}

template <class Acc>
__device__ void step(const Adagrad<Acc>& method, Acc& weight, Acc grad, Acc* state,
                     Acc /*spread*/) {
  state[0] += grad * grad;
  weight -= method.lr * grad / (sqrt(state[0]) + method.eps);
}

template <class Acc>
__device__ void step(const RowwiseAdagrad<Acc>& method, Acc& weight, Acc grad, Acc* /*state*/,
                     Acc spread) {
  weight -= method.lr * grad / spread;
}

template <class Acc>
__device__ void step(const Adam<Acc>& method, Acc& weight, Acc grad, Acc* state, Acc /*spread*/) {
  const auto& rates = method.rates;
  state[0] += rates.beta1_left * (grad - state[0]);
  state[1] = rates.beta2 * state[1] + rates.beta2_left * (grad * grad);
  weight = weight * rates.kept -
           rates.step_size * state[0] / (sqrt(state[1]) / rates.correction2 + rates.eps);
}

template <class Acc>
__device__ void step(const RowwiseAdam<Acc>& method, Acc& weight, Acc grad, Acc* state,
                     Acc spread) {
  const auto& rates = method.rates;
  state[0] += rates.beta1_left * (grad - state[0]);
  weight = weight * rates.kept - rates.step_size * state[0] / spread;
}

// Adds a row's mean square to its number, and returns what its step is divided by.
template <class Acc>
__device__ Acc take_row(const RowwiseAdagrad<Acc>& method, Acc mean_square, Acc& number) {
  number += mean_square;
  return sqrt(number) + method.eps;
}

template <class Acc>
__device__ Acc take_row(const RowwiseAdam<Acc>& method, Acc mean_square, Acc& number) {
  const auto& rates = method.rates;
  number = rates.beta2 * number + rates.beta2_left * mean_square;
  return sqrt(number) / rates.correction2 + rates.eps;
}

// 32 random bits for each element of a row: the CPU's.
struct Randomness {
  __device__ Randomness(uint64_t seed, int64_t row) {
    uint64_t key = seed + static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u;
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9u;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBu;
    key ^= key >> 31;
    first = static_cast<uint32_t>(key);
    second = static_cast<uint32_t>(key >> 32);
  }

  __device__ uint32_t of_column(int64_t column) const {
    uint32_t x = static_cast<uint32_t>(column) * 0x9E3779B9u + first;
    x = (x ^ (x >> 16)) * 0x7FEB352Du + second;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  uint32_t first, second;
};

// x rounded down or up to a number that has `dropped` bits less, each as often as it is near; x
// itself beyond `largest`, which rounding up would overflow, for a NaN and for infinity.
__device__ inline float dither(float x, uint32_t random, int dropped, uint32_t largest) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t low = (1u << dropped) - 1;
  return (bits & 0x7FFFFFFFu) > largest ? x : __uint_as_float((bits + (random & low)) & ~low);
}

// The same to a number of T.
template <class T>
__device__ float dither_to(float x, uint32_t random) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return dither(x, random, 16, 0x7F7F0000u);
  } else {
    const float magnitude = fabsf(x);
    if (!(magnitude < 0x1p-14f)) {
      return dither(x, random, 13, 0x477FE000u);
    }
    // Here the numbers of float16 are 2^-24 apart.
    const float fraction = static_cast<float>(random >> 8) * 0x1p-24f;
    const auto steps = static_cast<int>(magnitude * 0x1p24f + fraction);
    return copysignf(static_cast<float>(steps) * 0x1p-24f, x);
  }
}

}  // namespace embed_ext::cuda
