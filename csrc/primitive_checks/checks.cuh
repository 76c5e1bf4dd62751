// Checks of single primitives: one small kernel for each, to be run before anything that is built from them. Each needs only
// what those above it in this file have shown; wgmma.cuh comes after. The same kernels run on a GPU (checks.cu) and on
// the host model (csrc/model_entries/primitive_checks.cpp); tests/sm90/primitive_checks.py holds what each must give.
#pragma once

#include "primitives/primitives.h"

namespace aadkern::primitive_checks {

AADKERN_DEVICE SharedAddress aligned_base() { return (shared_base() + 1023) & ~1023u; }

// A wait that gives up, so that a wrong idea of the hardware is a failed check and not a GPU that hangs.
AADKERN_DEVICE bool wait_a_while(SharedAddress mbarrier, int parity) {
    for (int tries = 0; tries < 1 << 14; tries++) {
        if (mbarrier_test(mbarrier, parity)) return true;
    }
    return false;
}

// ---- numbers: out[i] = exp2(x), log2(x), the two halves of pack<bf16>(x, 2x) and of pack<fp16>(x, 2x)
struct NumbersArguments {
    const float* x;
    float* out;  // [6, count]
    int count;
};

AADKERN_KERNEL(128) numbers(AADKERN_GRID_CONSTANT NumbersArguments arguments) {
    const int i = block_index_x() * 128 + thread_index(), count = arguments.count;
    if (i >= count) return;
    const float x = load_global(arguments.x + i);
    const uint32_t bfloat16 = pack<BFloat16>(x, 2 * x), float16 = pack<Float16>(x, 2 * x);
    const float values[6] = {exp2_approx(x),
                             log2_approx(x),
                             unpack_low<BFloat16>(bfloat16),
                             unpack_high<BFloat16>(bfloat16),
                             unpack_low<Float16>(float16),
                             unpack_high<Float16>(float16)};
#pragma unroll
    for (int row = 0; row < 6; row++) store_global(arguments.out + row * count + i, values[row]);
}

// ---- elect: which lane of each warp is elected, in a converged warp, in a loop and after branches that parted the lanes
constexpr int kElections = 8;
struct ElectArguments {
    int* lane;   // [warps, kElections]
    int* count;  // [warps, kElections], zeroed
};

AADKERN_KERNEL(256) elect(AADKERN_GRID_CONSTANT ElectArguments arguments) {
    const int warp = warp_index(), lane = lane_index();
    for (int i = 0; i < kElections; i++) {
        if (i % 2 == 1 && (lane * 2654435761u >> (i + 20)) % 2 == 1) atomic_add_global(arguments.count + warp * kElections, 0);
        warp_sync();
        if (elect_one()) {
            store_global(arguments.lane + warp * kElections + i, lane);
            atomic_add_global(arguments.count + warp * kElections + i, 1);
        }
    }
}

// ---- matrix: stmatrix and ldmatrix, plain or transposed; `shared` shows the bytes, `back` what ldmatrix reads of them
struct MatrixArguments {
    const uint32_t* registers;  // [32, 4]
    uint32_t* shared;           // [2, 128]: stored plainly, and transposed
    uint32_t* back;             // [2, 2, 32, 4]: of each of these, read plainly and transposed
};

AADKERN_KERNEL(32) matrix(AADKERN_GRID_CONSTANT MatrixArguments arguments) {
    const int lane = lane_index();
    uint32_t value[4];
#pragma unroll
    for (int i = 0; i < 4; i++) value[i] = load_global(arguments.registers + 4 * lane + i);
    for (int way = 0; way < 2; way++) {
        const SharedAddress base = aligned_base() + 512 * way, row = base + 16 * lane;
        if (way == 0) {
            store_matrix_x4(row, value);
        } else {
            store_matrix_x4_transposed(row, value);
        }
        warp_sync();
        const Word4 words = load_shared_v4(row);
        store_global(reinterpret_cast<Word4*>(arguments.shared + 128 * way + 4 * lane), words);
        uint32_t plain[4], transposed[4];
        load_matrix_x4(row, plain);
        load_matrix_x4_transposed(row, transposed);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            store_global(arguments.back + 256 * way + 4 * lane + i, plain[i]);
            store_global(arguments.back + 256 * way + 128 + 4 * lane + i, transposed[i]);
        }
    }
}

