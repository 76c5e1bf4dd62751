// Attention over key ranges, backward, for sm_90a: with p = exp(scale q k^T - lse), delta = rowsum(dout out) - dlse,
//     dv = p^T dout,   ds = p (dout v^T - delta),   dk = scale ds^T q,   dq = scale ds k.
// A CTA owns a key tile and walks the query tiles that see it. Roles:
//   warp 0         loads K and V once, then Q, dO, lse and delta tile by tile;
//   warps 1, 2     add what this key tile gives to dQ, one half each, to the fp32 accumulator in global memory;
//   warps 4 to 11  two warpgroups of 64 keys. S^T = K Q^T and dP^T = V dO^T have a key per row, so P^T and dS^T are the A operand of
//                  dV += P^T dO and dK += dS^T Q without leaving the registers. dQ = dS K sums over all keys of the tile: dS^T goes
//                  through shared memory, and each warpgroup makes half of dQ.
// The order of products leaves one in flight behind whatever is computed: P^T under dP^T, dS^T under dV, dQ's way out under dK; at head_dim 128
// dK is still in flight when S^T and dP^T of the next query tile are issued. Read from the machine code (tests/sm90/test_sm90_backward.py).
// Where a tile ends early, the rows after it are others' and may hold NaN: they are zeroed in shared memory before use.
// `deterministic`: a CTA takes its key tile by a ticket, and adds to a query tile after the key tiles of smaller tickets that see it. The
// CTA of the smallest unfinished ticket waits for nobody, so somebody always goes on, however few of them run at once.
#pragma once

#include "attention/sm90/backward_tiles.cuh"

namespace aadkern {

// Named barriers; two of a kind, one for each half. The last two kinds are between a consumer warpgroup and the warp that adds its half.
constexpr int backward_all_consumers = 1, backward_dq_full = 2, backward_dq_empty = 4, backward_dq_threads = 128 + 32;

template <class Tile>
struct BackwardShared {
    SharedAddress base = (shared_base() + 1023) & ~1023u;
    AADKERN_DEVICE SharedAddress k() const { return base + Tile::k_offset; }
    AADKERN_DEVICE SharedAddress v() const { return base + Tile::v_offset; }
    AADKERN_DEVICE SharedAddress q(int stage) const { return base + Tile::q_offset + stage * Tile::query_tile; }
    AADKERN_DEVICE SharedAddress dout(int stage) const { return base + Tile::dout_offset + stage * Tile::query_tile; }
    AADKERN_DEVICE SharedAddress ds(int buffer) const { return base + Tile::ds_offset + buffer * Tile::score_tile; }
    AADKERN_DEVICE SharedAddress dq(int half) const { return base + Tile::dq_offset + half * Tile::dq_half; }
    AADKERN_DEVICE SharedAddress lse(int stage) const { return base + Tile::values_offset + stage * Tile::row_values; }
    AADKERN_DEVICE SharedAddress delta(int stage) const { return lse(stage) + Tile::row_values / 2; }
    AADKERN_DEVICE SharedAddress keys_full() const { return base + Tile::barriers_offset; }
    AADKERN_DEVICE SharedAddress full(int stage) const { return keys_full() + 8 + 8 * stage; }
    AADKERN_DEVICE SharedAddress empty(int stage) const { return full(Tile::stages) + 8 * stage; }
    AADKERN_DEVICE SharedAddress block() const { return base + Tile::block_offset; }
};

template <class Tile>
AADKERN_DEVICE void load_backward_tiles(const BackwardParameters& p, const Work& work, const BackwardShared<Tile>& shared) {
    mbarrier_arrive_expect_tx(shared.keys_full(), 2 * Tile::key_tile);
    load_panels<Tile::head_dim>(shared.k(), &p.k, shared.keys_full(), Tile::keys, work.first_row, work, L2Hint::EvictFirst);
    load_panels<Tile::head_dim>(shared.v(), &p.v, shared.keys_full(), Tile::keys, work.first_row, work, L2Hint::EvictFirst);
    Ring<Tile::stages> ring;
    for_each_query_tile<Tile::queries>(p.tables, work, [&](const QueryTile& query) {
        const SharedAddress full = shared.full(ring.stage);
        mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);
        mbarrier_arrive_expect_tx(full, 2 * Tile::query_tile + Tile::row_values);
        load_panels<Tile::head_dim>(shared.q(ring.stage), &p.q, full, Tile::queries, query.row, work, L2Hint::EvictLast);
        load_panels<Tile::head_dim>(shared.dout(ring.stage), &p.dout, full, Tile::queries, query.row, work, L2Hint::EvictLast);
        const int64_t at = query_tile_index(p, work.batch, work.head, query.tile);
        bulk_load(shared.lse(ring.stage), p.workspace.values + at * (Tile::row_values / 4), Tile::row_values, full);
        ring.advance();
    });
}

