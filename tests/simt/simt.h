// CUDA's vocabulary on the CPU: what a kernel source sees instead of CUDA's headers. See README.md.
#pragma once
#include "arithmetic.h"
#include "async_copy.h"
#include "atomics.h"
#include "cuda_types.h"
#include "device.h"
#include "float16.h"
#include "graph.h"
#include "launch.h"
#include "matrix.h"
#include "scheduler.h"
#include "shared_memory.h"
#include "warp.h"
