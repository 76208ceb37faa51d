#include "linear/kernel.cuh"

template void specrt::product::start_narrow<specrt::f16_t>(const KernelParams&, CudaStream);
