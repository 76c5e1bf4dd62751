// Device half: loads and stores of the generic proxy, shared matrices, counters in global memory.
#pragma once

namespace aadkern {

template <class T> AADKERN_PRIMITIVE T load_global(const T* source) { return *source; }
template <class T> AADKERN_PRIMITIVE void store_global(T* target, T value) { *target = value; }
// Left to itself nvcc stores most of these word by word (so seen in nvcc 13.0's SASS), uint4 too, though it loads them whole.
template <> AADKERN_PRIMITIVE void store_global(Word4* target, Word4 value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(target)), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

AADKERN_PRIMITIVE int atomic_add_global(int* counter, int value) { return atomicAdd(counter, value); }

AADKERN_PRIMITIVE void semaphore_wait(const int* counter, int value) {
    SpinLimit limit;
    for (int seen;; limit.check(0, value)) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        if (seen == value) return;
    }
}

AADKERN_PRIMITIVE void semaphore_add(int* counter, int value) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

AADKERN_PRIMITIVE SharedAddress shared_base() {
    extern __shared__ uint8_t aadkern_dynamic_shared[];
    return SharedAddress(__cvta_generic_to_shared(aadkern_dynamic_shared));
}

AADKERN_PRIMITIVE uint32_t load_shared_u32(SharedAddress source) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(source) : "memory");
    return value;
}

AADKERN_PRIMITIVE float load_shared_f32(SharedAddress source) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(source) : "memory");
    return value;
}

AADKERN_PRIMITIVE Float2 load_shared_f32x2(SharedAddress source) {
    Float2 value;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(source) : "memory");
    return value;
}

AADKERN_PRIMITIVE Word4 load_shared_v4(SharedAddress source) {
    Word4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(source)
                 : "memory");
    return value;
}

AADKERN_PRIMITIVE void store_shared_u32(SharedAddress target, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(value) : "memory");
}

AADKERN_PRIMITIVE void store_shared_f32(SharedAddress target, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(target), "f"(value) : "memory");
}

AADKERN_PRIMITIVE void store_shared_f32x2(SharedAddress target, Float2 value) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(target), "f"(value.x), "f"(value.y) : "memory");
}

AADKERN_PRIMITIVE void store_shared_v4(SharedAddress target, Word4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

AADKERN_PRIMITIVE void store_matrix_x4(SharedAddress row, const uint32_t (&value)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(value[0]), "r"(value[1]),
                 "r"(value[2]), "r"(value[3])
                 : "memory");
}

AADKERN_PRIMITIVE void store_matrix_x4_transposed(SharedAddress row, const uint32_t (&value)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(value[0]), "r"(value[1]),
                 "r"(value[2]), "r"(value[3])
                 : "memory");
}

AADKERN_PRIMITIVE void load_matrix_x4(SharedAddress row, uint32_t (&value)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(row)
                 : "memory");
}

AADKERN_PRIMITIVE void load_matrix_x4_transposed(SharedAddress row, uint32_t (&value)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(row)
                 : "memory");
}

}  // namespace aadkern
