#define M3BIND_LANES 8
#define M3BIND_NAME avx2
#include "row_kernels_impl.h"
