// From an op's checked arguments to update_methods.h, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "update_methods.h"

namespace embed_ext {

// The parts of a sparse gradient [V, D].
struct RowGradient {
  const at::Tensor& indices;  // [N] int64; of a coalesced gradient they ascend and differ
  const at::Tensor& values;   // [N, D]
  bool coalesced;
};

// The rows of a tensor [V, D] or [V], which are to be written.
inline Rows rows_of(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.dim() == 2 ? tensor.stride(1) : 1};
}

// weight [V, D], indices [U] contiguous, values [U, D]
inline UpdateTask update_task(const at::Tensor& weight, const at::Tensor& indices,
                              const at::Tensor& values, const std::optional<int64_t>& seed) {
  return {rows_of(weight),
          {const_cast<void*>(values.const_data_ptr()), values.stride(0), values.stride(1)},
          indices.const_data_ptr<int64_t>(),
          indices.numel(),
          weight.size(1),
          seed.has_value(),
          static_cast<uint64_t>(seed.value_or(0))};
}

template <class Acc>
SeenGradient<Acc> seen_gradient(bool maximize, double weight_decay) {
  return {maximize ? Acc(-1) : Acc(1), static_cast<Acc>(weight_decay)};
}

// Calls f(method). buffer [V, D], or undefined
template <class Acc, class F>
void with_sgd(const SeenGradient<Acc>& gradient, const at::Tensor& buffer, double lr,
              double momentum, double dampening, bool nesterov, const F& f) {
  const auto rate = static_cast<Acc>(lr);
  if (!buffer.defined()) {
    return f(Sgd<Acc>{gradient, rate});
  }
  f(MomentumSgd<Acc>{gradient,
                     rate,
                     static_cast<Acc>(momentum),
                     static_cast<Acc>(1 - dampening),
                     nesterov,
                     {rows_of(buffer)}});
}

// Calls f(method). sum [V, D] or [V]
template <class Acc, class F>
void with_adagrad(const SeenGradient<Acc>& gradient, const at::Tensor& sum, double lr, double eps,
                  const F& f) {
  const auto rate = static_cast<Acc>(lr), smallest = static_cast<Acc>(eps);
  if (sum.dim() == 1) {
    f(RowwiseAdagrad<Acc>{gradient, rate, smallest, rows_of(sum)});
  } else {
    f(Adagrad<Acc>{gradient, rate, smallest, {rows_of(sum)}});
  }
}

// `kept` is what decoupled decay leaves of a row.
template <class Acc>
AdamRates<Acc> adam_rates(double lr, double beta1, double beta2, double eps, double kept,
                          int64_t step) {
  return {
      static_cast<Acc>(lr / (1 - std::pow(beta1, step))),
      static_cast<Acc>(kept),
      static_cast<Acc>(1 - beta1),
      static_cast<Acc>(beta2),
      static_cast<Acc>(1 - beta2),
      static_cast<Acc>(std::sqrt(1 - std::pow(beta2, step))),
      static_cast<Acc>(eps),
  };
}

// Calls f(method). exp_avg [V, D], exp_avg_sq [V, D] or [V]
template <class Acc, class F>
void with_adam(const SeenGradient<Acc>& gradient, const AdamRates<Acc>& rates,
               const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq, const F& f) {
  if (exp_avg_sq.dim() == 1) {
    f(RowwiseAdam<Acc>{gradient, rates, {rows_of(exp_avg)}, rows_of(exp_avg_sq)});
  } else {
    f(Adam<Acc>{gradient, rates, {rows_of(exp_avg), rows_of(exp_avg_sq)}});
  }
}

}  // namespace embed_ext