// A warp that adds one half of each query tile's dQ.
template <class Tile>
AADKERN_DEVICE void add_dq(const BackwardParameters& p, const Work& work, const BackwardShared<Tile>& shared, int half) {
    const bool elected = elect_one();
    int* unpublished = nullptr;
    const auto publish = [&] {  // the next key tile may add to what this one has added to
        if (elected && unpublished != nullptr) {
            bulk_wait<0>();
            semaphore_add(unpublished, 1);
        }
    };
    for_each_query_tile<Tile::queries>(p.tables, work, [&](const QueryTile& query) {
        named_barrier_arrive(backward_dq_empty + half, backward_dq_threads);
        publish();
        warp_sync();
        named_barrier_sync(backward_dq_full + half, backward_dq_threads);
        if (elected) {
            const int64_t at = query_tile_index(p, work.batch, work.head, query.tile) * Tile::consumers + half;
            if (p.deterministic) {
                unpublished = p.workspace.semaphores + at;
                semaphore_wait(unpublished, query.rank);
                fence_proxy_async_global();
            }
            bulk_reduce_add_f32(p.workspace.dq + at * (Tile::dq_half / 4), shared.dq(half), Tile::dq_half, L2Hint::EvictLast);
            bulk_commit();
            bulk_wait_read<0>();
        }
        warp_sync();
    });
    publish();
}

// One of the two consumer warpgroups, number `half`: 64 keys, and half of each dQ.
template <class T, class Tile>
struct BackwardConsumer {
    static constexpr int HeadDim = Tile::head_dim;
    static constexpr bool overlap = Tile::queries == 64;  // of dK with the next step: at 80 and 128, registers run out
    const BackwardParameters& p;
    const BackwardShared<Tile> shared;
    const int half, keys;  // keys of the tile, of which the warpgroup has those from 64 half on
    float dk[HeadDim / 2], dv[HeadDim / 2];
    uint32_t ds[Tile::queries / 4];  // packed; dK reads it until the next step's wait
    bool first = true;

    AADKERN_DEVICE BackwardConsumer(const BackwardParameters& p, const BackwardShared<Tile>& shared, int half, int keys)
        : p(p), shared(shared), half(half), keys(keys) {}