// ---- ring: mbarrier phases. One warp feeds bulk loads through two stages, three warps consume them
constexpr int kRingFloats = 96, kRingStages = 2;
struct RingArguments {
    const float* source;  // [rounds, kRingFloats]
    float* sums;          // [96]: thread i sums (round + 1) * source[round][i]
    int rounds;
};

AADKERN_KERNEL(128) ring(AADKERN_GRID_CONSTANT RingArguments arguments) {
    const SharedAddress full = aligned_base(), empty = full + 8 * kRingStages, data = full + 128;
    const int warp = warp_index(), rounds = arguments.rounds;
    constexpr int bytes = kRingFloats * 4;
    if (thread_index() == 0) {
        for (int stage = 0; stage < kRingStages; stage++) {
            mbarrier_init(full + 8 * stage, 1);
            mbarrier_init(empty + 8 * stage, 3);
        }
        fence_mbarrier_init();
    }
    cta_sync();
    if (warp == 0) {
        if (elect_one()) {
            for (int round = 0; round < rounds; round++) {
                const int stage = round % kRingStages, use = round / kRingStages;
                mbarrier_wait(empty + 8 * stage, (use & 1) ^ 1);
                mbarrier_arrive_expect_tx(full + 8 * stage, bytes);
                bulk_load(data + stage * bytes, arguments.source + round * kRingFloats, bytes, full + 8 * stage);
            }
        }
    } else {
        const int i = thread_index() - 32;
        float sum = 0;
        for (int round = 0; round < rounds; round++) {
            const int stage = round % kRingStages, use = round / kRingStages;
            mbarrier_wait(full + 8 * stage, use & 1);
            sum += float(round + 1) * load_shared_f32(data + stage * bytes + 4 * i);
            warp_sync();
            if (lane_index() == 0) mbarrier_arrive(empty + 8 * stage);
        }
        store_global(arguments.sums + i, sum);
    }
}

// ---- tensor: a box of a 4D tensor into shared memory, its bytes shown as they lie there, and stored to another tensor
struct TensorArguments {
    TensorMap source, target;
    int at[4], to[4];
    int box_bytes;
    uint32_t* shared;  // [box_bytes / 4]
    int* complete;     // 1 if the box's full bytes arrived
};

AADKERN_KERNEL(128) tensor(AADKERN_GRID_CONSTANT TensorArguments arguments) {
    const SharedAddress mbarrier = aligned_base(), box = mbarrier + 1024;
    const auto& at = arguments.at;
    const auto& to = arguments.to;
    const bool leader = warp_index() == 0 && elect_one();
    if (leader) {
        tma_prefetch_descriptor(&arguments.source);
        mbarrier_init(mbarrier, 1);
        fence_mbarrier_init();
    }
    cta_sync();
    if (leader) {
        mbarrier_arrive_expect_tx(mbarrier, arguments.box_bytes);
        tma_load_4d(box, &arguments.source, mbarrier, at[0], at[1], at[2], at[3], L2Hint::EvictFirst);
    }
    const bool complete = wait_a_while(mbarrier, 0);
    if (leader) store_global(arguments.complete, int(complete));
    if (!complete) return;
    for (int i = thread_index(); i < arguments.box_bytes / 4; i += 128)
        store_global(arguments.shared + i, load_shared_u32(box + 4 * i));
    if (leader) {
        tma_store_4d(&arguments.target, box, to[0], to[1], to[2], to[3]);
        bulk_commit();
        bulk_wait_read<0>();
    }
}

// ---- reduce: every CTA adds a box (fp32, 128-byte swizzle) to the same tensor and a line to the same vector, and stores a line
constexpr int kReduceRows = 64, kReduceColumns = 32;
struct ReduceArguments {
    TensorMap sum;       // [.., rows, 32] fp32, box 64 x 32
    int row, head;       // where the box begins; rows past the tensor's end are dropped
    const float* terms;  // [CTAs, 64 * 32]
    float* line;         // [64 * 32]
    float* copies;       // [CTAs, 64 * 32]
};

