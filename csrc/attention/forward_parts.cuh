// The parts that both forward kernels are made of: products of tiles, the running softmax, the way out.
#pragma once

#include "attention/forward_parameters.h"
#include "attention/tiles.cuh"

namespace aadkern {

// ---- products: asynchronous, the caller fences, commits and waits -----------------------------------------------------------

// s (64 x Keys) = q (64 rows of a tile whose panels are q_panel bytes apart) times k (Keys rows) transposed.
template <class T, int HeadDim, int Keys>
AADKERN_DEVICE void multiply_q_k(float (&s)[Keys / 2], SharedAddress q, uint32_t q_panel, SharedAddress k) {
    constexpr uint32_t k_panel = Keys * panel_row_bytes;
    const uint64_t q_start = matrix_descriptor_128(q, 0), k_start = matrix_descriptor_128(k, 0);
#pragma unroll
    for (uint32_t step = 0; step < HeadDim / 16; ++step) {
        const uint32_t panel = step / 4, inside = step % 4 * 32;  // 16 columns are 32 bytes of a row
        const uint64_t q_here = q_start + (panel * q_panel + inside) / 16, k_here = k_start + (panel * k_panel + inside) / 16;
        wgmma<T, Major::K, Major::K>(s, q_here, k_here, step != 0);
    }
}

// o (64 x HeadDim) += p (64 x Keys, in registers as `pack_fragment` leaves it) times v (Keys rows).
template <class T, int HeadDim, int Keys>
AADKERN_DEVICE void multiply_p_v(float (&o)[HeadDim / 2], const uint32_t (&p)[Keys / 4], SharedAddress v) {
    const uint64_t v_start = matrix_descriptor_128(v, Keys * panel_row_bytes);
#pragma unroll
    for (uint32_t step = 0; step < Keys / 16; ++step) {
        wgmma<T, Major::MN>(o, p + 4 * step, v_start + step * 16 * panel_row_bytes / 16, true);
    }
}

// ---- softmax ----------------------------------------------------------------------------------------------------------------

AADKERN_DEVICE constexpr float minus_infinity() { return -__builtin_huge_valf(); }

// Keys from `count` on are masked.
template <int Size>
AADKERN_DEVICE void mask_tail(float (&s)[Size], int count) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < Size; ++i) {
        if (fragment_column(i, lane) >= count) s[i] = minus_infinity();
    }
}

// The softmax so far of the two rows that a thread shares with the other three threads of its quad. `sum` is over this thread's
// columns. Scores are in base 2: x = scale_log2 s, so that p = 2^(x - top) is one fma and one exp2.
struct RunningSoftmax {
    float top[2] = {minus_infinity(), minus_infinity()};
    float sum[2] = {0.f, 0.f};

    // Takes the scores of one more tile, leaves p in their place. Earlier sums and outputs are to be multiplied with `decay`.
    template <int Size>
    AADKERN_DEVICE void step(float (&s)[Size], float scale_log2, float (&decay)[2]) {
        float largest[2] = {minus_infinity(), minus_infinity()};
#pragma unroll
        for (int i = 0; i < Size; ++i) largest[fragment_row(i)] = fmaxf(largest[fragment_row(i)], s[i]);
        float subtract[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            largest[row] = fmaxf(largest[row], shuffle_xor(largest[row], 1));
            largest[row] = fmaxf(largest[row], shuffle_xor(largest[row], 2));
            const float above = fmaxf(top[row], scale_log2 * largest[row]);
            subtract[row] = above == minus_infinity() ? 0.f : above;  // nothing seen yet but -inf: -inf - -inf would be NaN
            decay[row] = exp2_approx(top[row] - subtract[row]);
            top[row] = above;
            sum[row] *= decay[row];
        }
#pragma unroll
        for (int i = 0; i < Size; ++i) {
            s[i] = exp2_approx(fmaf(s[i], scale_log2, -subtract[fragment_row(i)]));
            sum[fragment_row(i)] += s[i];
        }
    }

    // After the last tile: what to multiply the output of each row with, and its lse.
    AADKERN_DEVICE void finish(float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float total = sum[row] + shuffle_xor(sum[row], 1);
            total += shuffle_xor(total, 2);
            inverse[row] = total == 0.f ? 0.f : 1.f / total;
            // A score of +inf makes every p of its row NaN, but the lse is known: +inf.
            lse[row] = total == 0.f || top[row] == -minus_infinity() ? top[row] : (top[row] + log2_approx(total)) * ln_of_2;
        }
    }
};

// Element i of an output fragment belongs to row fragment_row(i).
template <int Size>
AADKERN_DEVICE void scale_rows(float (&o)[Size], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < Size; ++i) o[i] *= factor[fragment_row(i)];
}

// ---- out --------------------------------------------------------------------------------------------------------------------

// The normalised output and the lse of the warp's 16 rows that begin `first` rows into the tile.
template <class T, int HeadDim>
AADKERN_DEVICE void store_results(const ForwardParameters& parameters, const Work& work, int first, const float (&o)[HeadDim / 2],
                                  const float (&lse)[2], SharedAddress rows, uint32_t panel) {
    const int count = work.end_row - work.first_row - first;
    const int64_t row = work.first_row + first;
    const TensorView& out = parameters.out;
    const int64_t offset = work.batch * out.batch_stride + row * out.length_stride + work.head * out.head_stride;
    uint16_t* target = static_cast<uint16_t*>(out.data) + offset;
    store_rows<T, HeadDim>(o, rows, panel, target, out.length_stride, count);
    float* lse_rows = parameters.lse + (int64_t(work.batch) * parameters.heads + work.head) * parameters.q_len + row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int own = lane_index() / 4 + 8 * half;
        if (lane_index() % 4 == 0 && own < count) store_global(lse_rows + own, lse[half]);
    }
}

}  // namespace aadkern
