"""Faults planted in copies of the backward kernels: each must show on the host model, as a wrong result or by name.

This is what the model's verdict on the kernels as they are is worth. Few run by default; `make test-all` plants them all.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch

from aadkern.plans import AttentionPlan
from aadkern.testing import Results, assert_results_close, eager, exact, make_gradients, make_inputs
from tests.sm90.hopper_backward import run_backward
from tests.sm90.hopper_host import LAZY, RANDOM, SOURCES, Fault, Options, build, without

KERNEL, TILES, ROWS = "attention/sm90/backward.cuh", "attention/sm90/backward_tiles.cuh", "attention/sm90/backward_rows.cuh"
# More query tiles than stages, with a tail in both; key tiles with and without a tail, and one that nobody sees.
PLAN = AttentionPlan.from_ranges(
    330, 320, [((0, 200), [(0, 160), (170, 290)]), ((200, 240), [(0, 160)]), ((240, 315), [(170, 290)])]
)
UNSEEN = {"queries": slice(315, 330), "keys": [*range(160, 170), *range(290, 320)]}


class Planted(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    shows: str  # the kind of report, "wrong" for a wrong result, or "order" for one that depends on the order of events
    head_dim: int = 128
    queries: int | None = None


WAIT_EMPTY = "        mbarrier_wait(shared.empty(ring.stage), ring.parity ^ 1);\n"
ORDERED_WAIT = "                semaphore_wait(unpublished, query.rank);\n"
DS_BARRIER = "        named_barrier_sync(backward_all_consumers, Tile::consumer_threads);  // then,"
STORED_DS = "            store_packed(all_ds, Tile::key_panel, 64 * half, ds);\n        }\n        fence_proxy_async();\n"
CLEARED = "        fence_proxy_async();\n        named_barrier_sync(backward_all_consumers, Tile::consumer_threads);\n    }\n"
STORED_DQ = "        fence_proxy_async();\n        named_barrier_arrive(backward_dq_full"
DQ_EMPTY = "        named_barrier_sync(backward_dq_empty + half, backward_dq_threads);\n"
CLEAR_QUERIES = "        if (rows < Tile::queries) clear_both<Tile::queries>(shared.q(stage), shared.dout(stage), rows);\n"
CLEAR_KEYS = "        if (keys < Tile::keys) consumer.template clear_both<Tile::keys>(shared.k(), shared.v(), keys);\n"
OVERLAPPED = "        if (overlap && !first) release(stage ^ 1);\n"
AFTER_STEP = """            wgmma_wait<0>();
            keep(dk);
            keep(ds);
            release(stage);
"""
EARLY_RELEASE = """            release(stage);
            wgmma_wait<0>();
            keep(dk);
            keep(ds);
