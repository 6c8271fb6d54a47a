// What a dense gradient is the sum of, on every device.
#pragma once

#include <ATen/core/Tensor.h>

namespace embed_ext {

struct DenseGradient {
  const at::Tensor& grad_output;  // [..., D]
  const at::Tensor& indices;      // [...]
  int64_t num_weights;            // V
  int64_t padding_idx;            // -1: none
  bool scale_grad_by_freq;
};

}  // namespace embed_ext
