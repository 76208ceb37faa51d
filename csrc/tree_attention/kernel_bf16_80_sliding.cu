#include "tree_attention/kernel.cuh"

template void specrt::attention::start<specrt::bf16_t, 80, false>(const KernelParams&, CudaStream);
