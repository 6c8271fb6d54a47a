// The sum behind every dense gradient on the CPU, wherever it is to go.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <vector>

namespace embed_ext::cpu {

struct DenseGradient {
  const at::Tensor& grad_output;  // [..., D], of a real dtype unless the table is new
  const at::Tensor& indices;      // [...]
  int64_t num_weights;            // V
  int64_t padding_idx;            // -1: none
  bool scale_grad_by_freq;
};

// Where the sums go: called once everything has been checked, with the rows in use, ascending.
// Returns a [V, D] tensor of grad_output's dtype whose rows have unit inner stride.
using TableOf = c10::function_ref<at::Tensor(std::vector<int64_t>& used_rows)>;

enum class Sums {
  kWritten,  // over what the used rows of the table hold
  kAdded,    // to it; the sum of both is rounded once
};

// table[v] gets the sum of grad_output[i] over all i with indices[i] = v; returns the table.
at::Tensor sum_gradient(const char* op, const DenseGradient& task, Sums sums,
                        const TableOf& table_of);

}  // namespace embed_ext::cpu
