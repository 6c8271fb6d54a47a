// What is asked of a leaf, of the AccumulateGrad that fills its .grad, and of any tensor before it
// is worked on past the operators.
#pragma once

#include <torch/csrc/autograd/functions/accumulate_grad.h>

#include <mutex>

namespace embed_ext {

// What AccumulateGrad::apply holds while it changes .grad.
std::mutex& mutex_of(torch::autograd::AccumulateGrad& accumulator);

// AccumulateGrad leaves alone what was frozen since the forward, and raises for what is no leaf.
bool still_accumulates(const at::Tensor& variable);

// Whether a transform or a mode is on that wants to see every operator.
bool any_watches();

// Whether no transform or mode goes with `tensor`.
bool is_plain(const at::Tensor& tensor);

// Whether `tensor` is nothing but a dense CPU or CUDA tensor in this call: no subclass, no
// transform, no tangent, no mode that would want to see an operator run on it, and no gradient of a
// gradient being recorded.
bool is_plain_call(const at::Tensor& tensor);

}  // namespace embed_ext
