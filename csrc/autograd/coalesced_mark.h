// A sparse gradient's mark that it is coalesced, kept until it is .grad.
#pragma once

#include <ATen/core/Tensor.h>

namespace embed_ext {

// If a backward is running, and the node that it is at hands `grad` [V, D], which is coalesced, to
// a leaf, then the leaf's .grad will say that it is, too: AccumulateGrad puts the parts of a sparse
// gradient into a new tensor that does not.
void stay_coalesced(const at::Tensor& grad);

}  // namespace embed_ext
