#define M3BIND_LANES 16
#define M3BIND_NAME avx512
#include "score_kernels_impl.h"
