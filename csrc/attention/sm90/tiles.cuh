// What the attention kernels share: which tile is mine, the walk over its key tiles, stages, loads of panels, fragments.
#pragma once

#include "attention/launch.h"
#include "attention/sm90/maps.h"
#include "primitives/primitives.h"

namespace aadkern {

constexpr float log2_of_e = 1.44269504088896340736f;
constexpr float ln_of_2 = 0.69314718055994530942f;

// ---- whose work -------------------------------------------------------------------------------------------------------------

// One row of the table of tiles, and the head that this CTA does it for.
struct Work {
    int first_row, end_row;
    int first_range, end_range;
    int batch, head;
};

// CTAs run group by group of heads, inside a group tile by tile (longest first), inside a tile head by head, as in Triton.
// `block` is the CTA's place in that order, unless it took a ticket.
AADKERN_DEVICE Work own_work(const Tables& tables, int batch, int heads, int head_group, int block = block_index_x()) {
    const int all_heads = batch * heads;
    const int first = block / (tables.tile_count * head_group) * head_group;
    const int width = all_heads - first < head_group ? all_heads - first : head_group;
    const int inside = block - first * tables.tile_count;
    const Word4 row = load_global(reinterpret_cast<const Word4*>(tables.tiles) + inside / width);
    const int batch_and_head = first + inside % width;
    return {int(row.x), int(row.y), int(row.z), int(row.w), batch_and_head / heads, batch_and_head % heads};
}

// Walks the key tiles of a run: the whole ones of every range, then every range's tail, which alone needs a mask. The softmax does
// not mind the order.
template <int Keys>
struct KeyTiles {
    const int32_t* ranges;
    int first_range, end_range;
    int range;
    int at, end;        // of what is left of the range
    bool tails = false;
    int start = 0;      // the current tile: its first key
    int count = 0;      // and how many of its keys the range has: `Keys`, or fewer in a tail

    AADKERN_DEVICE KeyTiles(const Tables& tables, const Work& work)
        : ranges(tables.ranges), first_range(work.first_range), end_range(work.end_range), range(work.first_range) {
        read_range();
    }
    AADKERN_DEVICE void read_range() {
        at = range < end_range ? load_global(ranges + 2 * range) : 0;
        end = range < end_range ? load_global(ranges + 2 * range + 1) : 0;
        if (tails) at = end - (end - at) % Keys;
    }
    // Moves to the next tile; false after the last.
    AADKERN_DEVICE bool next() {
        while (range < end_range) {
            start = at;
            count = tails ? end - at : Keys;
            if (tails ? at < end : at + Keys <= end) {
                at += Keys;
                return true;
            }
            ++range;
            if (range == end_range && !tails) {
                tails = true;
                range = first_range;
            }
            read_range();
        }
        return false;
    }
    // How many there are in all.
    AADKERN_DEVICE static int total(const Tables& tables, const Work& work) {
        int total = 0;
        for (int range = work.first_range; range < work.end_range; ++range) {
            total += (load_global(tables.ranges + 2 * range + 1) - load_global(tables.ranges + 2 * range) + Keys - 1) / Keys;
        }
        return total;
    }
};

// ---- stages -----------------------------------------------------------------------------------------------------------------

// A stage of a ring of buffers, and the parity of its mbarrier's current phase. Whoever fills the ring waits for `empty` with the
// opposite parity, which a fresh mbarrier lets pass.
template <int Stages>
struct Ring {
    int stage = 0;
    int parity = 0;
    AADKERN_DEVICE void advance() {
        if (++stage == Stages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Both panels (one, if head_dim is 64) of `rows` rows of a [batch, length, heads, head_dim] tensor, one after the other.
template <int HeadDim>
AADKERN_DEVICE void load_panels(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int rows, int first_row,
                                const Work& work, L2Hint hint) {
#pragma unroll
    for (int panel = 0; panel < HeadDim / panel_columns; ++panel) {
        const SharedAddress place = target + panel * rows * panel_row_bytes;
        tma_load_4d(place, map, mbarrier, panel * panel_columns, first_row, work.head, work.batch, hint);
    }
}

// Rows [first, Rows) of a tile become 0, by `threads` threads of which this is number `thread`. A masked key has p = 0, but 0 times
// the NaN or infinity that may lie beyond a range is NaN. Swizzling permutes bytes within a row: whole rows need no thought of it.
template <int HeadDim, int Rows>
AADKERN_DEVICE void clear_rows(SharedAddress tile, int first, int thread, int threads) {
#pragma unroll
    for (int panel = 0; panel < HeadDim / panel_columns; ++panel) {
        const SharedAddress end = tile + (panel + 1) * Rows * panel_row_bytes;
        for (SharedAddress at = end - (Rows - first) * panel_row_bytes + 16 * thread; at < end; at += 16 * threads) {
            store_shared_v4(at, {0, 0, 0, 0});
        }
    }
}

// ---- fragments ----------------------------------------------------------------------------------------------------------------

// Which of a thread's two rows (8 apart) element i of an accumulator belongs to, and its column.
AADKERN_HOST_DEVICE constexpr int fragment_row(int i) { return (i >> 1) & 1; }
AADKERN_HOST_DEVICE constexpr int fragment_column(int i, int lane) { return 8 * (i >> 2) + 2 * (lane & 3) + (i & 1); }

// An accumulator as the A operand of the next product: the layouts agree, so no value changes its thread.
template <class T, int Size>
AADKERN_DEVICE void pack_fragment(uint32_t (&packed)[Size / 2], const float (&fragment)[Size]) {
#pragma unroll
    for (int i = 0; i < Size / 2; ++i) packed[i] = pack<T>(fragment[2 * i], fragment[2 * i + 1]);
}

// A warp's 16 rows of a 64-row output fragment to global memory through 16 rows of shared memory at `rows` (`panel` bytes to the
// next panel) that nobody else uses, so that the stores are whole rows, 16 bytes a thread. `count` rows are stored: a tile ends
// where its run ends, and a box of TMA does not. Rows of a panel are swizzled, against bank conflicts.
template <class T, int HeadDim>
AADKERN_DEVICE void store_rows(const float (&o)[HeadDim / 2], SharedAddress rows, uint32_t panel, uint16_t* target, int64_t stride,
                               int count) {
    const int lane = lane_index();
    const auto place = [&](int row, int column) {
        return swizzle_128(rows + column / panel_columns * panel + row * panel_row_bytes + column % panel_columns * 2);
    };
    uint32_t packed[HeadDim / 4];
    pack_fragment<T>(packed, o);
#pragma unroll
    for (int step = 0; step < HeadDim / 16; ++step) {
        const uint32_t matrices[4] = {packed[4 * step], packed[4 * step + 1], packed[4 * step + 2], packed[4 * step + 3]};
        store_matrix_x4(place(lane % 16, 16 * step + 8 * (lane / 16)), matrices);
    }
    warp_sync();
    constexpr int chunks = HeadDim / 8;
#pragma unroll
    for (int first = 0; first < 16; first += 32 / chunks) {
        const int row = first + lane / chunks, column = lane % chunks * 8;
        const Word4 value = load_shared_v4(place(row, column));
        if (row < count) store_global(reinterpret_cast<Word4*>(target + row * stride + column), value);
    }
}

}  // namespace aadkern
