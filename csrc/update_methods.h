// What an optimizer's update of some rows is, as plain numbers and pointers, for the kernels of
// every device. No functions: each kernel compiles those that it needs with its own flags.
#pragma once

#include <cstdint>

namespace embed_ext {

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

}  // namespace embed_ext