AADKERN_KERNEL(128) reduce(AADKERN_GRID_CONSTANT ReduceArguments arguments) {
    constexpr int count = kReduceRows * kReduceColumns;
    const SharedAddress box = aligned_base(), line = box + 4 * count;
    const float* terms = arguments.terms + block_index_x() * count;
    for (int i = thread_index(); i < count; i += 128) {
        const float term = load_global(terms + i);
        store_shared_f32(swizzle_128(box + 4 * i), term);
        store_shared_f32(line + 4 * i, term);
    }
    fence_proxy_async();
    cta_sync();
    if (warp_index() == 0 && elect_one()) {
        tma_reduce_add_4d(&arguments.sum, box, 0, arguments.row, arguments.head, 0);
        bulk_commit();
        bulk_reduce_add_f32(arguments.line, line, 4 * count, L2Hint::EvictLast);
        bulk_store(arguments.copies + block_index_x() * count, line, 4 * count);
        bulk_commit();
        bulk_wait_read<0>();
    }
}

// ---- turns: two warpgroups take turns by named barriers, after a third gave its registers to them
constexpr int kLive = 200;
struct TurnsArguments {
    int turns;
    int* log;             // [2 * turns]: who took the turn
    const float* values;  // [kLive]
    float* sums;          // [256]: values[thread % kLive] * (the sum of all values, in registers before the factor is known)
};

AADKERN_KERNEL(384) turns(AADKERN_GRID_CONSTANT TurnsArguments arguments) {
    const int warpgroup = warpgroup_index();
    const SharedAddress position = aligned_base(), values = position + 16;
    if (thread_index() == 0) store_shared_u32(position, 0);
    if (thread_index() < kLive) store_shared_f32(values + 4 * thread_index(), load_global(arguments.values + thread_index()));
    cta_sync();
    if (warpgroup == 0) {
        registers_decrease<24>();
        return;
    }
    registers_increase<240>();
    const int me = warpgroup - 1;
    if (me == 1) named_barrier_arrive(1, 256);  // warpgroup 1 goes first
    for (int turn = 0; turn < arguments.turns; turn++) {
        named_barrier_sync(1 + me, 256);
        if (thread_index() % 128 == 0) {
            const uint32_t at = load_shared_u32(position);
            store_global(arguments.log + at, warpgroup);
            store_shared_u32(position, at + 1);
        }
        if (!(me == 1 && turn == arguments.turns - 1)) named_barrier_arrive(1 + (me ^ 1), 256);
    }
    float live[kLive];
    const int thread = thread_index() - 128;
#pragma unroll
    for (int i = 0; i < kLive; i++) live[i] = load_shared_f32(values + 4 * i);
    named_barrier_sync(3, 256);
    const float factor = load_shared_f32(values + 4 * (thread % kLive));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kLive; i++) sum += factor * live[i];
    store_global(arguments.sums + thread, sum);
}

// ---- semaphore: CTAs add to one line in the order of their tickets, so that the rounding is always the same
constexpr int kSemaphoreFloats = 256;
struct SemaphoreArguments {
    const float* terms;  // [CTAs, 256]
    float* sum;          // [256]
    int* ticket;
    int* counter;
};

AADKERN_KERNEL(64) semaphore(AADKERN_GRID_CONSTANT SemaphoreArguments arguments) {
    const SharedAddress line = aligned_base(), slot = line + 4 * kSemaphoreFloats;
    if (thread_index() == 0) store_shared_u32(slot, uint32_t(atomic_add_global(arguments.ticket, 1)));
    cta_sync();
    const int ticket = int(load_shared_u32(slot));
    for (int i = thread_index(); i < kSemaphoreFloats; i += 64)
        store_shared_f32(line + 4 * i, load_global(arguments.terms + ticket * kSemaphoreFloats + i));
    fence_proxy_async();
    cta_sync();
    if (thread_index() == 0) {
        semaphore_wait(arguments.counter, ticket);
        fence_proxy_async_global();
        bulk_reduce_add_f32(arguments.sum, line, 4 * kSemaphoreFloats);
        bulk_commit();
        bulk_wait<0>();
        semaphore_add(arguments.counter, 1);
    }
}

}  // namespace aadkern::primitive_checks