    // d (64 keys x queries) = own keys, of K or V, times queries, of Q or dO, transposed.
    AADKERN_DEVICE void multiply_by_queries(float (&d)[Tile::queries / 2], SharedAddress all_keys, SharedAddress queries) {
        const uint64_t a = matrix_descriptor_128(all_keys + 64 * half * panel_row_bytes, 0), b = matrix_descriptor_128(queries, 0);
#pragma unroll
        for (int step = 0; step < HeadDim / 16; ++step) {
            const int panel = step / 4, inside = step % 4 * 32;  // 16 columns are 32 bytes of a row
            wgmma<T, Major::K, Major::K>(d, a + (panel * Tile::key_panel + inside) / 16, b + (panel * Tile::query_panel + inside) / 16,
                                         step != 0);
        }
        wgmma_commit();
    }
    // d (64 keys x HeadDim) += a (64 keys x queries, packed) times queries, of Q or dO. The first product replaces d: zeros put there by
    // other instructions would make the compiler wait for each product (ptxas C7515), since dK is in flight from step to step.
    AADKERN_DEVICE void add_product(float (&d)[HeadDim / 2], const uint32_t (&a)[Tile::queries / 4], SharedAddress queries) {
        const uint64_t b = matrix_descriptor_128(queries, Tile::query_panel);
#pragma unroll
        for (int step = 0; step < Tile::queries / 16; ++step) {
            wgmma<T, Major::MN>(d, a + 4 * step, b + step * 16 * panel_row_bytes / 16, step != 0 || !first);
        }
        wgmma_commit();
    }
    // Half of dQ, 64 queries x 64 columns: the other 64 queries are the other warpgroup's, or the other 64 columns. Turned: dQ^T =
    // K^T dS^T, 64 columns x 80 queries.
    AADKERN_DEVICE void multiply_by_keys(float (&dq)[Tile::dq_values], SharedAddress all_ds) {
        if constexpr (Tile::turned) {
            const uint64_t a = matrix_descriptor_128(shared.k() + half * Tile::key_panel, 0), b = matrix_descriptor_128(all_ds, 0);
#pragma unroll
            for (int step = 0; step < Tile::keys / 16; ++step) {
                const int panel = step / 4, inside = step % 4 * 32;
                wgmma<T, Major::MN, Major::K>(dq, a + step * 16 * panel_row_bytes / 16, b + (panel * Tile::query_panel + inside) / 16,
                                              step != 0);
            }
            wgmma_commit();
            return;
        }
        const uint64_t a = matrix_descriptor_128(all_ds + half % Tile::query_panels * Tile::key_panel, 0);
        const uint64_t b = matrix_descriptor_128(shared.k() + half % Tile::head_panels * Tile::key_panel, 0);
#pragma unroll
        for (int step = 0; step < Tile::keys / 16; ++step) {
            const int rows = step * 16 * panel_row_bytes / 16;
            wgmma<T, Major::MN, Major::MN>(dq, a + rows, b + rows, step != 0);
        }
        wgmma_commit();
    }
    // Rows of two tiles from `count` on become 0, by both warpgroups.
    template <int Rows>
    AADKERN_DEVICE void clear_both(SharedAddress one, SharedAddress other, int count) {
        clear_rows<Tile::head_dim, Rows>(one, count, thread_index() - 128, Tile::consumer_threads);
        clear_rows<Tile::head_dim, Rows>(other, count, thread_index() - 128, Tile::consumer_threads);
        fence_proxy_async();
        named_barrier_sync(backward_all_consumers, Tile::consumer_threads);
    }

    AADKERN_DEVICE void release(int stage) {
        if (lane_index() == 0) mbarrier_arrive(shared.empty(stage));
    }

    AADKERN_DEVICE void step(const Ring<Tile::stages>& ring, int rows) {
        const int stage = ring.stage;
        const SharedAddress all_ds = shared.ds(stage);  // as many buffers as stages
        float s[Tile::queries / 2], dp[Tile::queries / 2], dq[Tile::dq_values];
        uint32_t packed[Tile::queries / 4];
        mbarrier_wait(shared.full(stage), ring.parity);
        if (rows < Tile::queries) clear_both<Tile::queries>(shared.q(stage), shared.dout(stage), rows);
        wgmma_fence();
        multiply_by_queries(s, shared.k(), shared.q(stage));
        multiply_by_queries(dp, shared.v(), shared.dout(stage));
        wgmma_wait<1>();  // for S^T, and dK of the step before
        keep(s);
        keep(ds);
        if (overlap && !first) release(stage ^ 1);
        if (rows < Tile::queries) forget_queries(s, rows);
        exponentials(s, shared.lse(stage), p.scale_log2);
        if (keys < 64 * half + 64) forget_keys(s, keys - 64 * half);
        if constexpr (Tile::turned) {
            // P^T in both forms and dP^T do not fit: dS^T first, then P^T is packed into its own place, and dV made.
            wgmma_wait<0>();  // for dP^T
            keep(dp);
            score_gradients(dp, s, shared.delta(stage));
            pack_fragment<T>(packed, s);
            wgmma_fence();
            add_product(dv, packed, shared.dout(stage));
        } else {
            pack_fragment<T>(packed, s);
            wgmma_fence();
            add_product(dv, packed, shared.dout(stage));
            wgmma_wait<1>();  // for dP^T
            keep(dp);
            score_gradients(dp, s, shared.delta(stage));
        }
        pack_fragment<T>(ds, dp);
        if constexpr (Tile::turned) {
            store_packed_transposed(all_ds + half * Tile::query_panel, ds);
        } else {
            store_packed(all_ds, Tile::key_panel, 64 * half, ds);
        }
        fence_proxy_async();
        named_barrier_sync(backward_all_consumers, Tile::consumer_threads);  // then, too, nobody reads the other dS^T any more
        wgmma_fence();
        multiply_by_keys(dq, all_ds);
        add_product(dk, ds, shared.q(stage));
        wgmma_wait<1>();  // for dV and dQ
        keep(packed);
        keep(dq);
        named_barrier_sync(backward_dq_empty + half, backward_dq_threads);
#pragma unroll
        for (int i = 0; i < Tile::dq_values; i += 4) {
            const Word4 values{bits_of(dq[i]), bits_of(dq[i + 1]), bits_of(dq[i + 2]), bits_of(dq[i + 3])};
            store_shared_v4(shared.dq(half) + (i / 4 * 128 + thread_index() % 128) * 16, values);
        }
        fence_proxy_async();
        named_barrier_arrive(backward_dq_full + half, backward_dq_threads);
        if constexpr (!overlap) {
            wgmma_wait<0>();
            keep(dk);
            keep(ds);
            release(stage);
        }
        first = false;
    }

