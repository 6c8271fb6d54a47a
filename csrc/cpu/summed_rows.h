// The sums of a gradient's rows, handed on while they are in a core's cache.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstdint>

namespace embed_ext::cpu {

// Sums of some rows: of table rows [count], ascending, values [count, D] of the gradient's dtype.
using UseSums = c10::function_ref<void(const int64_t* rows, void* values, int64_t count)>;

// Calls use() with the sums over all i with indices[i] = v, for each row v in use once, from
// several threads. They are those of sum_gradient(), to the bit, but never are all of them in
// memory. values [N, D] float32, float64, bfloat16 or float16; indices [N] int64, checked here.
void for_each_sum(const char* op, const at::Tensor& values, const at::Tensor& indices,
                  int64_t num_rows, const UseSums& use);

}  // namespace embed_ext::cpu
