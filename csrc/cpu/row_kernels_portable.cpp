#include "row_kernels.h"
#include "update_kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <type_traits>

#define EMBED_EXT_CAPABILITY portable
#define EMBED_EXT_VECTOR_BYTES 16
// In this order.
#include "vectors.inl"

#include "row_kernels.inl"
#include "update_kernels.inl"
