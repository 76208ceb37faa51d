#include "linear/kernel.cuh"

template void specrt::product::start<specrt::f16_t, false>(const KernelParams&, CudaStream);
