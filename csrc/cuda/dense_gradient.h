// What the autograd nodes ask of the CUDA half. In a CPU-only build no_cuda.cpp answers.
#pragma once

#include "../dense_gradient.h"
#include "../kept_gradient.h"

namespace embed_ext::cuda {

// The gradient [V, D] in the memory that `kept` keeps. While a CUDA graph is captured, in memory of
// the graph's own: which rows a replay writes is not known here.
at::Tensor gradient_in_kept_memory(const char* op, const DenseGradient& task, KeptGradient& kept);

// Adds the gradient to table [V, D], whose rows have unit inner stride, of grad_output's dtype or,
// for bfloat16 and float16, float32. Bumps the table's version before anything is written; `kept`,
// unless null, is told of the rows.
void add_gradient(const char* op, const DenseGradient& task, const at::Tensor& table,
                  KeptGradient* kept);

}  // namespace embed_ext::cuda
