// The one include of a Hopper kernel: what each primitive means, said once. Two halves give it a body:
//   device/*.cuh  inline PTX for sm_90a, one instruction a function;
//   model/*.h     a functional model, one fiber for each CUDA thread, which also looks for races and deadlocks.
// A kernel that includes nothing else and touches shared and global memory only through these functions therefore runs in
// the tests of a machine without a GPU. Kernels are written as
//     template <...> AADKERN_KERNEL(threads) name(AADKERN_GRID_CONSTANT Arguments arguments) { ... }
// PTX sections are those of the PTX ISA 9.x.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda.h>
#include <cuda_runtime.h>
#define AADKERN_DEVICE __device__ __forceinline__
#define AADKERN_PRIMITIVE __device__ __forceinline__
#define AADKERN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define AADKERN_GRID_CONSTANT const __grid_constant__
#define AADKERN_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(AADKERN_HOST_MODEL)
#include <cmath>
#define AADKERN_DEVICE inline
#define AADKERN_PRIMITIVE
#define AADKERN_KERNEL(threads) inline void
#define AADKERN_GRID_CONSTANT const
#define AADKERN_HOST_DEVICE inline
#else
#error "compile kernels with nvcc for sm_90a, or with -DAADKERN_HOST_MODEL against the host model"
#endif

// AADKERN_DEVICE is for a kernel's own helpers; AADKERN_PRIMITIVE marks what is declared below and defined in both halves.

#include "primitives/tensor_map.h"

namespace aadkern {

// ---- types

// Bits of a 16-bit float; they choose the instruction (`wgmma`, `pack`), arithmetic is in float.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct alignas(16) Word4 {
    uint32_t x, y, z, w;
};
struct alignas(8) Float2 {
    float x, y;
};
// A byte address in the 32-bit window of shared memory.
using SharedAddress = uint32_t;
// Which dimension of a wgmma operand is contiguous in shared memory: K (rows of Q, K), or M/N (V in P V).
enum class Major : int { K = 0, MN = 1 };
// L2 eviction priority of what TMA loads or adds to, in the encoding of createpolicy that CUTLASS's TMA::CacheHintSm90 uses too.
enum class L2Hint : uint64_t {
    Normal = 0x1000000000000000,
    EvictFirst = 0x12F0000000000000,
    EvictLast = 0x14F0000000000000,
};

// ---- where am I

// CTAs have one dimension of threads. `warp_index` and `warpgroup_index` are warp-uniform for the compiler (a shuffle).
AADKERN_PRIMITIVE int thread_index();
AADKERN_PRIMITIVE int lane_index();
AADKERN_PRIMITIVE int warp_index();
AADKERN_PRIMITIVE int warpgroup_index();
AADKERN_PRIMITIVE int block_index_x();
AADKERN_PRIMITIVE int block_index_y();
AADKERN_PRIMITIVE int block_index_z();
AADKERN_PRIMITIVE int grid_size_x();
AADKERN_PRIMITIVE int grid_size_y();
AADKERN_PRIMITIVE int grid_size_z();

// ---- within a CTA and a warp

// Barrier 0 over all threads of the CTA; orders their shared-memory accesses. No thread may have left the kernel.
AADKERN_PRIMITIVE void cta_sync();
// All 32 lanes; orders their shared-memory accesses.
AADKERN_PRIMITIVE void warp_sync();
// True in one lane of a converged warp, the same one at each call of a launch (csrc/primitive_checks asks a GPU).
AADKERN_PRIMITIVE bool elect_one();
// All 32 lanes take part in the following. A shuffle moves values and orders no memory.
AADKERN_PRIMITIVE float shuffle_xor(float value, int lane_mask);
AADKERN_PRIMITIVE float shuffle(float value, int source_lane);
AADKERN_PRIMITIVE uint32_t shuffle_xor(uint32_t value, int lane_mask);
AADKERN_PRIMITIVE uint32_t shuffle(uint32_t value, int source_lane);
// Lane 0's value in every lane, so that branches on it are uniform.
AADKERN_PRIMITIVE int warp_uniform(int value);

// ---- numbers

