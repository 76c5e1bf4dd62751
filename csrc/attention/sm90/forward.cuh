// Attention over key ranges, forward, warp-specialised: out = softmax(scale q k^T) v and lse, for 128 query rows of a run.
//
//   producer warpgroup    warp 0, one thread: loads q, then k and v tiles into rings of stages, k one tile ahead of v
//                         warp 1: clears the rows of a tail's v that lie beyond its range
//   consumer warpgroups,  issue S(j) = q k(j)^T and O += P(j-1) v(j-1) together; the softmax of S(j) runs while the second is at
//   64 query rows each    work, and with PingPong while the other consumer's products are
//
// Read from the machine code (tests/sm90/test_sm90_forward.py): all exponentials and row maxima of the loop stand beside P v.
// With Persistent a CTA does every grid_size_x()-th tile from its own on. Its rings and turns go on from tile to tile; the next q is
// loaded when both consumers are done with the last product of this one, under their last P v and their way out, and results go out
// without shared memory, of which the next q, k and v have all there is.
// Every stage of k and v has two mbarriers: `full` (the bytes are there) and `empty` (all eight consumer warps are done with it).
#pragma once

#include "attention/sm90/forward_parts.cuh"

namespace aadkern {

// Shared memory: q, rings of k and v, mbarriers, and how many keys each tile of k has.
template <int HeadDim, int Keys>
struct ForwardShared {
    static constexpr int consumers = 2, rows = 64 * consumers, threads = 128 * (1 + consumers);
    static constexpr int q_panel = rows * panel_row_bytes, q_bytes = rows * HeadDim * 2, tile_bytes = Keys * HeadDim * 2;
    // As many as fit; registers allow one CTA an SM anyway.
    static constexpr int stages = HeadDim == 64 ? 4 : Keys == 128 ? 3 : 2;
    static constexpr int barriers = q_bytes + 2 * stages * tile_bytes, key_counts = barriers + 8 * (2 + 5 * stages);
    static constexpr int bytes = key_counts + 4 * stages + 1024;  // and what it takes to begin at a multiple of 1024
    static_assert(bytes <= 227 * 1024);

    SharedAddress base;

    AADKERN_DEVICE SharedAddress q(int row = 0) const { return base + row * panel_row_bytes; }
    AADKERN_DEVICE SharedAddress k(int stage) const { return base + q_bytes + stage * tile_bytes; }
    AADKERN_DEVICE SharedAddress v(int stage) const { return base + q_bytes + (stages + stage) * tile_bytes; }
    AADKERN_DEVICE SharedAddress q_full() const { return base + barriers; }
    AADKERN_DEVICE SharedAddress k_full(int stage) const { return barrier(0, stage); }
    AADKERN_DEVICE SharedAddress k_empty(int stage) const { return barrier(1, stage); }
    AADKERN_DEVICE SharedAddress v_landed(int stage) const { return barrier(2, stage); }  // of a tail, not cleared yet
    AADKERN_DEVICE SharedAddress v_full(int stage) const { return barrier(3, stage); }
    AADKERN_DEVICE SharedAddress v_empty(int stage) const { return barrier(4, stage); }
    AADKERN_DEVICE SharedAddress q_empty() const { return base + barriers + 8; }
    AADKERN_DEVICE SharedAddress barrier(int kind, int stage) const { return base + barriers + 8 * (2 + kind * stages + stage); }
    AADKERN_DEVICE SharedAddress key_count(int stage) const { return base + key_counts + 4 * stage; }

    AADKERN_DEVICE void initialise_barriers() const {
        mbarrier_init(q_full(), 1);
        mbarrier_init(q_empty(), 4 * consumers);
        for (int stage = 0; stage < stages; ++stage) {
            mbarrier_init(k_full(stage), 1);
            mbarrier_init(v_landed(stage), 1);
            mbarrier_init(v_full(stage), 1);
            mbarrier_init(k_empty(stage), 4 * consumers);
            mbarrier_init(v_empty(stage), 4 * consumers);
        }
        fence_mbarrier_init();
    }
};

AADKERN_DEVICE Work forward_work(const ForwardParameters& p, int tile) {
    return own_work(p.tables, p.batch, p.heads, p.head_group, tile);
}

// Calls body(tile), its place in the order of all tiles and heads, for each that this CTA does.
template <bool Persistent, class Body>
AADKERN_DEVICE void for_each_tile(const ForwardParameters& p, Body&& body) {
    const int all = p.tables.tile_count * p.batch * p.heads;
    int tile = block_index_x();
    do {
        body(tile);
        tile += grid_size_x();
    } while (Persistent && tile < all);
}

template <int HeadDim, int Keys, bool Persistent>
struct ForwardProducer {
    using Shared = ForwardShared<HeadDim, Keys>;
    using Stage = Ring<Shared::stages>;
    const ForwardParameters& parameters;
    Shared shared;

