// Tensor maps of [batch, length, heads, head_dim] tensors, as both kernels load them: panels of 64 columns, so that a row of a
// panel is the 128 bytes of one swizzle pattern. It runs on the CPU.
#pragma once

#include "attention/launch.h"
#include "primitives/tensor_map.h"

namespace aadkern {

constexpr int panel_columns = 64;
constexpr int panel_row_bytes = 128;

// The map (head_dim, length, head, batch) whose box is `rows` rows of one panel. nullptr, or why it cannot be made.
inline const char* make_panel_map(const TensorView& tensor, const Shape& shape, int length, int rows, TensorMap* map) {
    TensorMapRequest request{};
    request.base = tensor.data;
    request.type = shape.type == DataType::BFloat16 ? ElementType::BFloat16 : ElementType::Float16;
    request.swizzle = Swizzle::Bytes128;
    const int64_t sizes[4] = {shape.head_dim, length, shape.heads, shape.batch};
    const int64_t strides[3] = {tensor.length_stride, tensor.head_stride, tensor.batch_stride};
    for (int axis = 0; axis < 4; ++axis) request.size[axis] = uint64_t(sizes[axis]);
    // A dimension of size 1 may come with any stride; the driver wants a multiple of 16 bytes of it too.
    for (int axis = 0; axis < 3; ++axis) {
        request.stride[axis] = sizes[axis + 1] == 1 ? uint64_t(2 * shape.head_dim) : uint64_t(2 * strides[axis]);
    }
    const uint32_t box[4] = {panel_columns, uint32_t(rows), 1, 1};
    for (int axis = 0; axis < 4; ++axis) request.box[axis] = box[axis];
    return encode_tensor_map(request, map);
}

}  // namespace aadkern
