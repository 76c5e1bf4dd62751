"""Faults to plant in the kernels of csrc/primitive_checks, and what the host model must report of each."""

from __future__ import annotations

from dataclasses import dataclass

KERNELS, WGMMA, ENTRIES = "primitive_checks/checks.cuh", "primitive_checks/wgmma.cuh", "primitive_checks/entries.h"


@dataclass(frozen=True)
class Planted:
    """A fault, the check that must show it, and what must be reported in at least one schedule: a kind, or "wrong" results."""

    name: str
    check: str
    kinds: str
    file: str
    old: str
    new: str
    resident_ctas: int = 1


RING_WAIT_FULL = "mbarrier_wait(full + 8 * stage, use & 1);"
RING_RELEASE = "            warp_sync();\n            if (lane_index() == 0) mbarrier_arrive(empty + 8 * stage);\n"
RING_READ = "            sum += float(round + 1) * load_shared_f32(data + stage * bytes + 4 * i);\n"
REDUCE_FENCE = "    fence_proxy_async();\n    cta_sync();\n    if (warp_index() == 0 && elect_one()) {\n        tma_reduce_add_4d"
REDUCE_COMMIT = "        bulk_commit();\n        bulk_wait_read<0>();\n    }\n}\n\n// ---- turns"
WGMMA_END = "    wgmma_commit();\n    wgmma_wait<0>();\n"
WGMMA_KIND = "wgmma-bf16-K-MN-128"

