#include "tree_attention/kernel.cuh"

template void specrt::attention::start<specrt::f16_t, 80, false>(const KernelParams&, CudaStream);
