// The inner loops of an optimizer's update of some rows. As those of row_kernels.h they are
// compiled once for each CPU capability, from update_kernels.inl, and give the same bits in all.
#pragma once

#include <cstdint>

#include "row_kernels.h"

namespace embed_ext::cpu {

// Rows of a table or a gradient, of elements that the kernel knows the type of; strides in
// elements.
struct Rows {
  void* data;
  int64_t row_stride;
  int64_t column_stride;
};

// Entries [begin, end) of a gradient: row indices[i] of the table is updated by row i of `values`.
struct UpdateTask {
  Rows weight;             // [V, D] of T
  Rows values;             // [U, D] of T
  const int64_t* indices;  // [U] ascending, inside the table
  int64_t count;           // U
  int64_t width;           // D
  bool stochastic;         // rounds at random, by the seed and where in the table it is
  uint64_t seed;
};

// What is done. Acc is the type of the sums and of the states, float or double. The gradient that a
// method sees is sign * values + weight_decay * weight.
template <class Acc>
struct SeenGradient {
  Acc sign;
  Acc weight_decay;
};

template <class Acc_>
struct Sgd {
  using Acc = Acc_;
  static constexpr int kStates = 0;
  static constexpr bool kPerRow = false;
  SeenGradient<Acc> gradient;
  Acc lr;
};

template <class Acc_>
struct MomentumSgd {
  using Acc = Acc_;
  static constexpr int kStates = 1;
  static constexpr bool kPerRow = false;
  SeenGradient<Acc> gradient;
  Acc lr, momentum, undamped;  // 1 - dampening
  bool nesterov;
  Rows state[1];  // momentum_buffer [V, D]
};

template <class Acc_>
struct Adagrad {
  using Acc = Acc_;
  static constexpr int kStates = 1;
  static constexpr bool kPerRow = false;
  SeenGradient<Acc> gradient;
  Acc lr, eps;
  Rows state[1];  // sum [V, D]
};

// With a number a row in place of one an element.
template <class Acc_>
struct RowwiseAdagrad {
  using Acc = Acc_;
  static constexpr int kStates = 0;
  static constexpr bool kPerRow = true;
  SeenGradient<Acc> gradient;
  Acc lr, eps;
  Rows per_row;  // sum [V]
};

template <class Acc>
struct AdamRates {
  Acc step_size;                      // lr over the correction of the first moment
  Acc kept;                           // of a row, after decoupled decay
  Acc beta1_left, beta2, beta2_left;  // 1 - beta
  Acc correction2;                    // the root of the second moment's
  Acc eps;
};

template <class Acc_>
struct Adam {
  using Acc = Acc_;
  static constexpr int kStates = 2;
  static constexpr bool kPerRow = false;
  SeenGradient<Acc> gradient;
  AdamRates<Acc> rates;
  Rows state[2];  // exp_avg, exp_avg_sq [V, D]
};

template <class Acc_>
struct RowwiseAdam {
  using Acc = Acc_;
  static constexpr int kStates = 1;
  static constexpr bool kPerRow = true;
  SeenGradient<Acc> gradient;
  AdamRates<Acc> rates;
  Rows state[1];  // exp_avg [V, D]
  Rows per_row;   // exp_avg_sq [V]
};

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
