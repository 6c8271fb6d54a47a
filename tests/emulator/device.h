// CUDA's device language as plain C++: included before anything else in each translated file.
//
// Only what csrc/cuda uses is here. Memory is not mentioned: the compiler itself calls the emulator
// at each load and store (hooks.cpp), but for the accesses below, which are one instruction on a
// GPU and must be one here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdlib.h>

#include <cstring>
#include <tuple>
#include <type_traits>

#include "interface.h"

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::current->block_dim)
#define gridDim (::emulator::current->grid_dim)

namespace emulator {

// kernel<<<grid, block, dynamic_shared, stream>>>(arguments...). Parameters are copied, as a launch
// does; streams play no part, since every launch is through when it returns.
template <class Kernel, class... Arguments>
void launch_kernel(const char* name, unsigned grid, unsigned block, size_t dynamic_shared,
                   cudaStream_t /*stream*/, const Kernel& kernel, const Arguments&... arguments) {
  struct Parameters {
    Kernel kernel;
    std::tuple<Arguments...> arguments;
  } parameters{kernel, {arguments...}};
  const auto body = [](const void* raw) {
    const auto* own = static_cast<const Parameters*>(raw);
    std::apply(own->kernel, own->arguments);
  };
  launch(name, grid, block, dynamic_shared, body, &parameters, sizeof(parameters));
}

template <class T>
uint64_t to_word(T value) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}

template <class T>
T collective_of(Collective kind, unsigned mask, T value, int argument) {
  const uint64_t word = collective(kind, mask, to_word(value), argument);
  memcpy(&value, &word, sizeof(T));
  return value;
}

// st.global and red.add, of as many values as the instruction names.
template <class T, size_t kCount>
void store_values(void* to, const T (&values)[kCount]) {
  store(to, values, sizeof(values));
}
template <class T, size_t kCount>
void add_values(void* to, const T (&values)[kCount]) {
  atomic_add(static_cast<T*>(to), values, kCount);
}

}  // namespace emulator

template <class T>
T __ldg(const T* from) {
  T value;
  ::emulator::load(&value, from, sizeof(T));
  return value;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return ::emulator::collective_of(::emulator::Collective::kShuffle, mask, value, lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
  return ::emulator::collective_of(::emulator::Collective::kShuffleUp, mask, value, distance);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return ::emulator::collective_of(::emulator::Collective::kShuffleDown, mask, value, distance);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return ::emulator::collective_of(::emulator::Collective::kShuffleXor, mask, value, bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t vote = predicate != 0;
  return ::emulator::collective(::emulator::Collective::kBallot, mask, vote, 0);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t word = ::emulator::to_word(value);
  return ::emulator::collective(::emulator::Collective::kMatch, mask, word, 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::emulator::collective(::emulator::Collective::kSync, mask, 0, 0);
}
inline void __syncthreads() { ::emulator::sync_threads(); }

inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned desired) {
  return ::emulator::compare_and_swap(address, expected, desired);
}
inline void __threadfence_system() {}  // the emulated memory is never out of order

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
template <class T>
void* __cvta_generic_to_global(T* pointer) {
  return const_cast<std::remove_const_t<T>*>(pointer);
}

#define EMULATOR_MIN_MAX(T)                        \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MIN_MAX(int)
EMULATOR_MIN_MAX(unsigned)
EMULATOR_MIN_MAX(long)
EMULATOR_MIN_MAX(unsigned long)
EMULATOR_MIN_MAX(long long)
EMULATOR_MIN_MAX(float)
EMULATOR_MIN_MAX(double)
#undef EMULATOR_MIN_MAX
