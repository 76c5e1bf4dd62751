// Before and after the backward's main kernel, a CTA a query tile: delta = rowsum(dout out) - dlse, lse in base 2, a zeroed accumulator of
// dQ; then dq = scale times the accumulator.
#pragma once

#include "attention/sm90/backward_tiles.cuh"

namespace aadkern {

// The CTA's query tile.
struct OwnRows {
    int batch, head, first_row, rows;
    int64_t index;

    AADKERN_DEVICE explicit OwnRows(const BackwardParameters& p) {
        const int block = block_index_x(), tile = block % p.tables.query_tile_count, both = block / p.tables.query_tile_count;
        batch = both / p.heads, head = both % p.heads;
        first_row = load_global(p.tables.query_tiles + 2 * tile);
        rows = load_global(p.tables.query_tiles + 2 * tile + 1) - first_row;
        index = query_tile_index(p, batch, head, tile);
    }
};

template <class T>
AADKERN_DEVICE float dot(Word4 a, Word4 b) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum = fmaf(unpack_low<T>(left[i]), unpack_low<T>(right[i]), sum);
        sum = fmaf(unpack_high<T>(left[i]), unpack_high<T>(right[i]), sum);
    }
    return sum;
}

template <class T, class Tile>
AADKERN_KERNEL(backward_row_threads) prepare_backward(AADKERN_GRID_CONSTANT BackwardParameters p) {
    constexpr int chunks = Tile::head_dim / 8;  // of 16 bytes, a thread each, in a row
    constexpr float infinity = __builtin_huge_valf();
    const OwnRows own(p);
    const int thread = thread_index(), chunk = thread % chunks;
    Word4* dq = reinterpret_cast<Word4*>(p.workspace.dq + own.index * (Tile::consumers * Tile::dq_half / 4));
    for (int i = thread; i < Tile::consumers * Tile::dq_half / 16; i += backward_row_threads) store_global(dq + i, Word4{0, 0, 0, 0});
    if (thread < Tile::consumers) store_global(p.workspace.semaphores + own.index * Tile::consumers + thread, 0);
    if (block_index_x() == 0 && thread == 0) store_global(p.workspace.ticket, 0);

    float* values = p.workspace.values + own.index * (Tile::row_values / 4);
    for (int row = thread / chunks; row < Tile::queries; row += backward_row_threads / chunks) {
        float delta = 0.f, lse = -infinity;
        if (row < own.rows) {
            const int at = own.first_row + row;
            delta = dot<T>(load_global(reinterpret_cast<const Word4*>(element(p.out_rows, own.batch, own.head, at, 8 * chunk))),
                           load_global(reinterpret_cast<const Word4*>(element(p.dout_rows, own.batch, own.head, at, 8 * chunk))));
            const int64_t place = (int64_t(own.batch) * p.heads + own.head) * p.q_len + at;
            lse = load_global(p.lse + place);
            if (p.dlse != nullptr && chunk == 0) delta -= load_global(p.dlse + place);
        }
#pragma unroll
        for (int mask = chunks / 2; mask > 0; mask /= 2) delta += shuffle_xor(delta, mask);
        if (chunk == 0) {
            const bool sees = lse != -infinity;  // else p is to be 0
            store_global(values + row, sees ? lse * log2_of_e : infinity);
            store_global(values + Tile::queries + row, sees ? delta : 0.f);
        }
    }
}

template <class T, class Tile>
AADKERN_KERNEL(backward_row_threads) finish_backward(AADKERN_GRID_CONSTANT BackwardParameters p) {
    const OwnRows own(p);
    const int half = thread_index() / 128, thread = thread_index() % 128, lane = lane_index();
    const float* sums = p.workspace.dq + (own.index * Tile::consumers + half) * (Tile::dq_half / 4);
#pragma unroll
    for (int i = 0; i < Tile::dq_values; i += 4) {
        const Word4 four = load_global(reinterpret_cast<const Word4*>(sums) + i / 4 * 128 + thread);
        const float values[4] = {float_of(four.x), float_of(four.y), float_of(four.z), float_of(four.w)};
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            int row, column;
            float low, high;  // of neighbouring columns
            if constexpr (Tile::turned) {
                // Two queries of one column: of the next column's, another lane's, one is fetched and one is given for it.
                const bool odd = lane & 4;
                const float got = shuffle_xor(odd ? values[j] : values[j + 1], 4);
                row = fragment_column(i + j, lane) + odd;
                column = half * 64 + thread / 32 * 16 + (lane / 4 & ~1) + 8 * fragment_row(j);
                low = odd ? got : values[j];
                high = odd ? values[j + 1] : got;
            } else {
                row = half % Tile::query_panels * 64 + thread / 32 * 16 + lane / 4 + 8 * fragment_row(j);
                column = half % Tile::head_panels * 64 + fragment_column(i, lane);
                low = values[j];
                high = values[j + 1];
            }
            if (row >= own.rows) continue;
            uint16_t* target = element(p.dq, own.batch, own.head, own.first_row + row, column);
            store_global(reinterpret_cast<uint32_t*>(target), pack<T>(low * p.scale, high * p.scale));
        }
    }
}

}  // namespace aadkern