// 2^x to about 2 ulp, subnormal results to 0 (ex2.approx.ftz.f32); 0 at -inf.
AADKERN_PRIMITIVE float exp2_approx(float x);
// log2(x) (lg2.approx.ftz.f32); -inf at 0.
AADKERN_PRIMITIVE float log2_approx(float x);
// Two floats rounded to nearest even into one register, `low` in bits 0-15.
template <class T> AADKERN_PRIMITIVE uint32_t pack(float low, float high);
template <class T> AADKERN_PRIMITIVE float unpack_low(uint32_t packed);
template <class T> AADKERN_PRIMITIVE float unpack_high(uint32_t packed);

// ---- global memory

// T is a plain type of 2, 4, 8 or 16 bytes, aligned to its size.
template <class T> AADKERN_PRIMITIVE T load_global(const T* source);
template <class T> AADKERN_PRIMITIVE void store_global(T* target, T value);
// *counter += value, returns what was there; relaxed, GPU scope. A ticket: CTAs that take their work by it start it in order.
AADKERN_PRIMITIVE int atomic_add_global(int* counter, int value);
// A counter that orders CTAs, by one thread of each. wait: until *counter == value (ld.acquire.gpu, spinning).
// add: makes what this thread knows of visible, then *counter += value (red.release.gpu). Bulk stores and reductions must
// have ended (`bulk_wait`, not `bulk_wait_read`) before `add`, and `fence_proxy_async_global` stands between `wait` and a
// bulk operation on the same global memory. A CTA may wait only for CTAs of a smaller linear index (x fastest, then y, z),
// or smaller ticket: the model keeps `resident_ctas` alive at once and starts them in that order, as the hardware does
// though it does not promise it, and reports everything else as a deadlock.
AADKERN_PRIMITIVE void semaphore_wait(const int* counter, int value);
AADKERN_PRIMITIVE void semaphore_add(int* counter, int value);

// ---- shared memory

// Start of the CTA's dynamic shared memory: 16-byte aligned and no better, so a kernel that wants 1024-byte alignment asks
// for 1024 bytes more and rounds up. The model shifts it from seed to seed. Nothing is initialised.
AADKERN_PRIMITIVE SharedAddress shared_base();
AADKERN_PRIMITIVE uint32_t load_shared_u32(SharedAddress source);
AADKERN_PRIMITIVE float load_shared_f32(SharedAddress source);
AADKERN_PRIMITIVE Float2 load_shared_f32x2(SharedAddress source);
AADKERN_PRIMITIVE Word4 load_shared_v4(SharedAddress source);
AADKERN_PRIMITIVE void store_shared_u32(SharedAddress target, uint32_t value);
AADKERN_PRIMITIVE void store_shared_f32(SharedAddress target, float value);
AADKERN_PRIMITIVE void store_shared_f32x2(SharedAddress target, Float2 value);
AADKERN_PRIMITIVE void store_shared_v4(SharedAddress target, Word4 value);
// Four 8x8 matrices of 16-bit elements. Lane 8i + r holds the address of row r (16 bytes, aligned to 16) of matrix i.
// Register i of lane t is elements (t / 4, 2 (t % 4)) and (.., + 1) of matrix i; transposed: (2 (t % 4), t / 4), (+ 1, ..).
// All 32 lanes; generic proxy, so `fence_proxy_async` and a barrier stand between it and wgmma or TMA.
AADKERN_PRIMITIVE void store_matrix_x4(SharedAddress row, const uint32_t (&value)[4]);
AADKERN_PRIMITIVE void store_matrix_x4_transposed(SharedAddress row, const uint32_t (&value)[4]);
AADKERN_PRIMITIVE void load_matrix_x4(SharedAddress row, uint32_t (&value)[4]);
AADKERN_PRIMITIVE void load_matrix_x4_transposed(SharedAddress row, uint32_t (&value)[4]);

// ---- proxies

