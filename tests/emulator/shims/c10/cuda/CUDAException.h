#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include "interface.h"

#define C10_CUDA_CHECK(CALL)                                                        \
  do {                                                                              \
    const cudaError_t result = (CALL);                                              \
    TORCH_CHECK(result == cudaSuccess, "emulated CUDA error ", result, ": " #CALL); \
  } while (0)

#define C10_CUDA_KERNEL_LAUNCH_CHECK()                              \
  do {                                                              \
    const char* const error = ::emulator::launch_error();           \
    TORCH_CHECK(error == nullptr, "emulated CUDA device: ", error); \
  } while (0)