"""
FENCED_DV = """            wgmma_fence();
            add_product(dv, packed, shared.dout(stage));
            wgmma_wait<1>();"""
LATE_DV = """            wgmma_fence();
            add_product(dv, packed, shared.dout(stage));
        } else {"""
DQ_TURNED = """(panel * Tile::query_panel + inside) / 16,
                                              step != 0);"""
FAULTS = [
    # the pipeline of query tiles
    Planted("keys not waited for", KERNEL, "        mbarrier_wait(shared.keys_full(), 0);\n", "", "race"),
    Planted("queries not waited for", KERNEL, "        mbarrier_wait(shared.full(stage), ring.parity);\n", "", "race"),
    Planted("queries loaded into a stage in use", KERNEL, WAIT_EMPTY, "", "race"),
    Planted("parity of the producer", KERNEL, WAIT_EMPTY, WAIT_EMPTY.replace(" ^ 1", ""), "deadlock"),
    Planted("lse and delta not counted", KERNEL, "2 * Tile::query_tile + Tile::row_values);", "2 * Tile::query_tile);", "race"),
    Planted(
        "bytes of K alone counted",
        KERNEL,
        "(shared.keys_full(), 2 * Tile::key_tile)",
        "(shared.keys_full(), Tile::key_tile)",
        "race",
    ),
    Planted("released too early", KERNEL, OVERLAPPED, "        release(stage);\n", "race"),
    Planted("the first step releases too", KERNEL, OVERLAPPED, "        if (overlap) release(stage ^ 1);\n", "race"),
    Planted("never released", KERNEL, OVERLAPPED, "", "deadlock"),
    Planted(
        "released before dK is made",
        KERNEL,
        AFTER_STEP,
        EARLY_RELEASE,
        "race",
        64,
    ),
    Planted("arrivals of warpgroups expected, not of warps", KERNEL, "4 * Tile::consumers);", "Tile::consumers);", "race"),
    Planted("no barrier after the mbarriers are made", KERNEL, "    cta_sync();\n", "", "mbarrier"),
    Planted("no fence after the mbarriers are made", KERNEL, "        fence_mbarrier_init();\n", "", "race"),
    # products
    Planted("S used in flight", KERNEL, "wgmma_wait<1>();  // for S^T", "wgmma_wait<2>();  // for S^T", "wgmma"),
    Planted(
        "dP used in flight",
        KERNEL,
        "wgmma_wait<1>();  // for dP^T",
        "wgmma_wait<2>();  // for dP^T",
        "wrong",
    ),
    Planted("dQ used in flight", KERNEL, "wgmma_wait<1>();  // for dV and dQ", "wgmma_wait<2>();  // for dV and dQ", "wrong"),
    Planted("dK used in flight", KERNEL, "        if constexpr (overlap) wgmma_wait<0>();\n", "", "wrong"),
    Planted("no wgmma fence before dV", KERNEL, FENCED_DV, without(FENCED_DV, "            wgmma_fence();\n"), "wgmma"),
    Planted("first product not told from the others", KERNEL, "step != 0 || !first);", "true);", "wrong"),
    Planted("halves of dQ from the same columns", KERNEL, "half % Tile::head_panels * Tile::key_panel, 0)", "0, 0)", "wrong"),
    Planted("halves of dQ from the same queries", KERNEL, "half % Tile::query_panels * Tile::key_panel, 0)", "0, 0)", "wrong", 64),
    Planted(
        "panels of dO and Q overlap",
        KERNEL,
        "matrix_descriptor_128(queries, Tile::query_panel);",
        "matrix_descriptor_128(queries, 1024);",
        "wrong",
    ),
    # dS through shared memory
    Planted("no proxy fence after dS", KERNEL, STORED_DS, STORED_DS.replace("        fence_proxy_async();\n", ""), "race"),
    Planted("no barrier after dS", KERNEL, DS_BARRIER, "        //", "race"),
    Planted("one buffer of dS", KERNEL, "all_ds = shared.ds(stage);", "all_ds = shared.ds(0);", "race"),
    Planted(
        "dS not swizzled",
        TILES,
        "store_matrix_x4(swizzle_128(own + step / 4 * panel + step % 4 * 32), matrices);",
        "store_matrix_x4(own + step / 4 * panel + step % 4 * 32, matrices);",
        "wrong",
    ),
    # adding dQ
    Planted("no proxy fence after dQ", KERNEL, STORED_DQ, STORED_DQ.replace("        fence_proxy_async();\n", ""), "race"),
    Planted("dQ written over what is being added", KERNEL, "            bulk_wait_read<0>();\n", "", "race"),
    Planted("dQ's buffer not waited for", KERNEL, DQ_EMPTY, DQ_EMPTY.replace("sync", "arrive"), "race"),
    Planted(
        "the adding warp does not wait",
        KERNEL,
        "        named_barrier_sync(backward_dq_full + half",
        "        named_barrier_arrive(backward_dq_full + half",
        "race",
    ),
    Planted(
        "both halves to the same place",
        KERNEL,
        "* Tile::consumers + half;\n            if",
        "* Tile::consumers;\n            if",
        "wrong",
    ),
    # the deterministic order
    Planted("turn not waited for", KERNEL, ORDERED_WAIT, "", "order"),
    Planted("turn of another", KERNEL, "query.rank);", "query.rank + 1);", "deadlock"),
    Planted(
        "turn passed before the sums are there",
        KERNEL,
        "            bulk_wait<0>();\n            semaphore_add",
        "            semaphore_add",
        "order",
    ),
    Planted("turn never passed", KERNEL, "            semaphore_add(unpublished, 1);\n", "", "deadlock"),
    Planted("last turn not passed", KERNEL, "    });\n    publish();\n", "    });\n", "deadlock"),
    Planted(
        "last key tile first", KERNEL, "atomic_add_global(p.workspace.ticket, 1)", "grid_size_x() - 1 - block_index_x()", "deadlock"
    ),
    Planted(
        "semaphores not zeroed",
        ROWS,
        "    if (thread < Tile::consumers) store_global(p.workspace.semaphores + own.index * Tile::consumers + thread, 0);\n",
        "",
        "deadlock",
    ),
    # what is not there
    Planted("queries after the tail not cleared", KERNEL, CLEAR_QUERIES, "", "wrong"),
    Planted("keys after the tail not cleared", KERNEL, CLEAR_KEYS, "", "wrong"),
    Planted(
        "probability of keys that are not there",
        KERNEL,
        "        if (keys < 64 * half + 64) forget_keys(s, keys - 64 * half);\n",
        "",
        "wrong",
    ),
    Planted("no proxy fence after clearing", KERNEL, CLEARED, CLEARED.replace("        fence_proxy_async();\n", ""), "race"),
    Planted("no barrier after clearing", KERNEL, CLEARED, "        fence_proxy_async();\n    }\n", "race"),
    Planted("tile of no queries not zero", KERNEL, "first ? 0.f : dv[i];", "dv[i];", "wrong"),
    Planted("rows of other keys written", KERNEL, "p.dv.length_stride, keys - own);", "p.dv.length_stride, 64);", "global"),
    Planted("rows of other queries written", ROWS, "            if (row >= own.rows) continue;\n", "", "global"),
    Planted("a tail too short", TILES, "left < Queries ? left : Queries", "left < Queries ? left - 1 : Queries", "wrong"),
    # numbers
    Planted("rows of V still read when dK is staged", KERNEL, "    warp_sync();\n    store_rows", "    store_rows", "race"),
    Planted("dk without the scale", KERNEL, "dk[i] * p.scale;", "dk[i];", "wrong"),
    Planted("gradient of lse with the wrong sign", ROWS, "chunk == 0) delta -=", "chunk == 0) delta +=", "wrong"),
    Planted("lse in base e", ROWS, "sees ? lse * log2_of_e : infinity", "sees ? lse : infinity", "wrong"),
    Planted("delta of a lane", ROWS, "for (int mask = chunks / 2; mask > 0;", "for (int mask = chunks / 2; mask > 1;", "wrong"),
]
# With 80 queries: dS before dV, dS and not dS^T in shared memory, dQ^T and not dQ.
FAULTS += [
    fault._replace(name=f"80 queries: {fault.name}", queries=80)
    for fault in (
        Planted("released before dK is made", KERNEL, AFTER_STEP, EARLY_RELEASE, "race"),
        Planted(
            "dK used in flight",
            KERNEL,
            AFTER_STEP,
            "            keep(dk);\n            keep(ds);\n            release(stage);\n",
            "race",
        ),
        Planted("dP used in flight", KERNEL, "wgmma_wait<0>();  // for dP^T", "wgmma_wait<1>();  // for dP^T", "wrong"),
        Planted("no wgmma fence before dV", KERNEL, LATE_DV, without(LATE_DV, "            wgmma_fence();\n"), "wgmma"),
        Planted("no proxy fence after dS", KERNEL, STORED_DS, without(STORED_DS, "        fence_proxy_async();\n"), "race"),
        Planted("no barrier after dS", KERNEL, DS_BARRIER, "        //", "race"),
        Planted("one buffer of dS", KERNEL, "all_ds = shared.ds(stage);", "all_ds = shared.ds(0);", "race"),
        Planted("dS^T as it is", TILES, "store_matrix_x4_transposed(", "store_matrix_x4(", "wrong"),
        Planted(
            "dS not swizzled", TILES, "swizzle_128(own + step * 16 * panel_row_bytes)", "own + step * 16 * panel_row_bytes", "wrong"
        ),
        Planted("keys of dS exchanged", TILES, "lane / 8 % 2 * 8) * 2;", "(1 - lane / 8 % 2) * 8) * 2;", "wrong"),
        Planted("queries of dS exchanged", TILES, "(lane / 16 * 8 + lane % 8)", "((1 - lane / 16) * 8 + lane % 8)", "wrong"),
        Planted(
            "halves of dS exchanged",
            KERNEL,
            "all_ds + half * Tile::query_panel",
            "all_ds + (1 - half) * Tile::query_panel",
            "wrong",
        ),
        Planted(
            "halves of dQ^T from the same columns", KERNEL, "shared.k() + half * Tile::key_panel, 0)", "shared.k(), 0)", "wrong"
        ),
        Planted("the same keys in each step", KERNEL, "(dq, a + step * 16 * panel_row_bytes / 16,", "(dq, a,", "wrong"),
        Planted("dQ^T not started anew", KERNEL, DQ_TURNED, DQ_TURNED.replace("step != 0", "true"), "wrong"),
        Planted("the other column's query", ROWS, "lane) + odd;", "lane);", "global"),
        Planted("the wrong query given", ROWS, "odd ? values[j] : values[j + 1], 4", "odd ? values[j + 1] : values[j], 4", "wrong"),
        Planted("rows of other queries written", ROWS, "            if (row >= own.rows) continue;\n", "", "global"),
        Planted("queries after the tail not cleared", KERNEL, CLEAR_QUERIES, "", "wrong"),
        Planted("turn not waited for", KERNEL, ORDERED_WAIT, "", "order"),
    )
]
DAILY = {
    "released too early",
    "one buffer of dS",
    "turn not waited for",
    "queries after the tail not cleared",
    "halves of dQ from the same columns",
    "80 queries: dP used in flight",
    "80 queries: dS^T as it is",
}


@functools.cache
def case(head_dim):
    """Arguments, the exact results and plain torch's. What nobody sees is NaN; the scores of query 3 are near -880."""
    q, k, v = make_inputs(PLAN, 2, head_dim, torch.bfloat16, seed=5)
    dout, dlse = make_gradients(q)
    q[..., 0], k[..., 0] = 0.0, 80.0
    q[:, 3, :, 0] = -11.0 * math.sqrt(head_dim)
    scale = head_dim**-0.5
    truth, plain = exact(q, k, v, PLAN, scale, dout, dlse), eager(q, k, v, PLAN, scale, dout, dlse)
    out, lse = truth.out.to(q.dtype), truth.lse.float()
    for x in (q, dout, out):
        x[:, UNSEEN["queries"]] = math.nan
    for x in (k, v):
        x[:, UNSEEN["keys"]] = math.nan
    return (dout, dlse, q, k, v, out, lse, PLAN, scale), truth, plain


