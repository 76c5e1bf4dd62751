"""Faults planted in copies of the forward kernels: each must show on the host model, as a wrong result or by name.

This is what the model's verdict on the kernels as they are is worth. Few run by default; `make test-all` plants them all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from aadkern.plans import AttentionPlan
from aadkern.testing import make_inputs
from tests.sm90.hopper_forward import PERSISTENT, PING_PONG, SIMPLE, WIDE, assert_right, run_forward
from tests.sm90.hopper_host import SOURCES, Fault, build, schedules, without

KERNEL, PARTS, TILES = "attention/sm90/forward.cuh", "attention/sm90/forward_parts.cuh", "attention/sm90/tiles.cuh"
SIMPLE_KERNEL = "attention/sm90/forward_simple.cuh"
# More tiles than stages, tails that meet the same stage twice, no tail, few keys; runs that end inside a tile.
PLAN = AttentionPlan.from_ranges(
    330,
    900,
    [
        ((0, 136), [(1, 130), (140, 400), (410, 500), (501, 891)]),
        ((136, 200), [(140, 396)]),
        ((200, 330), [(501, 530)]),
    ],
)
UNSEEN = [0, *range(130, 140), *range(400, 410), 500, *range(891, 900)]


class Planted(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    shows: str  # the kind of report, or "wrong" for a wrong result
    kernel: int = PING_PONG


WAIT_FOR_EMPTY_K = "        mbarrier_wait(shared.k_empty(at.stage), at.parity ^ 1);\n"
WAIT_FOR_EMPTY_V = "        mbarrier_wait(shared.v_empty(at.stage), at.parity ^ 1);\n"
COUNT_K = "        store_shared_u32(shared.key_count(at.stage), uint32_t(tile.count));\n"
EXPECT_K = "        mbarrier_arrive_expect_tx(full, Shared::tile_bytes);\n"
LOOP_QK_DONE = """            wgmma_wait<1>();
            keep(s);
            release(shared.k_empty(k_at.stage));
"""
LOOP_PV_DONE = """            wgmma_wait<0>();
            keep(o);
            release(shared.v_empty(v_at.stage));
            v_at.advance();
            scale_rows(o, decay);
            pack_fragment<T>(p, s);
"""
LOOP_PV = """            mbarrier_wait(shared.v_full(v_at.stage), v_at.parity);
            wgmma_fence();"""
LOOP_QK = """            turns.take();
            wgmma_fence();
            multiply_q_k<T, HeadDim, Keys>(s, q, Shared::q_panel, shared.k(k_at.stage));
            wgmma_commit();
"""
WAY_OUT = "        named_barrier_sync(3 + consumer, 128);  // no warp's part of q k reads q any more\n"
WAIT_FOR_EMPTY_Q = "            mbarrier_wait(shared.q_empty(), q_parity);\n"
Q_RELEASED = "        release(shared.q_empty());\n"
Q_WAITED = "        mbarrier_wait(shared.q_full(), q_parity);\n        q_parity ^= 1;\n"
LAST_PV = """        wgmma_wait<0>();
        keep(o);
        release(shared.v_empty(v_at.stage));
        v_at.advance();
    }
"""
LAST_PV_EARLY = """        release(shared.v_empty(v_at.stage));
        wgmma_wait<0>();
        keep(o);
        v_at.advance();
    }
"""
LAST_V = """        keep(o);
        release(shared.v_empty(v_at.stage));
        v_at.advance();
    }
