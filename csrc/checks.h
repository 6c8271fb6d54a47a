// Argument checks shared by every device: the one place that words what a bad call is told.
//
// Each function raises before any memory is touched. Messages name the op, the rule and the value.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

namespace embed_ext {

// uint8, int8, int16, uint16, int32, uint32, int64.
bool is_index_type(at::ScalarType type);

// weight [V, D] of any dtype, indices [...] of an index type, both on one device.
void check_lookup(const char* op, const at::Tensor& weight, const at::Tensor& indices);

// grad_output [..., D] floating or complex, indices [...] of an index type, both on one device,
// num_weights >= 0.
void check_grad(const char* op, const at::Tensor& grad_output, const at::Tensor& indices,
                const c10::SymInt& num_weights);

// tensor is written in place: no two of its elements share a memory location.
void check_own_memory(const char* op, const char* name, const at::Tensor& tensor);

// Whether what lies from the first to the last element of each overlaps.
bool share_memory(const at::Tensor& a, const at::Tensor& b);

// As check_grad, and: grad_weight [V, D] is on the same device, of grad_output's dtype or, for
// bfloat16 and float16, float32; its rows have unit inner stride and do not overlap, and it shares
// no memory with grad_output and indices.
void check_grad_add(const char* op, const at::Tensor& grad_weight, const at::Tensor& grad_output,
                    const at::Tensor& indices);

// As check_lookup, and: weight is floating or complex and no two of its elements share a memory
// location, max_norm and norm_type are not NaN.
void check_renorm(const char* op, const at::Tensor& weight, const at::Tensor& indices,
                  double max_norm, double norm_type);

// IndexError: which index, at which position of `indices_sizes`, and how many rows there are.
// `position` counts in row-major order. Without sizes (not known any more) it is given as it is.
[[noreturn]] void raise_index_error(const char* op, int64_t index, int64_t position,
                                    at::OptionalIntArrayRef indices_sizes, int64_t num_rows);

}  // namespace embed_ext