    // By one thread.
    AADKERN_DEVICE void load_all() const {
        Stage k_stage, v_stage;
        int q_parity = 1;
        for_each_tile<Persistent>(parameters, [&](int tile) {
            const Work work = forward_work(parameters, tile);
            KeyTiles<Keys> tiles(parameters.tables, work);
            if (!tiles.next()) return;
            load_k(work, tiles, k_stage);
            mbarrier_wait(shared.q_empty(), q_parity);
            q_parity ^= 1;
            mbarrier_arrive_expect_tx(shared.q_full(), Shared::q_bytes);
            load_panels<HeadDim>(shared.q(), &parameters.q, shared.q_full(), Shared::rows, work.first_row, work, L2Hint::EvictFirst);
            for (bool more = true; more; v_stage.advance()) {
                const int v_start = tiles.start, v_count = tiles.count;
                more = tiles.next();
                k_stage.advance();
                if (more) load_k(work, tiles, k_stage);
                load_v(work, v_start, v_count, v_stage);
            }
        });
    }

    AADKERN_DEVICE void load_k(const Work& work, const KeyTiles<Keys>& tile, const Stage& at) const {
        const SharedAddress full = shared.k_full(at.stage);
        mbarrier_wait(shared.k_empty(at.stage), at.parity ^ 1);
        store_shared_u32(shared.key_count(at.stage), uint32_t(tile.count));
        mbarrier_arrive_expect_tx(full, Shared::tile_bytes);
        load_panels<HeadDim>(shared.k(at.stage), &parameters.k, full, Keys, tile.start, work, L2Hint::EvictLast);
    }

    // A tail is `landed` first, and `full` when its rows beyond the range are cleared.
    AADKERN_DEVICE void load_v(const Work& work, int start, int count, const Stage& at) const {
        const SharedAddress there = count == Keys ? shared.v_full(at.stage) : shared.v_landed(at.stage);
        mbarrier_wait(shared.v_empty(at.stage), at.parity ^ 1);
        mbarrier_arrive_expect_tx(there, Shared::tile_bytes);
        load_panels<HeadDim>(shared.v(at.stage), &parameters.v, there, Keys, start, work, L2Hint::EvictLast);
    }

    // By one warp.
    AADKERN_DEVICE void clear_tails() const {
        uint32_t parities = 0;  // of each stage's `landed`, a bit each: only tails use it
        Stage at;
        for_each_tile<Persistent>(parameters, [&](int tile) {
            for (KeyTiles<Keys> tiles(parameters.tables, forward_work(parameters, tile)); tiles.next(); at.advance()) {
                if (tiles.count == Keys) continue;
                mbarrier_wait(shared.v_landed(at.stage), parities >> at.stage & 1);
                parities ^= 1u << at.stage;
                clear_rows<HeadDim, Keys>(shared.v(at.stage), tiles.count, lane_index(), 32);
                fence_proxy_async();
                warp_sync();
                if (lane_index() == 0) mbarrier_arrive(shared.v_full(at.stage));
            }
        });
    }
};

// The two consumers' turns at the tensor cores: while one multiplies, the other makes its softmax. Each waits at a named barrier of
// its own, at which the other arrives to pass the turn.
template <bool PingPong>
struct Turns {
    int consumer;
    AADKERN_DEVICE void begin() const {  // consumer 0 is first
        if (PingPong && consumer == 1) named_barrier_arrive(1, 256);
    }
    AADKERN_DEVICE void take() const {
        if (PingPong) named_barrier_sync(1 + consumer, 256);
    }
    AADKERN_DEVICE void pass() const {
        if (PingPong) named_barrier_arrive(2 - consumer, 256);
    }
    AADKERN_DEVICE void end() const {  // consumer 0 takes what consumer 1 passed last
        if (PingPong && consumer == 0) named_barrier_sync(1, 256);
    }
};

template <class T, int HeadDim, int Keys, bool PingPong, bool Persistent>
struct ForwardConsumer {
    using Shared = ForwardShared<HeadDim, Keys>;
    using Stage = Ring<Shared::stages>;
    const ForwardParameters& parameters;
    Shared shared;
    int consumer;
    Turns<PingPong> turns{consumer};
    Stage k_at, v_at;
    int q_parity = 0;

    AADKERN_DEVICE ForwardConsumer(const ForwardParameters& parameters, Shared shared, int consumer)
        : parameters(parameters), shared(shared), consumer(consumer) {}

    AADKERN_DEVICE void release(SharedAddress empty) const {
        if (lane_index() == 0) mbarrier_arrive(empty);
    }
    // Waits for the tile; how many keys it has.
    AADKERN_DEVICE int wait_for_k(const Stage& at) const {
        mbarrier_wait(shared.k_full(at.stage), at.parity);
        return warp_uniform(lane_index() == 0 ? int(load_shared_u32(shared.key_count(at.stage))) : 0);
    }

