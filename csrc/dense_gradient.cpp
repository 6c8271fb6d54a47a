#include "dense_gradient.h"

namespace embed_ext {

std::array<const DenseGradientKernels*, c10::COMPILE_TIME_MAX_DEVICE_TYPES>
    dense_gradient_kernels{};

}  // namespace embed_ext
