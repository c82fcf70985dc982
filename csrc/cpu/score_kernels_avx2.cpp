#define M3BIND_LANES 8
#define M3BIND_NAME avx2
#include "score_kernels_impl.h"