    AADKERN_DEVICE void finish() {
        if constexpr (overlap) wgmma_wait<0>();
        keep(dk);
        keep(dv);
#pragma unroll
        for (int i = 0; i < HeadDim / 2; ++i) {
            dk[i] = first ? 0.f : dk[i] * p.scale;
            dv[i] = first ? 0.f : dv[i];
        }
    }
};

// This CTA's key tile. Read anew where it is wanted: between, its six numbers would cost registers that a consumer has not got.
template <class Tile>
AADKERN_DEVICE Work own_key_tile(const BackwardParameters& p, const BackwardShared<Tile>& shared) {
    const Tables tables{p.tables.key_tiles, nullptr, p.tables.key_tile_count};
    return own_work(tables, p.batch, p.heads, p.head_group, int(load_shared_u32(shared.block())));
}

template <class T, class Tile>
AADKERN_DEVICE void consume_backward(const BackwardParameters& p, const BackwardShared<Tile>& shared, int half) {
    Work work = own_key_tile(p, shared);
    const int keys = work.end_row - work.first_row;
    BackwardConsumer<T, Tile> consumer(p, shared, half, keys);
    if (work.first_range < work.end_range) {
        mbarrier_wait(shared.keys_full(), 0);
        if (keys < Tile::keys) consumer.template clear_both<Tile::keys>(shared.k(), shared.v(), keys);
    }
    Ring<Tile::stages> ring;
    for_each_query_tile<Tile::queries>(p.tables, work, [&](const QueryTile& query) {
        consumer.step(ring, query.rows);
        ring.advance();
    });
    consumer.finish();
    work = own_key_tile(p, shared);
    // Through 16 rows of V a warp: since the last step's barrier, before which every warp waited for dP^T, nobody reads them.
    const int own = 64 * half + thread_index() % 128 / 32 * 16, first = work.first_row + own;
    const SharedAddress rows = shared.v() + own * panel_row_bytes;
    store_rows<T, Tile::head_dim>(consumer.dv, rows, Tile::key_panel, element(p.dv, work.batch, work.head, first, 0), p.dv.length_stride, keys - own);
    warp_sync();
    store_rows<T, Tile::head_dim>(consumer.dk, rows, Tile::key_panel, element(p.dk, work.batch, work.head, first, 0), p.dk.length_stride, keys - own);
}

template <class T, class Tile>
AADKERN_KERNEL(Tile::threads) attention_backward(AADKERN_GRID_CONSTANT BackwardParameters p) {
    const BackwardShared<Tile> shared;
    if (thread_index() == 0) {
        mbarrier_init(shared.keys_full(), 1);
        for (int stage = 0; stage < Tile::stages; ++stage) {
            mbarrier_init(shared.full(stage), 1);
            mbarrier_init(shared.empty(stage), 4 * Tile::consumers);
        }
        fence_mbarrier_init();
        const int block = p.deterministic ? atomic_add_global(p.workspace.ticket, 1) : block_index_x();
        store_shared_u32(shared.block(), uint32_t(block));
    }
    cta_sync();
    const int warpgroup = warpgroup_index(), warp = warp_index();
    if (warpgroup == 0) {
        registers_decrease<24>();
        const Work work = own_key_tile(p, shared);
        if (warp == 0 && elect_one() && work.first_range < work.end_range) load_backward_tiles<Tile>(p, work, shared);
        if (warp == 1 || warp == 2) add_dq<Tile>(p, work, shared, warp - 1);
    } else {
        registers_increase<240>();
        consume_backward<T, Tile>(p, shared, warpgroup - 1);
    }
}

}  // namespace aadkern
