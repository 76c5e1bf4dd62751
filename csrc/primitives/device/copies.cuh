// Device half: TMA and bulk copies. ".shared::cluster" is how older PTX names the target; without clusters it is the CTA's own.
#pragma once

namespace aadkern {

AADKERN_PRIMITIVE void tma_prefetch_descriptor(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

AADKERN_PRIMITIVE void tma_load_4d(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int c0, int c1, int c2,
                                   int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
            target),
        "l"(map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}

AADKERN_PRIMITIVE void tma_load_4d(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int c0, int c1, int c2,
                                   int c3, L2Hint hint) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(target),
        "l"(map), "r"(mbarrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(uint64_t(hint))
        : "memory");
}

AADKERN_PRIMITIVE void tma_store_4d(const TensorMap* map, SharedAddress source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(source),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

AADKERN_PRIMITIVE void tma_reduce_add_4d(const TensorMap* map, SharedAddress source, int c0, int c1, int c2, int c3) {
    asm volatile("cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                 "r"(source), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

AADKERN_PRIMITIVE void bulk_load(SharedAddress target, const void* source, int bytes, SharedAddress mbarrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(mbarrier)
                 : "memory");
}

AADKERN_PRIMITIVE void bulk_store(void* target, SharedAddress source, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(target)), "r"(source),
                 "r"(bytes)
                 : "memory");
}

AADKERN_PRIMITIVE void bulk_reduce_add_f32(float* target, SharedAddress source, int bytes) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(target)),
        "r"(source), "r"(bytes)
        : "memory");
}

AADKERN_PRIMITIVE void bulk_reduce_add_f32(float* target, SharedAddress source, int bytes, L2Hint hint) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(
            __cvta_generic_to_global(target)),
        "r"(source), "r"(bytes), "l"(uint64_t(hint))
        : "memory");
}

AADKERN_PRIMITIVE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int N> AADKERN_PRIMITIVE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }

template <int N> AADKERN_PRIMITIVE void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }

}  // namespace aadkern
