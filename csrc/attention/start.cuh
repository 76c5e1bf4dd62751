// How a kernel is started: the one place of the attention kernels that talks to the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace aadkern {

// `blocks` in one dimension, below 2^31; nothing is started where there are none. The error is this launch's own: after <<<>>>,
// cudaGetLastError would also tell of an earlier call that failed.
template <class Parameters>
cudaError_t start(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, const Parameters& parameters,
                  void* stream) {
    if (blocks == 0) return cudaSuccess;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(uint32_t(blocks));
    launch.blockDim = dim3(uint32_t(threads));
    launch.dynamicSmemBytes = size_t(shared_bytes);
    launch.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&launch, kernel, parameters);
}

}  // namespace aadkern
