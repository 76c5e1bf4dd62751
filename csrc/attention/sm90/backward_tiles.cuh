// What the backward's kernels are made of: places in the workspace and in tensors, what is done to fragments, the walk over query tiles.
#pragma once

#include <cstring>

#include "attention/sm90/backward_parameters.h"
#include "attention/sm90/tiles.cuh"
#include "primitives/primitives.h"

namespace aadkern {

AADKERN_DEVICE int64_t query_tile_index(const BackwardParameters& p, int batch, int head, int tile) {
    return (int64_t(batch) * p.heads + head) * p.tables.query_tile_count + tile;
}

AADKERN_DEVICE uint16_t* element(const TensorView& view, int batch, int head, int row, int column) {
    return static_cast<uint16_t*>(view.data) + batch * view.batch_stride + head * view.head_stride + row * view.length_stride + column;
}

AADKERN_DEVICE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

AADKERN_DEVICE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Columns of S^T from `count` on become 0, and with their lse P^T too: a zeroed query times an infinite key is NaN.
template <int Size>
AADKERN_DEVICE void forget_queries(float (&s)[Size], int count) {
#pragma unroll
    for (int i = 0; i < Size; ++i) {
        if (fragment_column(i, lane_index()) >= count) s[i] = 0.f;
    }
}

// S^T -> P^T = 2^(scale_log2 s - lse), a row per key and a column per query; lse is +inf where there is no query.
template <int Size>
AADKERN_DEVICE void exponentials(float (&s)[Size], SharedAddress lse, float scale_log2) {
#pragma unroll
    for (int i = 0; i < Size; i += 4) {
        const Float2 columns = load_shared_f32x2(lse + 4 * fragment_column(i, lane_index()));
#pragma unroll
        for (int j = i; j < i + 4; j += 2) {
            s[j] = exp2_approx(fmaf(s[j], scale_log2, -columns.x));
            s[j + 1] = exp2_approx(fmaf(s[j + 1], scale_log2, -columns.y));
        }
    }
}

// dP^T -> dS^T = p (dp - delta).
template <int Size>
AADKERN_DEVICE void score_gradients(float (&dp)[Size], const float (&p)[Size], SharedAddress delta) {
#pragma unroll
    for (int i = 0; i < Size; i += 4) {
        const Float2 columns = load_shared_f32x2(delta + 4 * fragment_column(i, lane_index()));
#pragma unroll
        for (int j = i; j < i + 4; j += 2) {
            dp[j] = p[j] * (dp[j] - columns.x);
            dp[j + 1] = p[j + 1] * (dp[j + 1] - columns.y);
        }
    }
}

// Rows of P^T from `count` on become 0: a score of 0, as zeroed keys have it, may lie far above lse.
template <int Size>
AADKERN_DEVICE void forget_keys(float (&p)[Size], int count) {
    const int row = thread_index() % 128 / 32 * 16 + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < Size; ++i) {
        if (row + 8 * fragment_row(i) >= count) p[i] = 0.f;
    }
}

// A packed 64-row fragment, whole, to rows `row` and on of a tile of panels.
template <int Size>
AADKERN_DEVICE void store_packed(SharedAddress tile, int panel, int row, const uint32_t (&packed)[Size]) {
    const int lane = lane_index();
    const SharedAddress own = tile + (row + thread_index() % 128 / 32 * 16 + lane % 16) * panel_row_bytes + lane / 16 * 16;
#pragma unroll
    for (int step = 0; step < Size / 4; ++step) {
        const uint32_t matrices[4] = {packed[4 * step], packed[4 * step + 1], packed[4 * step + 2], packed[4 * step + 3]};
        store_matrix_x4(swizzle_128(own + step / 4 * panel + step % 4 * 32), matrices);
    }
}

// The transpose of a 64-row fragment to one panel: a row for each column of the fragment, whose rows lie side by side in it.
template <int Size>
AADKERN_DEVICE void store_packed_transposed(SharedAddress panel, const uint32_t (&packed)[Size]) {
    const int lane = lane_index();
    const SharedAddress own = panel + (lane / 16 * 8 + lane % 8) * panel_row_bytes + (thread_index() % 128 / 32 * 16 + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int step = 0; step < Size / 4; ++step) {
        const uint32_t matrices[4] = {packed[4 * step], packed[4 * step + 1], packed[4 * step + 2], packed[4 * step + 3]};
        store_matrix_x4_transposed(swizzle_128(own + step * 16 * panel_row_bytes), matrices);
    }
}

struct QueryTile {
    int row, rows;  // the first, and how many
    int tile;       // its place in the table
    int rank;       // key tiles that add to its dQ before this one
};

// Calls body(QueryTile) for each that sees a key tile, last first: in a causal plan the last queries see all keys, so all key tiles begin
// at the same one and follow each other, instead of waiting to get past each other. (One loop over both tempts ptxas into keeping more
// registers than a consumer has, C7512.)
template <int Queries, class Body>
AADKERN_DEVICE void for_each_query_tile(const BackwardTables& tables, const Work& work, Body&& body) {
    const Word4* spans = reinterpret_cast<const Word4*>(tables.spans);
    for (int i = work.end_range - 1; i >= work.first_range; --i) {
        const Word4 span = load_global(spans + i);
        const int all_rows = int(span.y) - int(span.x);
        for (int tile = (all_rows - 1) / Queries; tile >= 0; --tile) {
            const int left = all_rows - tile * Queries;
            body(QueryTile{int(span.x) + tile * Queries, left < Queries ? left : Queries, int(span.z) + tile, int(span.w)});
        }
    }
}

}  // namespace aadkern