def symptoms(library, head_dim, queries=None, until=None):
    """The kinds of error reported, "wrong" and "order", in several orders of events, or in as many as it takes to see ``until``."""
    arguments, truth, plain = case(head_dim)
    found, first = set(), None
    for options in (Options(LAZY), Options(RANDOM, 1, 3), Options(RANDOM, 2, 2), Options(RANDOM, 3, 6)):
        result = run_backward(library, *arguments, deterministic=True, options=options, queries=queries)
        found |= set(result.report.kinds)
        try:
            assert_results_close(Results(truth.out.to(result.dq.dtype), truth.lse.float(), *result[:3]), truth, plain)
        except AssertionError:
            found.add("wrong")
        bits = result.sums.view(torch.int32)
        first = bits if first is None else first
        if not torch.equal(bits, first):
            found.add("order")
        if until in found:
            break
    return found


def test_every_fault_has_its_place():
    """The ordinary run plants few, but must notice when a kernel has moved on from the others."""
    counts = {fault.name: (SOURCES / fault.file).read_text().count(fault.old) for fault in FAULTS}
    assert set(counts.values()) == {1}, {name: count for name, count in counts.items() if count != 1}
    assert len(counts) == len(FAULTS) and set(counts) >= DAILY


@pytest.mark.parametrize(("head_dim", "queries"), [(64, 128), (128, 64), (128, 80)])
def test_without_a_fault_there_is_no_symptom(head_dim, queries):
    assert symptoms(build("backward"), head_dim, queries) == set()


@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name, marks=() if f.name in DAILY else pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_shows(fault):
    library = build("backward", [Fault(fault.file, fault.old, fault.new)], optimise="-O1")
    assert fault.shows in symptoms(library, fault.head_dim, fault.queries, until=fault.shows)
