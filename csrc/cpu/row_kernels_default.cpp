#define M3BIND_LANES 4
#define M3BIND_NAME default
#include "row_kernels_impl.h"
