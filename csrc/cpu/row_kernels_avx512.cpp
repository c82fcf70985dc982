#define M3BIND_LANES 16
#define M3BIND_NAME avx512
#include "row_kernels_impl.h"
