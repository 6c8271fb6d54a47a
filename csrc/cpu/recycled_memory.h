// Memory of large tensors, used again by the next tensor of its size.
//
// malloc gives a block of 32 MiB and more back to the system when its tensor dies, so that the
// gradient of every step pays for its pages anew: a fault a page, and the zeros that the system
// writes. A block that is still here costs a memset, an order of magnitude less. The pages of what
// waits are the system's to take whenever it is short of memory, but for 64 MiB at most.
#pragma once

#include <ATen/core/Tensor.h>

namespace embed_ext::cpu {

// A contiguous [num_rows, width] tensor of zeros.
at::Tensor zero_rows(int64_t num_rows, int64_t width, const at::TensorOptions& options);

// A contiguous tensor [...] that is about to be written from end to end.
at::Tensor empty_output(at::IntArrayRef sizes, const at::TensorOptions& options);

// With all threads.
void fill_with_zero(void* data, int64_t bytes);

// Bytes of the blocks that wait for their next tensor; drop_recycled_memory() gives them back to
// the system and returns how many there were.
int64_t recycled_memory_bytes();
int64_t drop_recycled_memory();

}  // namespace embed_ext::cpu
