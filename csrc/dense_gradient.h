// What a dense gradient is the sum of, on every device, and what each device does to make one.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>

#include "kept_gradient.h"

namespace embed_ext {

struct DenseGradient {
  const at::Tensor& grad_output;  // [..., D]
  const at::Tensor& indices;      // [...]
  int64_t num_weights;            // V
  int64_t padding_idx;            // -1: none
  bool scale_grad_by_freq;
};

// What the autograd nodes ask of a device, past the dispatcher. grad_output is of a real dtype;
// `kept` may be null.
struct DenseGradientKernels {
  // The gradient [V, D], in the memory that `kept` keeps or, without it, in other memory.
  at::Tensor (*make)(const char* op, const DenseGradient& task, KeptGradient* kept);
  // Adds it to table [V, D], whose rows have unit inner stride, of grad_output's dtype or, for
  // bfloat16 and float16, float32. Bumps the table's version before anything is written: what fails
  // after that must not pass for untouched. `kept` is told of the rows.
  void (*add)(const char* op, const DenseGradient& task, const at::Tensor& table,
              KeptGradient* kept);
};

// By device type; each device brings its own when the library is loaded.
extern std::array<const DenseGradientKernels*, c10::COMPILE_TIME_MAX_DEVICE_TYPES>
    dense_gradient_kernels;

// `kernels` lives as long as the process.
inline bool register_dense_gradient(c10::DeviceType type, const DenseGradientKernels& kernels) {
  dense_gradient_kernels.at(static_cast<size_t>(type)) = &kernels;
  return true;
}

}  // namespace embed_ext
