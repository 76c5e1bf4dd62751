// What the backward kernels are launched with, made from `BackwardArguments`: tile sizes, the workspace, parameters. It runs on the CPU, and
// the real launch and the host model share it.
#pragma once

#include <cmath>

#include "attention/launch.h"
#include "attention/sm90/maps.h"

namespace aadkern {

// A CTA owns 128 keys, 64 for each of two consumer warpgroups, and walks the query tiles that see them. A query tile has as many rows as
// make S^T and dP^T, dK and dV, and a warpgroup's half of dQ cost about the same registers for either head_dim:
//   fp32 accumulators of a thread     head_dim 128                        head_dim 64
//   S^T, dP^T  64 keys x queries      2 x 32 (64 queries)                 2 x 64 (128 queries)
//   dK, dV     64 keys x head_dim     2 x 64                              2 x 32
//   half of dQ                        32 (64 queries x 64 of 128 columns) 32 (64 of 128 queries x 64 columns)
// With 80 queries, which are no multiple of a product's 64 rows, dQ is made transposed (`turned`): a warpgroup has 64 of 128 columns of
// all 80, and dS goes through shared memory with a query per row. FlashAttention-3 takes 80 for full masks and 64 for causal ones.
template <int HeadDim, int Queries>
struct BackwardTile {
    static_assert(HeadDim == 128 ? Queries == 64 || Queries == 80 : HeadDim == 64 && Queries == 128);
    static constexpr int consumers = 2, consumer_threads = 128 * consumers, threads = 128 + consumer_threads, stages = 2;
    static constexpr int keys = backward_tile_keys, head_dim = HeadDim, queries = Queries;
    static constexpr bool turned = queries % 64 != 0;
    static constexpr int head_panels = HeadDim / panel_columns, query_panels = queries / panel_columns;
    // Bytes.
    static constexpr int key_panel = keys * panel_row_bytes, query_panel = queries * panel_row_bytes;
    static constexpr int key_tile = head_panels * key_panel;      // of K and of V
    static constexpr int query_tile = head_panels * query_panel;  // of Q and of dO
    static constexpr int score_tile = queries * keys * 2;         // of dS^T, a row is a key; turned: of dS, a row is a query
    static constexpr int dq_half = queries * HeadDim / 2 * 4, dq_values = dq_half / 4 / 128;  // of a thread
    static constexpr int row_values = 2 * queries * 4;            // of each query: lse in base 2; delta
    // Offsets in shared memory. dS^T is double: a warpgroup may still read one when the other writes the next.
    static constexpr int k_offset = 0, v_offset = k_offset + key_tile;
    static constexpr int q_offset = v_offset + key_tile, dout_offset = q_offset + stages * query_tile;
    static constexpr int ds_offset = dout_offset + stages * query_tile, dq_offset = ds_offset + stages * score_tile;
    static constexpr int values_offset = dq_offset + consumers * dq_half;
    static constexpr int barriers_offset = values_offset + stages * row_values;
    static constexpr int block_offset = barriers_offset + 8 * (1 + 2 * stages);
    static constexpr int shared_bytes = block_offset + 8 + 1024;  // panels begin on a multiple of 1024
    static_assert(shared_bytes <= 227 * 1024);
};
constexpr int backward_row_threads = 256;  // of the kernels before and after

// For each batch element, head and query tile, in this order.
struct BackwardWorkspace {
    float* dq;        // [2 halves, 8 or 10, 128 threads, 4]: the 32 or 40 accumulators of a thread by fours, before the scale
    float* values;    // [2, queries]: log2(e) lse, +inf where no row or no key is; delta
    int* semaphores;  // [2 halves]: how many key tiles have been added
    int* ticket;      // one for all: the CTAs that have begun
    int64_t bytes;
};

inline BackwardWorkspace backward_workspace(const Shape& shape, int32_t query_rows, int32_t query_tile_count, void* base) {
    const int64_t tiles = int64_t(shape.batch) * shape.heads * query_tile_count;
    const int64_t dq = tiles * query_rows * shape.head_dim * 4, values = tiles * query_rows * 2 * 4, semaphores = tiles * 2 * 4;
    char* at = static_cast<char*>(base);
    return {reinterpret_cast<float*>(at), reinterpret_cast<float*>(at + dq), reinterpret_cast<int*>(at + dq + values),
            reinterpret_cast<int*>(at + dq + values + semaphores), dq + values + semaphores + 4};
}

inline int64_t backward_workspace_bytes(const Shape& shape, int32_t query_rows, int32_t query_tile_count) {
    return backward_workspace(shape, query_rows, query_tile_count, nullptr).bytes;
}

struct BackwardParameters {
    TensorMap q, k, v, dout;  // boxes of one panel of a query tile or of a key tile
    TensorView out_rows, dout_rows, dq, dk, dv;
    const float* lse;
    const float* dlse;
    BackwardTables tables;
    BackwardWorkspace workspace;
    int32_t batch, heads, q_len, head_group;
    float scale, scale_log2;
    bool deterministic;
};

// nullptr, or why the parameters cannot be made.
inline const char* make_backward_parameters(const BackwardArguments& arguments, BackwardParameters* parameters) {
    const Shape& shape = arguments.shape;
    const BackwardTables& tables = arguments.tables;
    if (shape.head_dim != 64 && shape.head_dim != 128) return "head_dim must be 64 or 128";
    const float scale_log2 = arguments.scale * 1.44269504088896340736f;
    if (!std::isfinite(scale_log2)) return "scale must be finite";
    if (arguments.head_group < 1) return "head_group must be at least 1";
    if (reinterpret_cast<uintptr_t>(arguments.workspace) % 256 != 0) return "workspace must be 256-byte aligned";
    const int queries = arguments.query_rows;
    if (shape.head_dim == 128 ? queries != 64 && queries != 80 : queries != 128) {
        return "query_rows must be 64 or 80 at head_dim 128, 128 at head_dim 64";
    }
    const struct {
        const TensorView* tensor;
        int length, rows;
        TensorMap* map;
    } maps[] = {
        {&arguments.q, shape.q_len, queries, &parameters->q},
        {&arguments.dout, shape.q_len, queries, &parameters->dout},
        {&arguments.k, shape.k_len, backward_tile_keys, &parameters->k},
        {&arguments.v, shape.k_len, backward_tile_keys, &parameters->v},
    };
    for (const auto& [tensor, length, rows, map] : maps) {
        if (length == 0) continue;  // nothing is loaded from it
        if (const char* problem = make_panel_map(*tensor, shape, length, rows, map)) return problem;
    }
    parameters->out_rows = arguments.out;
    parameters->dout_rows = arguments.dout;
    parameters->dq = arguments.dq;
    parameters->dk = arguments.dk;
    parameters->dv = arguments.dv;
    parameters->lse = arguments.lse;
    parameters->dlse = arguments.dlse;
    parameters->tables = tables;
    parameters->workspace = backward_workspace(shape, queries, tables.query_tile_count, arguments.workspace);
    parameters->batch = shape.batch;
    parameters->heads = shape.heads;
    parameters->q_len = shape.q_len;
    parameters->head_group = arguments.head_group < shape.batch * shape.heads ? arguments.head_group : shape.batch * shape.heads;
    parameters->scale = arguments.scale;
    parameters->scale_log2 = scale_log2;
    parameters->deterministic = arguments.deterministic && tables.query_tile_count > 0;  // else nobody has set the ticket to 0
    return nullptr;
}

}  // namespace aadkern
