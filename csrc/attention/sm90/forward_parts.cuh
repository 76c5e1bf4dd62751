// The parts that both forward kernels are made of: products of tiles, the running softmax, the way out.
#pragma once

#include "attention/sm90/forward_parameters.h"
#include "attention/sm90/tiles.cuh"

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

// The results of a warp's 16 rows that begin `first` rows into the tile: where they go, and how many of them are the run's.
struct ResultRows {
    int count;
    uint16_t* out;
    int64_t stride;
    float* lse;

    AADKERN_DEVICE ResultRows(const ForwardParameters& p, const Work& work, int first)
        : count(work.end_row - work.first_row - first), stride(p.out.length_stride) {
        const int64_t row = work.first_row + first;
        out = static_cast<uint16_t*>(p.out.data) + work.batch * p.out.batch_stride + row * stride + work.head * p.out.head_stride;
        lse = p.lse + (int64_t(work.batch) * p.heads + work.head) * p.q_len + row;
    }
    AADKERN_DEVICE void store_lse(const float (&values)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int own = lane_index() / 4 + 8 * half;
            if (lane_index() % 4 == 0 && own < count) store_global(lse + own, values[half]);
        }
    }
};

// As `store_rows`, straight from registers. The four threads of a quad hold two columns each of every 8: of four such pieces each
// thread gathers one, 16 bytes, so that the quad stores 64 bytes of a row.
template <class T, int HeadDim>
AADKERN_DEVICE void store_rows_by_quads(const float (&o)[HeadDim / 2], uint16_t* target, int64_t stride, int count) {
    const int own = lane_index() % 4;
    uint32_t packed[HeadDim / 4];
    pack_fragment<T>(packed, o);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = lane_index() / 4 + 8 * half;
#pragma unroll
        for (int first = 0; first < HeadDim / 8; first += 4) {
            uint32_t piece[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) piece[i] = packed[2 * (first + i) + half];
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {  // a 4x4 transposition, over the quad
                const bool upper = own & distance;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (i & distance) continue;
                    uint32_t &low = piece[i], &high = piece[i + distance];
                    const uint32_t got = shuffle_xor(upper ? low : high, distance);
                    low = upper ? got : low;
                    high = upper ? high : got;
                }
            }
            uint16_t* place = target + row * stride + 8 * (first + own);
            if (row < count) store_global(reinterpret_cast<Word4*>(place), Word4{piece[0], piece[1], piece[2], piece[3]});
        }
    }
}

}  // namespace aadkern
