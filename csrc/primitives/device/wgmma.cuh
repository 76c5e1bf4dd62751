// Device half: wgmma. One asm statement in two forms (A from shared memory or from registers), spelled out for each N by macros,
// since the operand list of an asm statement cannot be computed.
#pragma once

#include <type_traits>

namespace aadkern {

#define AADKERN_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define AADKERN_NAMES_32 AADKERN_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define AADKERN_NAMES_64                                                                   \
    AADKERN_NAMES_32                                                                       \
        ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
        ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define AADKERN_NAMES_40 AADKERN_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define AADKERN_NAMES_88                                                                   \
    AADKERN_NAMES_64                                                                       \
        ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
        ", %80, %81, %82, %83, %84, %85, %86, %87"

#define AADKERN_FLOATS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define AADKERN_FLOATS_16(i) AADKERN_FLOATS_4(i), AADKERN_FLOATS_4(i + 4), AADKERN_FLOATS_4(i + 8), AADKERN_FLOATS_4(i + 12)
#define AADKERN_FLOATS_32(i) AADKERN_FLOATS_16(i), AADKERN_FLOATS_16(i + 16)
#define AADKERN_FLOATS_40(i) AADKERN_FLOATS_32(i), AADKERN_FLOATS_4(i + 32), AADKERN_FLOATS_4(i + 36)
#define AADKERN_FLOATS_64(i) AADKERN_FLOATS_32(i), AADKERN_FLOATS_32(i + 32)
#define AADKERN_FLOATS_88(i) AADKERN_FLOATS_64(i), AADKERN_FLOATS_16(i + 64), AADKERN_FLOATS_4(i + 80), AADKERN_FLOATS_4(i + 84)

// After R floats of D come, in this order, A, B, accumulate and the major-ness flags; the numbers say so.
#define AADKERN_WGMMA_SHARED(R, SHAPE, TYPE, A, B, ACCUMULATE, TRANSPOSE_A, TRANSPOSE_B)            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                     \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" AADKERN_NAMES_##R \
                 "}, " A ", " B ", p, 1, 1, " TRANSPOSE_A ", " TRANSPOSE_B ";\n}"                   \
                 : AADKERN_FLOATS_##R(0)                                                            \
                 : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(MajorA)), "n"(int(MajorB)))

#define AADKERN_WGMMA_REGISTERS(R, SHAPE, TYPE, A, B, ACCUMULATE, TRANSPOSE_B)                      \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                     \
                 ", 0;\n"                                                                           \
                 "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPE "." TYPE " {" AADKERN_NAMES_##R \
                 "}, {" A "}, " B ", p, 1, 1, " TRANSPOSE_B ";\n}"                                  \
                 : AADKERN_FLOATS_##R(0)                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(MajorB)))

