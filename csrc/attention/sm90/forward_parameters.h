// What the forward kernels are launched with, made from `ForwardArguments`. It runs on the CPU; the real launch and the host model share it.
#pragma once

#include <cfloat>

#include "attention/launch.h"
#include "attention/sm90/maps.h"

namespace aadkern {

struct ForwardParameters {
    TensorMap q, k, v;  // boxes of a tile's rows (q) and of a key tile's (k, v) of one panel
    TensorView out;
    float* lse;
    Tables tables;
    int32_t batch, heads, q_len, head_group;
    float scale_log2;  // scale log2(e); > 0, so that a masked score, -inf, stays so
};

// nullptr, or why the parameters cannot be made.
inline const char* make_forward_parameters(const ForwardArguments& arguments, ForwardKernel kernel, ForwardParameters* parameters) {
    const Shape& shape = arguments.shape;
    if (shape.head_dim != 64 && shape.head_dim != 128) return "head_dim must be 64 or 128";
    const float scale_log2 = arguments.scale * 1.44269504088896340736f;
    if (!(arguments.scale >= 0.f && scale_log2 <= FLT_MAX)) return "scale must be finite and not negative";
    if (arguments.head_group < 1) return "head_group must be at least 1";
    const char* problem = make_panel_map(arguments.q, shape, shape.q_len, forward_tile_rows(kernel), &parameters->q);
    parameters->k = parameters->v = parameters->q;  // for a tensor without keys, which nothing is loaded from
    if (shape.k_len > 0) {
        const int keys = forward_tile_keys(kernel);
        if (problem == nullptr) problem = make_panel_map(arguments.k, shape, shape.k_len, keys, &parameters->k);
        if (problem == nullptr) problem = make_panel_map(arguments.v, shape, shape.k_len, keys, &parameters->v);
    }
    parameters->out = arguments.out;
    parameters->lse = arguments.lse;
    parameters->tables = arguments.tables;
    parameters->batch = shape.batch;
    parameters->heads = shape.heads;
    parameters->q_len = shape.q_len;
    parameters->head_group = arguments.head_group < shape.batch * shape.heads ? arguments.head_group : shape.batch * shape.heads;
    parameters->scale_log2 = scale_log2 < FLT_MIN ? FLT_MIN : scale_log2;
    return problem;
}

}  // namespace aadkern
