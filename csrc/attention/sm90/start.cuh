// How a kernel is started: the one place of the attention kernels that talks to the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#if defined(AADKERN_SPIN_SECONDS)
#include <cstdio>
#include <cstdlib>
#include <cstring>
#endif

#include "primitives/primitives.h"

namespace aadkern {

#if defined(AADKERN_SPIN_SECONDS)
// Gives this file's kernels a place for their records, on the device of the first launch, which must not be captured; what is there at
// the process's end goes to stderr.
namespace {
uint32_t* records_on_host;

void print_spins() {
    for (int i = 0; i < spin_record_count; ++i) {
        const uint32_t* it = records_on_host + 4 * i;
        if (it[0] == 0) continue;
        const char* what = it[2] != 0 ? "the mbarrier at shared" : "its turn, a counter";
        std::fprintf(stderr, "aadkern: CTA %u, warp %u waits for %s %#x to pass %u\n", it[0] - 1, it[1], what, it[2], it[3]);
    }
}

cudaError_t keep_records() {
    if (records_on_host != nullptr) return cudaSuccess;
    constexpr size_t bytes = spin_record_count * 4 * sizeof(uint32_t);
    cudaError_t error = cudaHostAlloc(&records_on_host, bytes, cudaHostAllocMapped);
    if (error != cudaSuccess) return error;
    std::memset(records_on_host, 0, bytes);
    std::atexit(print_spins);
    uint32_t* on_device = nullptr;
    error = cudaHostGetDevicePointer(&on_device, records_on_host, 0);
    return error == cudaSuccess ? cudaMemcpyToSymbol(spin_records, &on_device, sizeof on_device) : error;
}
}  // namespace
#endif

// `blocks` in one dimension, below 2^31; nothing is started where there are none. The error is this launch's own: after <<<>>>,
// cudaGetLastError would also tell of an earlier call that failed.
template <class Parameters>
cudaError_t start(void (*kernel)(Parameters), int64_t blocks, int threads, int shared_bytes, const Parameters& parameters,
                  void* stream) {
    if (blocks == 0) return cudaSuccess;
#if defined(AADKERN_SPIN_SECONDS)
    if (const cudaError_t problem = keep_records(); problem != cudaSuccess) return problem;
#endif
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
