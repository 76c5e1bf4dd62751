// Device half: barriers, mbarriers and fences.
#pragma once

namespace aadkern {

AADKERN_PRIMITIVE void cta_sync() { __syncthreads(); }
AADKERN_PRIMITIVE void warp_sync() { __syncwarp(); }

AADKERN_PRIMITIVE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
AADKERN_PRIMITIVE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

AADKERN_PRIMITIVE void mbarrier_init(SharedAddress mbarrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(mbarrier), "r"(count) : "memory");
}

AADKERN_PRIMITIVE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

AADKERN_PRIMITIVE void mbarrier_arrive(SharedAddress mbarrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(mbarrier) : "memory");
}

AADKERN_PRIMITIVE void mbarrier_arrive_expect_tx(SharedAddress mbarrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mbarrier), "r"(bytes) : "memory");
}

// try_wait may suspend the thread for a while that the hardware chooses: kinder to the issue slots than test_wait.
AADKERN_PRIMITIVE bool mbarrier_test(SharedAddress mbarrier, int parity) {
    uint32_t complete;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(complete)
                 : "r"(mbarrier), "r"(parity)
                 : "memory");
    return complete != 0;
}

AADKERN_PRIMITIVE void mbarrier_wait(SharedAddress mbarrier, int parity) {
    SpinLimit limit;
    while (!mbarrier_test(mbarrier, parity)) limit.check(mbarrier, parity);
}

AADKERN_PRIMITIVE void named_barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

AADKERN_PRIMITIVE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace aadkern
