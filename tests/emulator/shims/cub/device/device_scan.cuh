// In place of CUB's, on the host.
#pragma once

#include <cstddef>

#include "interface.h"

namespace cub {

struct DeviceScan {
  template <class Input, class Output>
  static cudaError_t InclusiveSum(void* workspace, size_t& bytes, const Input& input,
                                  Output* output, int count, cudaStream_t /*stream*/) {
    if (workspace == nullptr) {
      bytes = ::emulator::kWorkspaceBytes;
      return cudaSuccess;
    }
    const size_t output_bytes = count * sizeof(Output);
    if (const auto error =
            ::emulator::check_cub("scan", workspace, bytes, {{output, output_bytes}});
        error != cudaSuccess) {
      return error;
    }
    Output sum{};
    for (int i = 0; i < count; ++i) {
      sum += input[i];
      output[i] = sum;
    }
    return cudaSuccess;
  }
};

}  // namespace cub
