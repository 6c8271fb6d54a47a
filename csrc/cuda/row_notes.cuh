// What the segment kernels say of the rows in use besides their sums.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace embed_ext::cuda {

// Left by the first token of each row.
struct RowNotes {
  uint8_t* used;              // [V] or null: 1
  int64_t* entry;             // [num_rows] or null: its row of the table
  const uint32_t* table_row;  // [N] of the sorted tokens, if there is `entry`

  __device__ void note(uint32_t row, int64_t token) const {
    if (used != nullptr) {
      used[row] = 1;
    }
    if (entry != nullptr) {
      entry[row] = table_row[token];
    }
  }
};

}  // namespace embed_ext::cuda
