#include "linear/kernel.cuh"

template void specrt::product::start<specrt::bf16_t>(const KernelParams&, CudaStream);
