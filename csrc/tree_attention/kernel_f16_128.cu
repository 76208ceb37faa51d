#include "tree_attention/kernel.cuh"

template void specrt::attention::start<specrt::f16_t, 128, true>(const KernelParams&, CudaStream);