FAULTS = (
    Planted("producer waits for the wrong parity", "ring", "deadlock", KERNELS, "(use & 1) ^ 1)", "use & 1)"),
    Planted("producer does not wait", "ring", "race", KERNELS, "mbarrier_wait(empty + 8 * stage, (use & 1) ^ 1);", ""),
    Planted(
        "consumer waits for the wrong parity",
        "ring",
        "race",
        KERNELS,
        RING_WAIT_FULL,
        RING_WAIT_FULL.replace("use & 1", "(use & 1) ^ 1"),
    ),
    Planted("consumer does not wait", "ring", "race", KERNELS, RING_WAIT_FULL, ""),
    Planted("release before the read", "ring", "race", KERNELS, RING_READ + RING_RELEASE, RING_RELEASE + RING_READ),
    Planted(
        "lane 0 releases for lanes that still read", "ring", "race", KERNELS, RING_RELEASE, RING_RELEASE.replace("warp_sync();", "")
    ),
    Planted(
        "too many releases expected",
        "ring",
        "deadlock",
        KERNELS,
        "mbarrier_init(empty + 8 * stage, 3);",
        "mbarrier_init(empty + 8 * stage, 4);",
    ),
    Planted(
        "too few releases expected",
        "ring",
        "race mbarrier",
        KERNELS,
        "mbarrier_init(empty + 8 * stage, 3);",
        "mbarrier_init(empty + 8 * stage, 2);",
    ),
    Planted(
        "more bytes expected than come",
        "ring",
        "deadlock",
        KERNELS,
        "mbarrier_arrive_expect_tx(full + 8 * stage, bytes);",
        "mbarrier_arrive_expect_tx(full + 8 * stage, 2 * bytes);",
    ),
    Planted(
        "bytes never expected",
        "ring",
        "race mbarrier",
        KERNELS,
        "mbarrier_arrive_expect_tx(full + 8 * stage, bytes);",
        "mbarrier_arrive(full + 8 * stage);",
    ),
    Planted(
        "inits not fenced for TMA",
        "ring",
        "race",
        KERNELS,
        "            mbarrier_init(empty + 8 * stage, 3);\n        }\n        fence_mbarrier_init();",
        "            mbarrier_init(empty + 8 * stage, 3);\n        }\n",
    ),
    Planted(
        "no barrier after the inits",
        "ring",
        "race mbarrier",
        KERNELS,
        "    }\n    cta_sync();\n    if (warp == 0) {\n        if (elect_one()) {\n            for (int round",
        "    }\n    if (warp == 0) {\n        if (elect_one()) {\n            for (int round",
    ),
    Planted(
        "bulk load to 8-byte alignment",
        "ring",
        "alignment",
        KERNELS,
        "data = full + 128;\n    const int warp",
        "data = full + 136;\n    const int warp",
    ),
    Planted(
        "generic writes not fenced for TMA",
        "reduce",
        "race",
        KERNELS,
        REDUCE_FENCE,
        REDUCE_FENCE.replace("    fence_proxy_async();\n", "", 1),
    ),
    Planted(
        "no barrier before the store", "reduce", "race", KERNELS, REDUCE_FENCE, REDUCE_FENCE.replace("    cta_sync();\n", "", 1)
    ),
    Planted("store not committed", "reduce", "exit", KERNELS, REDUCE_COMMIT, REDUCE_COMMIT.replace("bulk_commit();", "")),
    Planted(
        "exit while a store reads", "reduce", "exit", KERNELS, REDUCE_COMMIT, REDUCE_COMMIT.replace("bulk_wait_read<0>();", "")
    ),
    Planted(
        "tile written without its swizzle",
        "reduce",
        "wrong",
        KERNELS,
        "store_shared_f32(swizzle_128(box + 4 * i), term);",
        "store_shared_f32(box + 4 * i, term);",
    ),
    Planted(
        "shared memory taken as aligned",
        "reduce",
        "alignment",
        KERNELS,
        "return (shared_base() + 1023) & ~1023u;",
        "return shared_base();",
    ),
    Planted(
        "shared memory past its end",
        "reduce",
        "bounds",
        ENTRIES,
        "machine.run(reduce, ctas, 128, 1024 + 8 * int(count), arguments);",
        "machine.run(reduce, ctas, 128, 8 * int(count), arguments);",
    ),
    Planted(
        "barrier counts one warpgroup",
        "turns",
        "race wrong",
        KERNELS,
        "named_barrier_sync(1 + me, 256);",
        "named_barrier_sync(1 + me, 128);",
    ),
    Planted(
        "turn not passed on",
        "turns",
        "deadlock",
        KERNELS,
        "if (!(me == 1 && turn == arguments.turns - 1)) named",
        "if (!(me == 1 && turn == 1)) named",
    ),
    Planted(
        "turn passed on once too often", "turns", "exit", KERNELS, "if (!(me == 1 && turn == arguments.turns - 1)) named", "named"
    ),
    Planted(
        "one lane arrives for its warp",
        "turns",
        "collective deadlock",
        KERNELS,
        "if (me == 1) named_barrier_arrive(1, 256);",
        "if (me == 1 && lane_index() == 0) named_barrier_arrive(1, 256);",
    ),
    Planted("registers never given up", "turns", "deadlock", KERNELS, "registers_decrease<24>();", ""),
    Planted("too few registers given up", "turns", "deadlock", KERNELS, "registers_decrease<24>();", "registers_decrease<40>();"),
    Planted(
        "counter raised before the sum is written", "semaphore", "wrong", KERNELS, "bulk_wait<0>();", "bulk_wait_read<0>();", 4
    ),
    Planted(
        "waits for a CTA after it",
        "semaphore",
        "deadlock",
        KERNELS,
        "semaphore_wait(arguments.counter, ticket);",
        "semaphore_wait(arguments.counter, ticket + 1);",
        4,
    ),
    Planted(
        "elected by half a warp",
        "elect",
        "deadlock",
        KERNELS,
        "        if (elect_one()) {\n            store_global(arguments.lane",
        "        if (lane < 16 && elect_one()) {\n            store_global(arguments.lane",
    ),
    Planted(
        "matrix read before all lanes stored",
        "matrix",
        "race",
        KERNELS,
        "        warp_sync();\n        const Word4 words",
        "        const Word4 words",
    ),
    Planted("matrix row at 8 bytes", "matrix", "alignment", KERNELS, "row = base + 16 * lane;", "row = base + 16 * lane + 8;"),
    Planted("past the end of an array", "numbers", "global", KERNELS, "if (i >= count) return;", ""),
    Planted(
        "fewer bytes expected than come",
        WGMMA_KIND,
        "race exit",
        WGMMA,
        "mbarrier_arrive_expect_tx(mbarrier, bytes);",
        "mbarrier_arrive_expect_tx(mbarrier, b_bytes);",
    ),
    Planted("wgmma without its fence", WGMMA_KIND, "wgmma", WGMMA, "    wgmma_fence();\n", ""),
    Planted("D read before the wait", WGMMA_KIND, "exit", WGMMA, WGMMA_END, "    wgmma_commit();\n"),
    Planted("wait without a commit", WGMMA_KIND, "exit", WGMMA, WGMMA_END, "    wgmma_wait<0>();\n"),
    Planted("waits for all groups but the last", WGMMA_KIND, "exit", WGMMA, WGMMA_END, WGMMA_END.replace("<0>", "<1>")),
    Planted("D written in flight", WGMMA_KIND, "wgmma", WGMMA, WGMMA_END, WGMMA_END.replace(";\n", ";\n    d[3] = 1;\n", 1)),
    Planted(
        "A registers written in flight",
        "wgmma-fp16-registers-MN-64",
        "wgmma",
        WGMMA,
        WGMMA_END,
        WGMMA_END.replace(";\n", ";\n    registers[3] ^= 1;\n", 1),
    ),
    Planted(
        "steps of 8 columns", WGMMA_KIND, "wrong", WGMMA, "a + k / 4 * a_panel + k % 4 * 32", "a + k / 4 * a_panel + k % 4 * 16"
    ),
    Planted(
        "stride of four rows",
        WGMMA_KIND,
        "wrong",
        WGMMA,
        "k % 4 * 32, 0), operand_b, k != 0);",
        "k % 4 * 32, 0, 512), operand_b, k != 0);",
    ),
    Planted(
        "wrong panel stride", WGMMA_KIND, "wrong", WGMMA, "+ 2 * arguments.column, b_panel)", "+ 2 * arguments.column, b_panel / 2)"
    ),
    Planted(
        "B taken as K-major",
        "wgmma-bf16-K-MN-64",
        "wrong uninitialised",
        WGMMA,
        "wgmma<T, Major::K, MajorB>(d,",
        "wgmma<T, Major::K, Major::K>(d,",
    ),
    Planted(
        "old accumulator added",
        WGMMA_KIND,
        "wrong",
        WGMMA,
        "k % 4 * 32, 0), operand_b, k != 0);",
        "k % 4 * 32, 0), operand_b, true);",
    ),
    Planted(
        "tile loaded without the swizzle",
        WGMMA_KIND,
        "swizzle",
        ENTRIES,
        "return {base, type, Swizzle::Bytes128, {columns, rows, 1, 1}",
        "return {base, type, Swizzle::None, {columns, rows, 1, 1}",
    ),
)
