// Memory fresh from the system: zero already, and cheaper by the large page.
#pragma once

#include <ATen/core/Tensor.h>

namespace embed_ext::cpu {

// A contiguous [num_rows, width] tensor of zeros, of which `used_rows` rows are about to be
// written. A large table with few used rows comes from fresh anonymous memory, which the system
// hands out as zero and backs with real pages only where something is written.
at::Tensor zero_rows(int64_t num_rows, int64_t width, int64_t used_rows,
                     const at::TensorOptions& options);

// Asks for huge pages behind [data, data + bytes), which is about to be written from end to end,
// if it is so large that malloc mapped it just now.
void advise_written_whole(void* data, int64_t bytes);

}  // namespace embed_ext::cpu
