// The host model's encode_tensor_map: the driver's rules (cuTensorMapEncodeTiled), and the numbers as they are.
#include "primitives/tensor_map.h"

namespace aadkern {

const char* encode_tensor_map(const TensorMapRequest& request, TensorMap* map) {
    static constexpr uint32_t kSpan[] = {0, 32, 64, 128};
    const int bytes = request.type == ElementType::Float32 ? 4 : 2;
    if (request.base == nullptr || uintptr_t(request.base) % 16 != 0) return "the base must be 16-byte aligned";
    for (int d = 0; d < 4; d++) {
        if (request.size[d] < 1 || request.size[d] > uint64_t(1) << 32) return "a size must be 1 to 2^32";
        if (request.box[d] < 1 || request.box[d] > 256) return "a box must be 1 to 256 elements";
        if (d > 0 && (request.stride[d - 1] % 16 != 0 || request.stride[d - 1] >= uint64_t(1) << 40)) {
            return "a stride must be a multiple of 16 bytes below 2^40";
        }
    }
    const uint32_t row = request.box[0] * uint32_t(bytes);
    if (row % 16 != 0) return "a row of the box must be a multiple of 16 bytes";
    if (request.swizzle != Swizzle::None && row > kSpan[int(request.swizzle)])
        return "a row of the box is longer than the swizzle's span";
    if (request.swizzle != Swizzle::None && row < kSpan[int(request.swizzle)])
        return "a row shorter than the swizzle's span is not modelled";
    map->request = request;
    map->element_bytes = bytes;
    map->box_bytes = row * request.box[1] * request.box[2] * request.box[3];
    return nullptr;
}

}  // namespace aadkern
