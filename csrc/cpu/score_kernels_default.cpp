#define M3BIND_LANES 4
#define M3BIND_NAME default
#include "score_kernels_impl.h"
