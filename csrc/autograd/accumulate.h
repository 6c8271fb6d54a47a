// Where a lookup's gradient goes next: what is there that its rows can be added to, in place of a
// table of their own that somebody adds up later.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <mutex>

#include "../kept_gradient.h"

namespace embed_ext {

// The sum that the other uses of a leaf have made so far in the running backward. Holds the lock
// under which the engine adds to it.
class SumOnItsWay {
 public:
  // To be added to by `node`, whose only gradient is [num_weights, D]: all that has arrived at the
  // AccumulateGrad that this gradient goes to is one dense tensor of grad_output's dtype, in memory
  // that nobody else has but perhaps `kept`, which may be null; on CUDA it is there on the stream
  // that is current. grad_output [..., D].
  SumOnItsWay(const torch::autograd::Node& node, const at::Tensor& grad_output,
              const at::Tensor& indices, int64_t num_weights, const KeptGradient* kept);

  explicit operator bool() const { return sum_.defined(); }
  const at::Tensor& tensor() const { return sum_; }

 private:
  std::unique_lock<std::mutex> lock_;
  at::Tensor sum_;
};

// Holds AccumulateGrad's lock while its variable's .grad is added to.
class GradToAddTo {
 public:
  // The .grad that `node`'s only gradient [num_weights, D] is about to be added to by a plain
  // backward(): there already, dense and of grad_output's dtype, with nobody who asked to see the
  // increment, nothing else to be added to it, and on CUDA on the stream that is current.
  // grad_output [..., D].
  GradToAddTo(const torch::autograd::Node& node, const at::Tensor& grad_output,
              const at::Tensor& indices, int64_t num_weights);

  explicit operator bool() const { return grad_.defined(); }
  const at::Tensor& tensor() const { return grad_; }

 private:
  std::unique_lock<std::mutex> lock_;
  at::Tensor grad_;
};

}  // namespace embed_ext