// Generic writes to shared memory (store_shared_*, store_matrix_*) that this thread made, or knows of through a barrier, become
// visible to TMA and wgmma (fence.proxy.async.shared::cta). The writers fence, then a barrier, then the reader issues.
AADKERN_PRIMITIVE void fence_proxy_async();
// The same for global memory: before a bulk operation on what generic code or another CTA wrote (fence.proxy.async.global).
AADKERN_PRIMITIVE void fence_proxy_async_global();

// ---- mbarriers

// 8 bytes of shared memory, 8-byte aligned, a place that nothing else uses.
// A phase completes when `count` arrivals came and the bytes expected were written; then the next phase begins.
// Phase 0 has parity 0. `mbarrier_wait(b, p)` returns once the phase of parity p is complete, that is, while the current phase has
// the other parity: a fresh mbarrier lets a wait on parity 1 pass (that is how a producer starts), and nobody may be two
// phases behind. PTX 9.7.13.15.
AADKERN_PRIMITIVE void mbarrier_init(SharedAddress mbarrier, int count);
// After the inits by the thread that made them, before the barrier that lets the others see them (fence.mbarrier_init).
AADKERN_PRIMITIVE void fence_mbarrier_init();
AADKERN_PRIMITIVE void mbarrier_arrive(SharedAddress mbarrier);
// One arrival that also adds `bytes` to what the phase waits for; at most 2^20 - 1 pending.
AADKERN_PRIMITIVE void mbarrier_arrive_expect_tx(SharedAddress mbarrier, int bytes);
// Has the phase of this parity completed? Acquires if so. The wait spins on it.
AADKERN_PRIMITIVE bool mbarrier_test(SharedAddress mbarrier, int parity);
AADKERN_PRIMITIVE void mbarrier_wait(SharedAddress mbarrier, int parity);

// ---- TMA and bulk copies: one thread issues

AADKERN_PRIMITIVE void tma_prefetch_descriptor(const TensorMap* map);
// The map's box at element coordinates (c0 innermost) into shared memory, swizzled as the map says. Elements outside the tensor
// (negative coordinates too) become 0, and the full box counts towards the mbarrier's bytes. `target`: 128-byte aligned, and
// 1024-byte aligned for the 128-byte swizzle.
AADKERN_PRIMITIVE void tma_load_4d(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int c0, int c1, int c2,
                                   int c3);
AADKERN_PRIMITIVE void tma_load_4d(SharedAddress target, const TensorMap* map, SharedAddress mbarrier, int c0, int c1, int c2,
                                   int c3, L2Hint hint);
// Shared memory to the tensor; elements outside it are dropped. Bulk group.
AADKERN_PRIMITIVE void tma_store_4d(const TensorMap* map, SharedAddress source, int c0, int c1, int c2, int c3);
// tensor += box, element by element, atomically at L2, in no order (fp32 maps). Bulk group.
AADKERN_PRIMITIVE void tma_reduce_add_4d(const TensorMap* map, SharedAddress source, int c0, int c1, int c2, int c3);
// Contiguous bytes; both addresses and the size multiples of 16, nothing is checked against a tensor's end.
AADKERN_PRIMITIVE void bulk_load(SharedAddress target, const void* source, int bytes, SharedAddress mbarrier);
AADKERN_PRIMITIVE void bulk_store(void* target, SharedAddress source, int bytes);
AADKERN_PRIMITIVE void bulk_reduce_add_f32(float* target, SharedAddress source, int bytes);
AADKERN_PRIMITIVE void bulk_reduce_add_f32(float* target, SharedAddress source, int bytes, L2Hint hint);
// Stores and reductions of this thread since its last commit become one group.
AADKERN_PRIMITIVE void bulk_commit();
// Until at most N groups of this thread still read shared memory (its source may then be overwritten, or the thread may exit).
template <int N> AADKERN_PRIMITIVE void bulk_wait_read();
// Until at most N groups of this thread are unfinished: the others' writes are visible to this thread.
template <int N> AADKERN_PRIMITIVE void bulk_wait();

// ---- named barriers

// Ids 1 to 15 (0 is cta_sync), `threads` a multiple of 32, all of a warp together. sync waits for `threads` arrivals in all, its
// own warp's included; arrive does not wait. Both order memory for those who sync.
AADKERN_PRIMITIVE void named_barrier_sync(int id, int threads);
AADKERN_PRIMITIVE void named_barrier_arrive(int id, int threads);

