#include "row_kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <type_traits>

#define EMBED_EXT_CAPABILITY portable
#include "row_kernels.inl"