    AADKERN_DEVICE void attend(float (&o)[HeadDim / 2], RunningSoftmax& softmax, int tiles) {
        const SharedAddress q = shared.q(64 * consumer);
        float s[Keys / 2], decay[2];
        uint32_t p[Keys / 4];

        mbarrier_wait(shared.q_full(), q_parity);
        q_parity ^= 1;
        int count = wait_for_k(k_at);
        turns.take();
        wgmma_fence();
        multiply_q_k<T, HeadDim, Keys>(s, q, Shared::q_panel, shared.k(k_at.stage));
        wgmma_commit();
        turns.pass();
        wgmma_wait<0>();
        keep(s);
        release(shared.k_empty(k_at.stage));
        if (count < Keys) mask_tail(s, count);
        softmax.step(s, parameters.scale_log2, decay);
        pack_fragment<T>(p, s);
        k_at.advance();
        if (tiles > 1) count = wait_for_k(k_at);

        for (int tile = 1; tile < tiles; ++tile) {
            turns.take();
            wgmma_fence();
            multiply_q_k<T, HeadDim, Keys>(s, q, Shared::q_panel, shared.k(k_at.stage));
            wgmma_commit();
            mbarrier_wait(shared.v_full(v_at.stage), v_at.parity);
            wgmma_fence();  // the one above covers o and p too, but ptxas does not see it past the wait
            multiply_p_v<T, HeadDim, Keys>(o, p, shared.v(v_at.stage));
            wgmma_commit();
            turns.pass();
            wgmma_wait<1>();
            keep(s);
            release(shared.k_empty(k_at.stage));
            if (count < Keys) mask_tail(s, count);
            softmax.step(s, parameters.scale_log2, decay);
            // The next k is waited for here, and not where it is used, to hold the wait for p v in its place: ptxas moves nothing
            // across the branch of a spin, but would move that wait above the softmax, with nothing left to run beside it.
            k_at.advance();
            if (tile + 1 < tiles) count = wait_for_k(k_at);
            wgmma_wait<0>();
            keep(o);
            release(shared.v_empty(v_at.stage));
            v_at.advance();
            scale_rows(o, decay);
            pack_fragment<T>(p, s);
        }
        release(shared.q_empty());
        mbarrier_wait(shared.v_full(v_at.stage), v_at.parity);
        wgmma_fence();
        multiply_p_v<T, HeadDim, Keys>(o, p, shared.v(v_at.stage));
        wgmma_commit();
        wgmma_wait<0>();
        keep(o);
        release(shared.v_empty(v_at.stage));
        v_at.advance();
    }

    AADKERN_DEVICE void run(int tile) {
        float o[HeadDim / 2];
#pragma unroll
        for (int i = 0; i < HeadDim / 2; ++i) o[i] = 0.f;
        RunningSoftmax softmax;
        const int tiles = KeyTiles<Keys>::total(parameters.tables, forward_work(parameters, tile));
        if (tiles > 0) attend(o, softmax, tiles);

        float inverse[2], lse[2];
        softmax.finish(inverse, lse);
        scale_rows(o, inverse);
        const int first = 64 * consumer + 16 * (warp_index() % 4);  // of this warp's rows in the tile
        const ResultRows rows(parameters, forward_work(parameters, tile), first);
        if constexpr (Persistent) {
            store_rows_by_quads<T, HeadDim>(o, rows.out, rows.stride, rows.count);
        } else {
            named_barrier_sync(3 + consumer, 128);  // no warp's part of q k reads q any more
            store_rows<T, HeadDim>(o, shared.q(first), Shared::q_panel, rows.out, rows.stride, rows.count);
        }
        rows.store_lse(lse);
    }

    AADKERN_DEVICE void run_all() {
        turns.begin();
        for_each_tile<Persistent>(parameters, [&](int tile) { run(tile); });
        turns.end();
    }
};

template <class T, int HeadDim, int Keys, bool PingPong, bool Persistent>
AADKERN_KERNEL((ForwardShared<HeadDim, Keys>::threads))
forward_kernel(AADKERN_GRID_CONSTANT ForwardParameters parameters) {
    const ForwardShared<HeadDim, Keys> shared{(shared_base() + 1023) & ~1023u};
    if (thread_index() == 0) {
        tma_prefetch_descriptor(&parameters.q);
        tma_prefetch_descriptor(&parameters.k);
        tma_prefetch_descriptor(&parameters.v);
        shared.initialise_barriers();
    }
    cta_sync();
    if (warpgroup_index() == 0) {
        registers_decrease<Persistent ? 32 : 24>();  // the walk over tiles takes more than 24
        const ForwardProducer<HeadDim, Keys, Persistent> producer{parameters, shared};
        if (warp_index() == 0 && elect_one()) producer.load_all();
        if (warp_index() == 1) producer.clear_tails();
    } else {
        registers_increase<Persistent ? 232 : 240>();
        ForwardConsumer<T, HeadDim, Keys, PingPong, Persistent>(parameters, shared, warpgroup_index() - 1).run_all();
    }
}

}  // namespace aadkern
