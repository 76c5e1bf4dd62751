// Tensor maps: what a TMA copy knows of a tensor in global memory. The CPU asks for one with `encode_tensor_map`;
// the device half calls the driver (cuTensorMapEncodeTiled), the host model checks the same rules and keeps the numbers.
#pragma once

#include <cstdint>

#if !defined(AADKERN_HOST_MODEL)
#include <cuda.h>
#endif

namespace aadkern {

enum class ElementType : int { BFloat16, Float16, Float32 };
// In the driver's order: the 16-byte units of a row are permuted within 32, 64 or 128 bytes.
enum class Swizzle : int { None, Bytes32, Bytes64, Bytes128 };

// A tensor of four dimensions, the innermost contiguous; attention's is (D, L, H, B). Sizes and boxes are in elements.
struct TensorMapRequest {
    const void* base;  // 16-byte aligned
    ElementType type;
    Swizzle swizzle;
    uint64_t size[4];    // 1 to 2^32
    uint64_t stride[3];  // bytes, of dimensions 1 to 3: multiples of 16, below 2^40
    uint32_t box[4];     // 1 to 256; box[0] in bytes is a multiple of 16, and at most the swizzle's span
};

#if defined(AADKERN_HOST_MODEL)
struct TensorMap {
    TensorMapRequest request;
    int element_bytes;
    uint32_t box_bytes;
};
#else
using TensorMap = CUtensorMap;
#endif

// nullptr, or why the map cannot be made.
const char* encode_tensor_map(const TensorMapRequest& request, TensorMap* map);

}  // namespace aadkern