"""
K_LOADED = "                if (more) load_k(work, tiles, k_stage);\n"
K_LEFT = "                k_stage.advance();\n" + K_LOADED
CLEAR_WALK = """        Stage at;
        for_each_tile<Persistent>(parameters, [&](int tile) {
            for (KeyTiles<Keys> tiles(parameters.tables, forward"""
CLEAR_END = """                fence_proxy_async();
                warp_sync();
                if (lane_index() == 0) mbarrier_arrive"""
BASE = """    const ForwardShared<HeadDim, Keys> shared{(shared_base() + 1023) & ~1023u};
    if (thread_index() == 0) {
        tma_prefetch"""


FAULTS = [
    # what the producer waits for and says
    Planted("k loaded into a stage in use", KERNEL, WAIT_FOR_EMPTY_K, "", "race"),
    Planted("v loaded into a stage in use", KERNEL, WAIT_FOR_EMPTY_V, "", "race"),
    Planted("parity of empty k", KERNEL, WAIT_FOR_EMPTY_K, WAIT_FOR_EMPTY_K.replace(" ^ 1", ""), "deadlock"),
    Planted("half the bytes of k expected", KERNEL, EXPECT_K, EXPECT_K.replace("tile_bytes", "tile_bytes / 2"), "race"),
    Planted("twice the bytes of q expected", KERNEL, "q_full(), Shared::q_bytes);", "q_full(), 2 * Shared::q_bytes);", "deadlock"),
    Planted("key count after the arrival", KERNEL, COUNT_K + EXPECT_K, EXPECT_K + COUNT_K, "race"),
    Planted("v of the tile after", KERNEL, "load_v(work, v_start, v_count", "load_v(work, tiles.start, v_count", "wrong"),
    Planted(
        "head and batch exchanged",
        TILES,
        "first_row, work.head, work.batch, hint",
        "first_row, work.batch, work.head, hint",
        "wrong",
    ),
    Planted("tensor map without swizzle", "attention/sm90/maps.h", "Swizzle::Bytes128", "Swizzle::None", "swizzle"),
    # tails
    Planted(
        "tail's keys not masked",
        KERNEL,
        "            if (count < Keys) mask_tail(s, count);\n            softmax",
        "            softmax",
        "wrong",
    ),
    Planted("mask one key short", PARTS, "fragment_column(i, lane) >= count", "fragment_column(i, lane) > count", "wrong"),
    Planted("mask one key long", PARTS, "fragment_column(i, lane) >= count", "fragment_column(i, lane) >= count - 1", "wrong"),
    Planted(
        "tail of v not cleared",
        KERNEL,
        "clear_rows<HeadDim, Keys>(",
        "if (false) clear_rows<HeadDim, Keys>(",
        "wrong",
    ),
    Planted("clearing one row short", TILES, "end - (Rows - first) *", "end - (Rows - first - 1) *", "wrong"),
    Planted("clearing one row long", TILES, "end - (Rows - first) *", "end - (Rows - first + 1) *", "wrong"),
    Planted(
        "clearing one panel only",
        TILES,
        "panel < HeadDim / panel_columns; ++panel) {\n        const SharedAddress end",
        "panel < 1; ++panel) {\n        const SharedAddress end",
        "wrong",
    ),
    Planted(
        "no proxy fence after clearing", KERNEL, CLEAR_END, without(CLEAR_END, "                fence_proxy_async();\n"), "race"
    ),
    Planted("arrival before all lanes cleared", KERNEL, CLEAR_END, without(CLEAR_END, "                warp_sync();\n"), "race"),
    Planted(
        "tail of v told to be full at once",
        KERNEL,
        "? shared.v_full(at.stage) : shared.v_landed(at.stage)",
        "? shared.v_full(at.stage) : shared.v_full(at.stage)",
        "deadlock",
    ),
    Planted("landed's parity forgotten", KERNEL, "            parities ^= 1u << at.stage;\n", "", "race"),
    Planted(
        "tail counted twice",
        TILES,
        "if (tails) at = end - (end - at) % Keys;",
        "if (tails) at = end - (end - at) % Keys - 1;",
        "wrong",
    ),
    # what the consumers wait for
    Planted("q not waited for", KERNEL, "        mbarrier_wait(shared.q_full(), q_parity);\n", "", "race"),
    Planted("k not waited for", KERNEL, "        mbarrier_wait(shared.k_full(at.stage), at.parity);\n", "", "race"),
    Planted("v not waited for", KERNEL, LOOP_PV, "            wgmma_fence();", "race"),
    Planted("v's parity", KERNEL, LOOP_PV, LOOP_PV.replace("v_at.parity", "v_at.parity ^ 1"), "deadlock"),
    Planted(
        "k released before its product",
        KERNEL,
        LOOP_QK_DONE,
        "".join(LOOP_QK_DONE.splitlines(True)[i] for i in (2, 0, 1)),
        "race",
    ),
    Planted(
        "v released before its product",
        KERNEL,
        LOOP_PV_DONE,
        "".join(LOOP_PV_DONE.splitlines(True)[i] for i in (2, 0, 1, 3, 4, 5)),
        "race",
    ),
    Planted(
        "k released by one warp of four",
        KERNEL,
        "mbarrier_init(k_empty(stage), 4 *",
        "mbarrier_init(k_empty(stage), 1 *",
        "race",
    ),
    Planted(
        "p packed while it is read",
        KERNEL,
        LOOP_PV_DONE,
        "".join(LOOP_PV_DONE.splitlines(True)[i] for i in (5, 0, 1, 2, 3, 4)),
        "wgmma",
    ),
    Planted("s read before it is there", KERNEL, LOOP_QK_DONE, LOOP_QK_DONE.replace("<1>", "<2>"), "wgmma"),
    Planted("no fence before the products", KERNEL, LOOP_QK, without(LOOP_QK, "            wgmma_fence();\n"), "wgmma"),
    Planted("no commit after q k", KERNEL, LOOP_QK, without(LOOP_QK, "            wgmma_commit();\n"), "wgmma"),
    # turns, registers, start and end
    Planted("nobody begins", KERNEL, "        turns.begin();\n", "", "deadlock"),
    Planted("a turn passed to nobody", KERNEL, "        turns.end();\n", "", "exit"),
    Planted("turn not passed", KERNEL, "            turns.pass();\n", "", "deadlock"),
    Planted(
        "producer keeps too many registers",
        KERNEL,
        "registers_decrease<Persistent ? 32 : 24>",
        "registers_decrease<40>",
        "deadlock",
    ),
    Planted("barriers not yet there", KERNEL, "    cta_sync();\n    if (warpgroup_index", "    if (warpgroup_index", "mbarrier"),
    Planted("initialised barriers not fenced", KERNEL, "        fence_mbarrier_init();\n", "", "race"),
    Planted(
        "shared memory not aligned", KERNEL, BASE, BASE.replace("(shared_base() + 1023) & ~1023u", "shared_base()"), "alignment"
    ),
    Planted("q's rows written while another warp's product reads them", KERNEL, WAY_OUT, "", "race"),
    Planted("rows of the next run written", TILES, "if (row < count) store_global", "store_global", "global"),
    Planted("lse of the next run written", PARTS, "lane_index() % 4 == 0 && own < count", "lane_index() % 4 == 0", "global"),
    # arithmetic
    Planted("k's step in a row", PARTS, "step % 4 * 32", "step % 4 * 16", "wrong"),
    Planted("k's panels", PARTS, "panel * k_panel + inside", "inside", "wrong"),
    Planted("v's panels", PARTS, "matrix_descriptor_128(v, Keys * panel_row_bytes)", "matrix_descriptor_128(v, 1024)", "wrong"),
    Planted("v's major dimension", PARTS, "wgmma<T, Major::MN>(o", "wgmma<T, Major::K>(o", "wrong"),
    Planted("s not started anew", PARTS, "step != 0)", "true)", "wrong"),
    Planted(
        "p's pairs exchanged",
        TILES,
        "pack<T>(fragment[2 * i], fragment[2 * i + 1])",
        "pack<T>(fragment[2 * i + 1], fragment[2 * i])",
        "wrong",
    ),
    Planted("rows of a fragment", TILES, "return (i >> 1) & 1;", "return i & 1;", "wrong"),
    Planted("output not rescaled", KERNEL, "            scale_rows(o, decay);\n", "", "wrong"),
    Planted("sum not rescaled", PARTS, "            sum[row] *= decay[row];\n", "", "wrong"),
    Planted(
        "largest of half the quad",
        PARTS,
        "            largest[row] = fmaxf(largest[row], shuffle_xor(largest[row], 2));\n",
        "",
        "wrong",
    ),
    Planted("sum of half the quad", PARTS, "            total += shuffle_xor(total, 2);\n", "", "wrong"),
    Planted("no guard for -inf", PARTS, "above == minus_infinity() ? 0.f : above;", "above;", "wrong"),
    Planted(
        "scores in base e",
        "attention/sm90/forward_parameters.h",
        "arguments.scale * 1.44269504088896340736f",
        "arguments.scale",
        "wrong",
    ),
    # from tile to tile
    *(
        fault._replace(kernel=PERSISTENT)
        for fault in (
            Planted("persistent: q loaded while it is read", KERNEL, WAIT_FOR_EMPTY_Q, "", "race"),
            Planted("persistent: parity of empty q", KERNEL, "int q_parity = 1;", "int q_parity = 0;", "deadlock"),
            Planted("persistent: q never released", KERNEL, Q_RELEASED, "", "deadlock"),
            Planted("persistent: q released before its product", KERNEL, Q_WAITED, Q_WAITED + Q_RELEASED, "race"),
            Planted("persistent: q released by one warp", KERNEL, "init(q_empty(), 4 * consumers)", "init(q_empty(), 1)", "race"),
            Planted("persistent: q of the tile before", KERNEL, Q_WAITED, without(Q_WAITED, "        q_parity ^= 1;\n"), "race"),
            Planted(
                "persistent: last v never released",
                KERNEL,
                LAST_V,
                without(LAST_V, "        release(shared.v_empty(v_at.stage));\n"),
                "deadlock",
            ),
            Planted("persistent: v's stage stays", KERNEL, LAST_V, without(LAST_V, "        v_at.advance();\n"), "race"),
            Planted("persistent: last v released before its product", KERNEL, LAST_PV, LAST_PV_EARLY, "race"),
            Planted(
                "persistent: k's stage stays", KERNEL, K_LEFT, "                if (more) k_stage.advance();\n" + K_LOADED, "race"
            ),
            Planted(
                "persistent: clearing begins anew",
                KERNEL,
                CLEAR_WALK,
                CLEAR_WALK.replace("        Stage at;\n", "").replace("tile) {\n", "tile) {\n            Stage at;\n"),
                "deadlock",
            ),
            Planted("persistent: turns begun in each tile", KERNEL, "{ run(tile); }", "{ turns.begin(); run(tile); }", "deadlock"),
            Planted("persistent: tiles left out", KERNEL, "tile += grid_size_x();", "tile += 2 * grid_size_x();", "wrong"),
            Planted("persistent: tiles done twice", KERNEL, "tile += grid_size_x();", "tile += 1;", "global"),
            Planted("persistent: last tile left out", KERNEL, "Persistent && tile < all", "Persistent && tile < all - 1", "wrong"),
            Planted(
                "persistent: pieces of half a quad", PARTS, "distance < 4; distance *= 2", "distance < 2; distance *= 2", "wrong"
            ),
            Planted(
                "persistent: pieces to the wrong lane",
                PARTS,
                "upper ? low : high, distance",
                "upper ? high : low, distance",
                "wrong",
            ),
            Planted("persistent: rows of the next run written", PARTS, "if (row < count) store_global", "store_global", "global"),
        )
    ),
    # the simple kernel
    Planted("simple: no proxy fence after clearing", SIMPLE_KERNEL, "            fence_proxy_async();\n", "", "race", SIMPLE),
    Planted(
        "simple: k loaded while it is read",
        SIMPLE_KERNEL,
        "        cta_sync();  // all are done with k and v\n",
        "",
        "race",
        SIMPLE,
    ),
    Planted("simple: parity", SIMPLE_KERNEL, "tiles.next(); parity ^= 1)", "tiles.next(); parity ^= 0)", "race", SIMPLE),
]
DAILY = {
    "v loaded into a stage in use",
    "no proxy fence after clearing",
    "tail of v not cleared",
    "turn not passed",
    "lse of the next run written",
}


@pytest.fixture(scope="module")
def inputs():
    """Keys that no query sees are NaN. The scores of query 3 with its whole first tile overflow to -inf."""
    q, k, v = make_inputs(PLAN, 2, 128, torch.bfloat16, seed=11)
    k[:, UNSEEN], v[:, UNSEEN] = math.nan, math.nan
    q[..., 0], k[..., 0] = 0.0, 0.0
    q[:, 3, :, 0], k[:, 1:130, :, 0] = -1e20, 1e20
    return q, k, v


def symptoms(library, inputs, kernel, wanted=None):
    """The kinds of error reported, and "wrong", in several orders of events, or until the wanted one is among them."""
    found = set()
    for options in schedules(6):
        result = run_forward(library, *inputs, PLAN, 128**-0.5, kernel, options=options)
        found |= set(result.report.kinds)
        try:
            assert_right(result, *inputs, PLAN, 128**-0.5)
        except AssertionError:
            found.add("wrong")
        if wanted in found:
            break
    return found


def test_every_fault_has_its_place():
    """The ordinary run plants few, but must notice when a kernel has moved on from the others."""
    counts = {fault.name: (SOURCES / fault.file).read_text().count(fault.old) for fault in FAULTS}
    assert set(counts.values()) == {1}, {name: count for name, count in counts.items() if count != 1}
    assert len(counts) == len(FAULTS) and set(counts) >= DAILY


@pytest.mark.parametrize("kernel", [SIMPLE, PING_PONG, WIDE, PERSISTENT])
def test_without_a_fault_there_is_no_symptom(inputs, kernel):
    assert symptoms(build("forward"), inputs, kernel) == set()


@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name, marks=() if f.name in DAILY else pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_shows(inputs, fault):
    library = build("forward", [Fault(fault.file, fault.old, fault.new)], optimise="-O1")
    assert fault.shows in symptoms(library, inputs, fault.kernel, fault.shows)
