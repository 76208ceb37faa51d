#include "linear/kernel.cuh"

template void specrt::product::start_narrow<specrt::bf16_t>(const KernelParams&, CudaStream);