// ---- registers

// setmaxnreg, R in 24, 32 .. 256, by all threads of a warpgroup. `increase` waits until the CTA's pool has enough; those who need
// less `decrease` first.
template <int R> AADKERN_PRIMITIVE void registers_increase();
template <int R> AADKERN_PRIMITIVE void registers_decrease();

// ---- wgmma

// D (64 x N, fp32, registers) = A (64 x 16) B (16 x N) + D, by all 128 threads of a warpgroup, asynchronously. PTX 9.7.15.5.
// T is BFloat16 or Float16; N is 32, 64, 128 or, with A in shared memory, 80 and 176 (of the array's size: N / 2 floats a thread). A comes
// from shared memory (descriptor) or from registers (4 a thread), B from shared memory. `accumulate` false ignores D's old value.
// With row(h) = 16 (t / 32) + (t % 32) / 4 + 8 h for thread t of the warpgroup:
//   element i of D: row((i >> 1) & 1), column 8 (i >> 2) + 2 (t % 4) + (i & 1);
//   register q of A: row(q & 1), the pair of columns 2 (t % 4) + 8 (q >> 1) and + 1.
// So A's registers 4k .. 4k + 3 for columns 16k .. 16k + 15 are pack(D[8k + 2q], D[8k + 2q + 1]), q = 0 .. 3: no shuffle.
template <class T, Major MajorA, Major MajorB, int Size>
AADKERN_PRIMITIVE void wgmma(float (&d)[Size], uint64_t a, uint64_t b, bool accumulate);
template <class T, Major MajorB, int Size>
AADKERN_PRIMITIVE void wgmma(float (&d)[Size], const uint32_t* a, uint64_t b, bool accumulate);
// Before the first wgmma, and whenever registers that a wgmma uses were touched since (an accumulator chain needs it once).
AADKERN_PRIMITIVE void wgmma_fence();
AADKERN_PRIMITIVE void wgmma_commit();
// Until at most N committed groups are in flight. Only then may their D, A registers and shared memory be touched.
template <int N> AADKERN_PRIMITIVE void wgmma_wait();
// Tells the compiler that these registers change here: after a wait, so that no use of D moves above it.
template <int Size> AADKERN_PRIMITIVE void keep(float (&registers)[Size]);
template <int Size> AADKERN_PRIMITIVE void keep(uint32_t (&registers)[Size]);

// ---- layout of operands in shared memory: plain arithmetic, the same on both halves

// 128-byte swizzle of a byte address inside a pattern that starts on a 1024-byte boundary: what TMA and wgmma do to 16-byte units.
AADKERN_HOST_DEVICE SharedAddress swizzle_128(SharedAddress address) { return address ^ (((address >> 7) & 7) << 4); }

// Descriptor of a wgmma operand with the 128-byte swizzle (PTX 9.7.15.5.1.2.2), from a tile that TMA wrote as rows of 128 bytes
// (64 elements: a "panel"; a tile of D = 128 is two panels, one after the other).
// Major::K  (rows are M or N, K runs along the row): stride = 1024 (8 rows), leading is ignored; the next k16 step starts 32 bytes
//           further, after four of them in the next panel.
// Major::MN (rows are K, M or N runs along the row): stride = 1024 (8 rows), leading = bytes from panel to panel; the next k16 step
//           starts 2048 bytes further.
AADKERN_HOST_DEVICE uint64_t matrix_descriptor_128(SharedAddress start, uint32_t leading_bytes, uint32_t stride_bytes = 1024) {
    const auto field = [](uint32_t bytes) { return uint64_t((bytes & 0x3FFFF) >> 4); };
    return field(start) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | uint64_t(1) << 62;
}

}  // namespace aadkern

#if defined(__CUDACC__)
#include "primitives/device/basics.cuh"
#include "primitives/device/copies.cuh"
#include "primitives/device/memory.cuh"
#include "primitives/device/synchronisation.cuh"
#include "primitives/device/wgmma.cuh"
#else
#include "primitives/model/primitives.h"
#endif
