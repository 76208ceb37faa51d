#include "linear/kernel.cuh"

template void specrt::product::start<specrt::bf16_t, false>(const KernelParams&, CudaStream);
