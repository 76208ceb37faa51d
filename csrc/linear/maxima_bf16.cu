#include "linear/kernel.cuh"

template void specrt::product::start<specrt::bf16_t, true>(const KernelParams&, CudaStream);
