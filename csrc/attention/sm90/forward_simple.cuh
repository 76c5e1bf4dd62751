// Attention over key ranges, forward, without any overlap: one warpgroup, 64 query rows, one buffer each for k and v. The step
// before forward.cuh: the same loads, products and softmax with three mbarriers and no second role, to be right first.
#pragma once

#include "attention/sm90/forward_parts.cuh"

namespace aadkern {

template <int HeadDim>
struct SimpleForwardShared {
    static constexpr int rows = 64, keys = 128, threads = 128;
    static constexpr int q_panel = rows * panel_row_bytes;
    static constexpr int q_bytes = rows * HeadDim * 2, tile_bytes = keys * HeadDim * 2;
    static constexpr int q = 0, k = q_bytes, v = k + tile_bytes;
    static constexpr int q_full = v + tile_bytes, k_full = q_full + 8, v_full = k_full + 8;
    static constexpr int bytes = v_full + 8 + 1024;
};

template <class T, int HeadDim>
AADKERN_KERNEL(SimpleForwardShared<HeadDim>::threads)
simple_forward_kernel(AADKERN_GRID_CONSTANT ForwardParameters parameters) {
    using Shared = SimpleForwardShared<HeadDim>;
    const SharedAddress shared = (shared_base() + 1023) & ~1023u;
    const SharedAddress q = shared + Shared::q, k = shared + Shared::k, v = shared + Shared::v;
    const SharedAddress q_full = shared + Shared::q_full, k_full = shared + Shared::k_full, v_full = shared + Shared::v_full;
    const bool leader = thread_index() == 0;
    const Work work = own_work(parameters.tables, parameters.batch, parameters.heads, parameters.head_group);
    if (leader) {
        mbarrier_init(q_full, 1);
        mbarrier_init(k_full, 1);
        mbarrier_init(v_full, 1);
        fence_mbarrier_init();
    }
    cta_sync();
    if (leader) {
        mbarrier_arrive_expect_tx(q_full, Shared::q_bytes);
        load_panels<HeadDim>(q, &parameters.q, q_full, Shared::rows, work.first_row, work, L2Hint::EvictFirst);
    }
    mbarrier_wait(q_full, 0);

    float o[HeadDim / 2], s[64], decay[2];
    uint32_t p[32];
#pragma unroll
    for (int i = 0; i < HeadDim / 2; ++i) o[i] = 0.f;
    RunningSoftmax softmax;
    int parity = 0;
    for (KeyTiles<Shared::keys> tiles(parameters.tables, work); tiles.next(); parity ^= 1) {
        if (leader) {
            mbarrier_arrive_expect_tx(k_full, Shared::tile_bytes);
            load_panels<HeadDim>(k, &parameters.k, k_full, Shared::keys, tiles.start, work, L2Hint::EvictLast);
            mbarrier_arrive_expect_tx(v_full, Shared::tile_bytes);
            load_panels<HeadDim>(v, &parameters.v, v_full, Shared::keys, tiles.start, work, L2Hint::EvictLast);
        }
        mbarrier_wait(k_full, parity);
        wgmma_fence();
        multiply_q_k<T, HeadDim, Shared::keys>(s, q, Shared::q_panel, k);
        wgmma_commit();
        wgmma_wait<0>();
        keep(s);
        if (tiles.count < Shared::keys) mask_tail(s, tiles.count);
        softmax.step(s, parameters.scale_log2, decay);
        scale_rows(o, decay);
        pack_fragment<T>(p, s);
        mbarrier_wait(v_full, parity);
        if (tiles.count < Shared::keys) {
            clear_rows<HeadDim, Shared::keys>(v, tiles.count, thread_index(), Shared::threads);
            fence_proxy_async();
            cta_sync();
        }
        wgmma_fence();
        multiply_p_v<T, HeadDim, Shared::keys>(o, p, v);
        wgmma_commit();
        wgmma_wait<0>();
        keep(o);
        cta_sync();  // all are done with k and v
    }

    float inverse[2], lse[2];
    softmax.finish(inverse, lse);
    scale_rows(o, inverse);
    const int first = 16 * warp_index();  // of this warp's rows in the tile; nobody reads q any more
    const ResultRows rows(parameters, work, first);
    store_rows<T, HeadDim>(o, q + first * panel_row_bytes, Shared::q_panel, rows.out, rows.stride, rows.count);
    rows.store_lse(lse);
}

}  // namespace aadkern
