// How a kernel reports a bad index, and how the host learns of it.
//
// A kernel cannot raise, and a device-side assertion would leave the context unusable. So each
// device has one slot in host memory that kernels can write to: a bad index is left there, of
// several the one whose thread comes first, and the host looks into the slot, which costs it one
// read of its own memory, at the next call. Whatever its thread or stream, that call raises: what
// is raised names the op, position and table of the call that got the index. Until it is raised,
// other bad indices, of other streams too, are not reported.
//
// In sync mode a call has a slot of its thread's own, so that it raises for its own indices, of
// which it knows the shape, and for no other call's.
#pragma once

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include "index_errors.cuh"

namespace embed_ext::cuda {

// Whether the current stream records a CUDA graph.
bool is_capturing();

// Opens the call of `op` on the current device, which is the tensors': raises what an earlier call
// left (but not in mode none, which never looks), and, if there are indices [...] but no rows,
// IndexError at once. What it returns is for the kernels of this call.
IndexErrors open_index_check(const char* op, const at::Tensor& indices, int64_t num_rows);

// Closes it: if it was opened in sync mode, waits for `stream` and raises. While a graph is
// captured nothing can be waited for, so that the error comes as in lazy mode, after a replay.
void close_index_check(const at::Tensor& indices, cudaStream_t stream);

// In sync mode, raises before anything is written; for calls that change what was there before.
void check_indices_first(const at::Tensor& indices, const IndexErrors& errors, cudaStream_t stream);

// The same of indices [U] int64 that have to ascend strictly.
void check_ascending_first(const at::Tensor& indices, const IndexErrors& errors,
                           cudaStream_t stream);

// Looks at every index and at nothing else, for calls that have no row elements to move.
void launch_index_check(const at::Tensor& indices, const IndexErrors& errors, cudaStream_t stream);
void launch_ascending_check(const at::Tensor& indices, const IndexErrors& errors,
                            cudaStream_t stream);

}  // namespace embed_ext::cuda
