// What an optimizer's update of some rows asks of its arguments, on every device. As in checks.h:
// everything is checked before memory is touched, and messages name the op, the rule and the value.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace embed_ext {

// One of the tensors that an optimizer keeps beside the table.
struct UpdateState {
  const char* name;
  const at::Tensor& tensor;  // [V, D], or [V] if `per_row` may be; undefined if there is none
  bool may_be_per_row;
};

// weight [V, D] float32, float64, bfloat16 or float16; indices [U] int64; values [U, D] of weight's
// dtype; states float32, or float64 for such a weight; all on one device, and what is written
// shares no memory with anything else. A seed, for stochastic rounding, needs bfloat16 or float16.
// What is in `indices` is for the kernels to check.
void check_update(const char* op, const at::Tensor& weight, const at::Tensor& indices,
                  const at::Tensor& values, std::initializer_list<UpdateState> states,
                  const std::optional<int64_t>& seed);

// momentum 0 where there is no buffer [V, D], in which it would be kept.
void check_momentum(const char* op, const at::Tensor& buffer, double momentum);

// step >= 1, with which the corrections of Adam's moments are not 0.
void check_step(const char* op, int64_t step);

// IndexError: indices[position] is not above the one before it.
[[noreturn]] void raise_not_ascending(const char* op, int64_t index, int64_t before,
                                      int64_t position);

}  // namespace embed_ext
