// Device half of encode_tensor_map: the driver's own call, found at run time so that nothing links against libcuda.
#include "primitives/tensor_map.h"

#include <cuda_runtime.h>

namespace aadkern {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

struct Found {
    Encode encode;
    const char* problem;
};

Found find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) return {nullptr, cudaGetErrorString(error)};  // of a driver older than this runtime, for one
    if (found != cudaDriverEntryPointSuccess) {
        return {nullptr, "the CUDA driver has no cuTensorMapEncodeTiled (CUDA 12.0 or newer is needed)"};
    }
    return {reinterpret_cast<Encode>(function), nullptr};
}

CUtensorMapDataType data_type(ElementType type) {
    switch (type) {
        case ElementType::BFloat16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case ElementType::Float16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case ElementType::Float32: break;
    }
    return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

CUtensorMapSwizzle swizzle(Swizzle mode) {
    switch (mode) {
        case Swizzle::Bytes32: return CU_TENSOR_MAP_SWIZZLE_32B;
        case Swizzle::Bytes64: return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::Bytes128: return CU_TENSOR_MAP_SWIZZLE_128B;
        case Swizzle::None: break;
    }
    return CU_TENSOR_MAP_SWIZZLE_NONE;
}

}  // namespace

const char* encode_tensor_map(const TensorMapRequest& request, TensorMap* map) {
    static const Found found = find_encode();
    if (found.problem != nullptr) return found.problem;
    const cuuint32_t element_stride[4] = {1, 1, 1, 1};
    const CUresult result = found.encode(map, data_type(request.type), 4, const_cast<void*>(request.base), request.size,
                                         request.stride, request.box, element_stride, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                         swizzle(request.swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the sizes, strides or box";
}

}  // namespace aadkern
