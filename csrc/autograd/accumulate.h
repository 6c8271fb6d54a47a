// Where a lookup's gradient goes next.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <mutex>

namespace embed_ext {

// If a backward is running, the .grad that becomes of `grad` [V, D], which is coalesced, will say
// that it is: AccumulateGrad puts the parts of a sparse gradient into a new tensor that does not.
void stay_coalesced(const at::Tensor& grad);

// Whether `tensor` is nothing but a dense CPU or CUDA tensor in this call: no subclass, no
// transform, no tangent, no mode that would want to see an operator run on it, and no gradient of a
// gradient being recorded.
bool is_plain_call(const at::Tensor& tensor);

// Whether nothing else in the running backward adds to what `node` adds to: then there is no sum of
// several gradients to be made first, and none that could fail half-way.
bool feeds_alone(const torch::autograd::Node& node);

// Holds AccumulateGrad's lock while its variable's .grad is added to.
class GradToAddTo {
 public:
  // The .grad that `node`'s only gradient [num_weights, D] is about to be added to by a plain
  // backward(): there already, dense and of grad_output's dtype, with nobody who asked to see the
  // increment, and on CUDA on the stream that is current. grad_output [..., D].
  GradToAddTo(torch::autograd::Node& node, const at::Tensor& grad_output, const at::Tensor& indices,
              int64_t num_weights);

  explicit operator bool() const { return grad_.defined(); }
  const at::Tensor& tensor() const { return grad_; }

 private:
  std::unique_lock<std::mutex> lock_;
  at::Tensor grad_;
};

}  // namespace embed_ext
