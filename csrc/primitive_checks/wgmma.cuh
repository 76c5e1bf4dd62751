// The check of wgmma: one tile product for every kind of operand.
#pragma once

#include "primitive_checks/checks.cuh"

namespace aadkern::primitive_checks {

// ---- wgmma: D (64 x N) = A (64 x 128) B (128 x N), every kind of operand
enum class ASource { SharedK, SharedMN, Registers };
struct WgmmaArguments {
    TensorMap a, b;            // K-major: [rows, 128]; MN-major: [128, 64 or more]
    const uint16_t* a_values;  // [64, 128], for A from registers
    float* d;                  // [64, N]
    int column;                // MN-major B with N = 32: which half of its 64 columns, 0 or 32
};

template <class T, ASource Source, Major MajorB, int N> AADKERN_KERNEL(128)
wgmma_tile(AADKERN_GRID_CONSTANT WgmmaArguments arguments) {
    // In panels of 128-byte rows: two of 64 (K-major) or one of 128 rows for A; for B, N rows twice, or 128 rows for every 64
    // columns.
    constexpr int a_panel = 64 * 128, b_panels = MajorB == Major::K ? 2 : (N + 63) / 64,
                  b_panel = (MajorB == Major::K ? N : 128) * 128;
    constexpr int b_bytes = b_panels * b_panel, bytes = b_bytes + (Source == ASource::Registers ? 0 : 2 * a_panel);
    const SharedAddress a = aligned_base(), b = a + 2 * a_panel, mbarrier = b + b_bytes;
    const int thread = thread_index();
    const bool leader = warp_index() == 0 && elect_one();
    if (leader) {
        mbarrier_init(mbarrier, 1);
        fence_mbarrier_init();
    }
    cta_sync();
    if (leader) {
        mbarrier_arrive_expect_tx(mbarrier, bytes);
        for (int panel = 0; panel < b_panels; panel++)
            tma_load_4d(b + panel * b_panel, &arguments.b, mbarrier, 64 * panel, 0, 0, 0);
        if constexpr (Source == ASource::SharedK) {
            for (int panel = 0; panel < 2; panel++) tma_load_4d(a + panel * a_panel, &arguments.a, mbarrier, 64 * panel, 0, 0, 0);
        } else if constexpr (Source == ASource::SharedMN) {
            tma_load_4d(a, &arguments.a, mbarrier, 0, 0, 0, 0);
        }
    }
    uint32_t registers[32];
    if constexpr (Source == ASource::Registers) {
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i & 1),
                      column = 16 * (i / 4) + 2 * (thread % 4) + 8 * ((i >> 1) & 1);
            registers[i] = load_global(reinterpret_cast<const uint32_t*>(arguments.a_values + row * 128 + column));
        }
    }
    mbarrier_wait(mbarrier, 0);
    float d[N / 2];
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const uint64_t operand_b = MajorB == Major::K ? matrix_descriptor_128(b + k / 4 * b_panel + k % 4 * 32, 0)
                                                      : matrix_descriptor_128(b + k * 2048 + 2 * arguments.column, b_panel);
        if constexpr (Source == ASource::SharedK) {
            wgmma<T, Major::K, MajorB>(d, matrix_descriptor_128(a + k / 4 * a_panel + k % 4 * 32, 0), operand_b, k != 0);
        } else if constexpr (Source == ASource::SharedMN) {
            wgmma<T, Major::MN, MajorB>(d, matrix_descriptor_128(a + k * 2048, 2 * a_panel), operand_b, k != 0);
        } else {
            wgmma<T, MajorB>(d, registers + 4 * k, operand_b, k != 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    keep(d);
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * ((i >> 1) & 1),
                  column = 8 * (i >> 2) + 2 * (thread % 4) + (i & 1);
        store_global(arguments.d + row * N + column, d[i]);
    }
}

}  // namespace aadkern::primitive_checks
