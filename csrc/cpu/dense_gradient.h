// The sum behind every gradient on the CPU that has one, wherever it is to go.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <vector>

#include "../dense_gradient.h"

namespace embed_ext::cpu {

// Where the sums go: called once everything has been checked, with the U rows in use, ascending.
// Returns a tensor whose rows have unit inner stride: [V, D], or [U, D] for packed sums.
using TableOf = c10::function_ref<at::Tensor(std::vector<int64_t>& used_rows)>;

enum class Sums {
  kWritten,  // over what the used rows of the table hold
  kAdded,    // to it; the sum of both is rounded once
  kPacked,   // written one after the other: the table has the used rows alone
};

// table[v], or the packed table's row for v, gets the sum of grad_output[i] over all i with
// indices[i] = v; returns the table. grad_output is of a real dtype; table_type is the same or, for
// bfloat16 and float16, float32.
at::Tensor sum_gradient(const char* op, const DenseGradient& task, Sums sums,
                        at::ScalarType table_type, const TableOf& table_of);

}  // namespace embed_ext::cpu