template <class T, Major MajorA, Major MajorB, int Size>
AADKERN_PRIMITIVE void wgmma(float (&d)[Size], uint64_t a, uint64_t b, bool accumulate) {
    constexpr bool bfloat16 = std::is_same_v<T, BFloat16>;
    static_assert(bfloat16 || std::is_same_v<T, Float16>);
    static_assert(Size == 16 || Size == 32 || Size == 40 || Size == 64 || Size == 88, "N is 32, 64, 80, 128 or 176");
    if constexpr (Size == 16 && bfloat16) {
        AADKERN_WGMMA_SHARED(16, "m64n32k16", "bf16", "%16", "%17", "%18", "%19", "%20");
    } else if constexpr (Size == 16) {
        AADKERN_WGMMA_SHARED(16, "m64n32k16", "f16", "%16", "%17", "%18", "%19", "%20");
    } else if constexpr (Size == 32 && bfloat16) {
        AADKERN_WGMMA_SHARED(32, "m64n64k16", "bf16", "%32", "%33", "%34", "%35", "%36");
    } else if constexpr (Size == 32) {
        AADKERN_WGMMA_SHARED(32, "m64n64k16", "f16", "%32", "%33", "%34", "%35", "%36");
    } else if constexpr (Size == 40 && bfloat16) {
        AADKERN_WGMMA_SHARED(40, "m64n80k16", "bf16", "%40", "%41", "%42", "%43", "%44");
    } else if constexpr (Size == 40) {
        AADKERN_WGMMA_SHARED(40, "m64n80k16", "f16", "%40", "%41", "%42", "%43", "%44");
    } else if constexpr (Size == 64 && bfloat16) {
        AADKERN_WGMMA_SHARED(64, "m64n128k16", "bf16", "%64", "%65", "%66", "%67", "%68");
    } else if constexpr (Size == 64) {
        AADKERN_WGMMA_SHARED(64, "m64n128k16", "f16", "%64", "%65", "%66", "%67", "%68");
    } else if constexpr (bfloat16) {
        AADKERN_WGMMA_SHARED(88, "m64n176k16", "bf16", "%88", "%89", "%90", "%91", "%92");
    } else {
        AADKERN_WGMMA_SHARED(88, "m64n176k16", "f16", "%88", "%89", "%90", "%91", "%92");
    }
}

template <class T, Major MajorB, int Size>
AADKERN_PRIMITIVE void wgmma(float (&d)[Size], const uint32_t* a, uint64_t b, bool accumulate) {
    constexpr bool bfloat16 = std::is_same_v<T, BFloat16>;
    static_assert(bfloat16 || std::is_same_v<T, Float16>);
    static_assert(Size == 16 || Size == 32 || Size == 64, "N is 32, 64 or 128");
    if constexpr (Size == 16 && bfloat16) {
        AADKERN_WGMMA_REGISTERS(16, "m64n32k16", "bf16", "%16, %17, %18, %19", "%20", "%21", "%22");
    } else if constexpr (Size == 16) {
        AADKERN_WGMMA_REGISTERS(16, "m64n32k16", "f16", "%16, %17, %18, %19", "%20", "%21", "%22");
    } else if constexpr (Size == 32 && bfloat16) {
        AADKERN_WGMMA_REGISTERS(32, "m64n64k16", "bf16", "%32, %33, %34, %35", "%36", "%37", "%38");
    } else if constexpr (Size == 32) {
        AADKERN_WGMMA_REGISTERS(32, "m64n64k16", "f16", "%32, %33, %34, %35", "%36", "%37", "%38");
    } else if constexpr (bfloat16) {
        AADKERN_WGMMA_REGISTERS(64, "m64n128k16", "bf16", "%64, %65, %66, %67", "%68", "%69", "%70");
    } else {
        AADKERN_WGMMA_REGISTERS(64, "m64n128k16", "f16", "%64, %65, %66, %67", "%68", "%69", "%70");
    }
}

#undef AADKERN_WGMMA_SHARED
#undef AADKERN_WGMMA_REGISTERS
#undef AADKERN_FLOATS_88
#undef AADKERN_FLOATS_64
#undef AADKERN_FLOATS_40
#undef AADKERN_FLOATS_32
#undef AADKERN_FLOATS_16
#undef AADKERN_FLOATS_4
#undef AADKERN_NAMES_88
#undef AADKERN_NAMES_64
#undef AADKERN_NAMES_40
#undef AADKERN_NAMES_32
#undef AADKERN_NAMES_16

AADKERN_PRIMITIVE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
AADKERN_PRIMITIVE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> AADKERN_PRIMITIVE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

template <int Size> AADKERN_PRIMITIVE void keep(float (&registers)[Size]) {
#pragma unroll
    for (int i = 0; i < Size; i++) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int Size> AADKERN_PRIMITIVE void keep(uint32_t (&registers)[Size]) {
#pragma unroll
    for (int i = 0; i < Size; i++) asm volatile("" : "+r"(registers[i])::"memory");
}

}  // namespace aadkern
