// Device half: indices, shuffles, numbers, register reallocation.
#pragma once

#include <type_traits>

namespace aadkern {

AADKERN_PRIMITIVE int thread_index() { return int(threadIdx.x); }
AADKERN_PRIMITIVE int lane_index() { return int(threadIdx.x % 32); }
AADKERN_PRIMITIVE int warp_index() { return warp_uniform(int(threadIdx.x / 32)); }
AADKERN_PRIMITIVE int warpgroup_index() { return warp_uniform(int(threadIdx.x / 128)); }
AADKERN_PRIMITIVE int block_index_x() { return int(blockIdx.x); }
AADKERN_PRIMITIVE int block_index_y() { return int(blockIdx.y); }
AADKERN_PRIMITIVE int block_index_z() { return int(blockIdx.z); }
AADKERN_PRIMITIVE int grid_size_x() { return int(gridDim.x); }
AADKERN_PRIMITIVE int grid_size_y() { return int(gridDim.y); }
AADKERN_PRIMITIVE int grid_size_z() { return int(gridDim.z); }

AADKERN_PRIMITIVE bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected != 0;
}

AADKERN_PRIMITIVE float shuffle_xor(float value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
AADKERN_PRIMITIVE float shuffle(float value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
AADKERN_PRIMITIVE uint32_t shuffle_xor(uint32_t value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
AADKERN_PRIMITIVE uint32_t shuffle(uint32_t value, int source_lane) { return __shfl_sync(0xffffffffu, value, source_lane); }
AADKERN_PRIMITIVE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

AADKERN_PRIMITIVE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

AADKERN_PRIMITIVE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <class T> AADKERN_PRIMITIVE uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, BFloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        static_assert(std::is_same_v<T, Float16>);
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
}

template <class T> AADKERN_PRIMITIVE float unpack_half(uint16_t bits) {
    float value;
    if constexpr (std::is_same_v<T, BFloat16>) {
        value = __uint_as_float(uint32_t(bits) << 16);
    } else {
        static_assert(std::is_same_v<T, Float16>);
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    }
    return value;
}
template <class T> AADKERN_PRIMITIVE float unpack_low(uint32_t packed) { return unpack_half<T>(uint16_t(packed)); }
template <class T> AADKERN_PRIMITIVE float unpack_high(uint32_t packed) { return unpack_half<T>(uint16_t(packed >> 16)); }

template <int R> AADKERN_PRIMITIVE void registers_increase() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}

template <int R> AADKERN_PRIMITIVE void registers_decrease() {
    static_assert(R % 8 == 0 && R >= 24 && R <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

// A debug build (docs/hopper.md) gives spins a limit, at most 4 seconds: a warp that spins longer leaves a record of what it waits for and
// ends the launch with an illegal access, where it would hang for ever and say nothing. Neither printf nor trap: with a call or an end
// of the path in it, ptxas serialises every product (C7510, C7512). Named barriers and setmaxnreg wait in hardware, without a limit.
#if defined(AADKERN_SPIN_SECONDS)
constexpr int spin_record_count = 64;
// In pinned host memory, which outlives the launch: (CTA + 1, warp, shared address of the mbarrier or 0, parity or count waited for).
static __constant__ uint32_t* spin_records;

struct SpinLimit {
    uint32_t start = 0;
    AADKERN_DEVICE void check(uint32_t mbarrier, int wanted) {
        uint32_t now;  // the low half, in nanoseconds: differences are right for 4 seconds
        asm volatile("mov.u32 %0, %globaltimer_lo;" : "=r"(now));
        if (start == 0) start = now;
        if (now - start < AADKERN_SPIN_SECONDS * 1000000000u) return;
        if (spin_records != nullptr) {
            volatile uint32_t* record = spin_records + (blockIdx.x * 16 + threadIdx.x / 32) % spin_record_count * 4;
            record[0] = blockIdx.x + 1;
            record[1] = threadIdx.x / 32;
            record[2] = mbarrier;
            record[3] = uint32_t(wanted);
        }
        __threadfence_system();
        __nanosleep(1000000);  // for others to leave theirs
        asm volatile("st.global.u32 [%0], 0;" ::"l"(uint64_t(0)) : "memory");
    }
};
#else
struct SpinLimit {
    AADKERN_DEVICE void check(uint32_t, int) {}
};
#endif

}  // namespace aadkern
