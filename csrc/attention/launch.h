// What a launch of attention needs, in plain structs: no torch and no CUDA header, so that bindings, tests and the host model
// share it. Checks of shapes and alignment are the caller's; functions return nullptr, or why nothing was launched.
#pragma once

#include <cstdint>

namespace aadkern {

enum class DataType : int { BFloat16 = 0, Float16 = 1 };

// A [batch, length, heads, head_dim] tensor of 16-bit elements, head_dim contiguous. Strides are in elements. What TMA loads has a
// 16-byte aligned base and positive strides of a multiple of 8 elements (16 bytes), except where a dimension has size 1.
struct TensorView {
    void* data;
    int64_t batch_stride;
    int64_t length_stride;
    int64_t head_stride;
};

// `aadkern/range_attention/tiles.py`: tiles int32 [tile_count, 4] of (first row, end of rows, first range, end of ranges), longest
// first; ranges int32 [., 2] of (start, end). On the device. A tile has at most the kernel's rows, a range at least one key.
struct Tables {
    const int32_t* tiles;
    const int32_t* ranges;
    int32_t tile_count;
};

struct Shape {
    int32_t batch;
    int32_t heads;
    int32_t q_len;
    int32_t k_len;
    int32_t head_dim;  // 64 or 128
    DataType type;
};

// The forward kernels, from the plainest up. They compute the same function.
enum class ForwardKernel : int {
    Simple = 0,       // one warpgroup of 64 query rows, nothing overlaps
    Specialised = 1,  // a producer and two consumer warpgroups of 64 query rows; softmax behind the P V of the key tile before
    PingPong = 2,     // the same, and the two consumers take turns at the tensor cores
    Wide = 3,         // the same with 176 keys a tile, so that the softmax has longer to hide
    Persistent = 4,   // the same, one CTA a multiprocessor, which does tiles in turn
};

struct ForwardArguments {
    Shape shape;
    TensorView q, k, v;
    TensorView out;  // written by plain 16-byte stores: same alignment as q
    float* lse;      // [batch, heads, q_len], contiguous; natural logarithm, -inf where a query sees no key
    Tables tables;   // cut with `forward_tile_rows` rows; every query row in exactly one tile
    float scale;     // >= 0, finite; of the scores, applied in fp32
    // How many (batch, head) pairs walk the tiles side by side (`tiles.heads_per_group`): what they read should stay in L2.
    int32_t head_group;
    int32_t persistent_ctas;  // of `Persistent`, at most; 0: one for each multiprocessor of the current device
};

// Query rows of a tile, and keys of a step (to count a tile's work, longest first).
constexpr int forward_tile_rows(ForwardKernel kernel) { return kernel == ForwardKernel::Simple ? 64 : 128; }
constexpr int forward_tile_keys(ForwardKernel kernel) {
    return kernel == ForwardKernel::Wide || kernel == ForwardKernel::Persistent ? 176 : 128;
}

// `stream` is a cudaStream_t. Nothing is launched where a size is 0.
const char* launch_forward(const ForwardArguments& arguments, ForwardKernel kernel, void* stream);

// `aadkern/range_attention/sm90_tables.py`, int32, on the device. A span is a run of queries that a key tile sees whole.
struct BackwardTables {
    const int32_t* query_tiles;  // [query_tile_count, 2]: first row, end of rows; they restart at every run of queries, in row order
    const int32_t* key_tiles;    // [key_tile_count, 4]: first row, end of rows, first span, end of spans; longest first
    const int32_t* spans;        // [., 4]: first row, end of rows, first query tile, number of earlier key tiles that see it
    int32_t query_tile_count;
    int32_t key_tile_count;
};

struct BackwardArguments {
    Shape shape;
    TensorView q, k, v, out, dout;  // 16-byte aligned as in the forward
    TensorView dq, dk, dv;          // written by plain stores: same alignment
    const float* lse;               // [batch, heads, q_len], as the forward wrote it
    const float* dlse;              // the same shape, contiguous, or nullptr
    BackwardTables tables;
    int32_t query_rows;  // of a tile of `tables`: 64 or 80 at head_dim 128, 128 at head_dim 64
    float scale;
    int32_t head_group;  // as in the forward; of q, dout and the fp32 accumulator of dq
    bool deterministic;  // dq is summed in the order of key_tiles
    void* workspace;     // `backward_workspace_bytes` (backward_parameters.h), 256-byte aligned; nothing is expected in it
};

constexpr int backward_tile_keys = 128;

// Three launches: what the rows of queries need, the gradients, and dq from its accumulator.
const char* launch_backward(const BackwardArguments& arguments, void* stream);

}  // namespace aadkern
