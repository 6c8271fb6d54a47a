// In place of CUB's, on the host.
#pragma once

#include <cstddef>

#include "interface.h"

namespace cub {

struct DeviceSelect {
  template <class Input, class Output, class Count, class Predicate>
  static cudaError_t If(void* workspace, size_t& bytes, const Input& input, Output* output,
                        Count* selected, int count, const Predicate& is_selected,
                        cudaStream_t /*stream*/) {
    if (workspace == nullptr) {
      bytes = ::emulator::kWorkspaceBytes;
      return cudaSuccess;
    }
    Count number{};
    for (int i = 0; i < count; ++i) {
      number += is_selected(input[i]);
    }
    const size_t output_bytes = number * sizeof(Output);
    if (const auto error = ::emulator::check_cub(
            "select", workspace, bytes, {{output, output_bytes}, {selected, sizeof(Count)}});
        error != cudaSuccess) {
      return error;
    }
    for (int i = 0; i < count; ++i) {
      if (is_selected(input[i])) {
        *output++ = input[i];
      }
    }
    *selected = number;
    return cudaSuccess;
  }
};

}  // namespace cub
