// What the kernels are written in: Hopper's instructions, or, in the tests, the same functions run
// by a processor without a GPU.
#pragma once

#ifdef __CUDACC__
#include "hopper.h"
#else
#include "emulated.h"
#endif
