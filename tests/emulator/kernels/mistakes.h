// How a test calls a kernel of this folder.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// Each kernel but those of counted.cu takes `wrong`: with it, it makes its mistake, and without it
// it is right.
#define CALLED_FROM_TESTS extern "C" __attribute__((visibility("default")))
