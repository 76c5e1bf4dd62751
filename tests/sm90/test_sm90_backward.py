"""The Hopper backward kernels, run on the host model of the hardware: numbers against fp64, and no race, deadlock or stray
access in any order of events; in deterministic mode the same bits."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadkern.plans import AttentionPlan, VideoLayout, Window, block_causal, frame_isolated, teacher_forcing
from aadkern.range_attention.sm90_tables import QUERY_ROWS, cut_backward
from aadkern.testing import Results, assert_results_close, eager, exact, make_gradients, make_inputs, plans, random_plan
from tests.sm90.hopper_backward import run_backward
from tests.sm90.hopper_device import beside_products, compile_kernels, touched_in_flight
from tests.sm90.hopper_host import BUILD, EAGER, LAZY, RANDOM, Options, build, schedules

# Runs that end inside a tile, whole tiles and tails on both sides, one key, one query, queries and keys that see nothing.
RAGGED = AttentionPlan.from_ranges(
    205, 300, [((0, 5), []), ((5, 133), [(3, 4), (17, 290)]), ((133, 134), [(120, 260)]), ((134, 205), [(0, 128), (299, 300)])]
)
LAYOUT = VideoLayout(chunks=(1, 2, 2), tokens_per_frame=45)
ROWS = pytest.mark.parametrize(("head_dim", "queries"), [(64, 128), (128, 64), (128, 80)])


@pytest.fixture(scope="module")
def library():
    return build("backward")


def draw(plan, heads, head_dim, dtype, **options):
    """q, k, v, dout, dlse."""
    q, k, v = make_inputs(plan, heads, head_dim, dtype, seed=random.randrange(1 << 30), **options)
    return (q, k, v, *make_gradients(q, seed=random.randrange(1 << 30)))


def check(library, q, k, v, dout, dlse, plan, scale=None, **options):
    """The gradients are within the house's budget of fp64, and the model has nothing to say. Returns them."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    truth, plain = exact(q, k, v, plan, scale, dout, dlse), eager(q, k, v, plan, scale, dout, dlse)
    out, lse = truth.out.to(q.dtype), truth.lse.float()
    result = run_backward(library, dout, dlse, q, k, v, out, lse, plan, scale, **options)
    assert result.report.clean, str(result.report)
    assert_results_close(Results(out, lse, result.dq, result.dk, result.dv), truth, plain)
    return result


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@ROWS
def test_a_ragged_plan(library, head_dim, queries, dtype, deterministic):
    check(library, *draw(RAGGED, 1, head_dim, dtype), RAGGED, deterministic=deterministic, queries=queries)


@given(plan=plans(max_q=250, max_k=250), data=st.data())
def test_random_plans(plan, data):
    head_dim, dtype = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    queries = data.draw(st.sampled_from(QUERY_ROWS[head_dim]))
    batch, heads = data.draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    random.seed(data.draw(st.integers(0, 1 << 30)))
    inputs = draw(plan, heads, head_dim, dtype, batch=batch)
    options = Options(
        data.draw(st.sampled_from([EAGER, LAZY, RANDOM])),
        seed=data.draw(st.integers(1, 1 << 30)),
        resident_ctas=data.draw(st.integers(1, 3)),
    )
    group = data.draw(st.integers(1, batch * heads))
    deterministic = data.draw(st.booleans())
    check(build("backward"), *inputs, plan, deterministic=deterministic, options=options, head_group=group, queries=queries)


# ---- order ------------------------------------------------------------------------------------------------------------------


def bits(result):
    return torch.cat([result.sums.view(torch.int32), *(x.flatten().view(torch.int16) for x in (result.dq, result.dk, result.dv))])


@ROWS
def test_deterministic_gives_the_same_bits_in_every_order_of_events(library, head_dim, queries):
    """However many CTAs run at once, to the last bit of the fp32 sums, none of which depends on the other mode's luck."""
    plan = block_causal(VideoLayout(chunks=(2, 1, 2), tokens_per_frame=70))
    q, k, v, dout, dlse = draw(plan, 1, head_dim, torch.bfloat16)
    first = check(library, q, k, v, dout, dlse, plan, deterministic=True, options=Options(EAGER), queries=queries)
    truth = exact(q, k, v, plan, head_dim**-0.5, dout, dlse)
    again = functools.partial(
        run_backward, library, dout, dlse, q, k, v, truth.out.to(q.dtype), truth.lse.float(), plan, head_dim**-0.5, queries=queries
    )
    for options in (
        Options(LAZY, resident_ctas=2),
        Options(RANDOM, seed=2, resident_ctas=3),
        Options(RANDOM, seed=3, resident_ctas=6),
    ):
        result = again(deterministic=True, options=options)
        assert result.report.clean, f"{options}: {result.report}"
        assert torch.equal(bits(result), bits(first)), options
    free = [again(options=Options(RANDOM, seed=seed, resident_ctas=5)) for seed in (4, 5)]
    assert any(not torch.equal(result.sums, first.sums) for result in free)  # the order matters to these numbers
    for result in free:
        assert result.report.clean, str(result.report)
        assert torch.equal(result.dk, first.dk) and torch.equal(result.dv, first.dv)  # each is summed by one CTA


@pytest.mark.parametrize("head_group", [1, 2, 4, 6, 2**31 - 1])
def test_every_tile_is_done_once_whatever_the_order_of_heads(library, head_group):
    plan = AttentionPlan.from_ranges(90, 140, [((0, 20), [(0, 140)]), ((20, 90), [(5, 6)])])
    inputs = draw(plan, 3, 64, torch.float16, batch=2)
    check(
        library,
        *inputs,
        plan,
        head_group=head_group,
        deterministic=head_group > 2,
        options=Options(RANDOM, seed=head_group, resident_ctas=4),
    )


# ---- memory -----------------------------------------------------------------------------------------------------------------


@ROWS
@pytest.mark.parametrize("layout", ["bhsd", "fused", "sliced"])
def test_strides(library, layout, head_dim, queries):
    plan = AttentionPlan.from_ranges(150, 150, [((0, 70), [(0, 150)]), ((70, 150), [(3, 90), (100, 140)])])
    inputs = draw(plan, 2, head_dim, torch.bfloat16, batch=2, layout=layout)
    around = (2, 3, 156, head_dim + 8)
    canaries = [torch.full(around, float("nan"), dtype=torch.bfloat16) for _ in range(3)]  # gradients inside, NaN around
    gradients = tuple(canary[:, :2, 3:153, :head_dim].transpose(1, 2) for canary in canaries)
    check(library, *inputs, plan, gradients=gradients, queries=queries)
    for canary in canaries:
        assert canary.isnan().sum() == canary.numel() - gradients[0].numel()


def test_offsets_beyond_32_bits(library):
    """Two batch elements 2^31 elements apart, of which only these pages are ever touched."""
    plan = AttentionPlan.from_ranges(70, 140, [((0, 70), [(0, 140)])])
    q, k, v, dout, dlse = draw(plan, 1, 64, torch.bfloat16, batch=2)
    memory = torch.empty(2**31 + 2**18, dtype=torch.bfloat16)
    far = [memory.as_strided(x.shape, (2**31, *x.stride()[1:]), 2**15 * i).copy_(x) for i, x in enumerate((q, k, v, dout))]
    near = check(library, q, k, v, dout, dlse, plan)
    apart = check(library, *far, dlse, plan)
    for one, other in zip(near[:3], apart[:3], strict=True):
        assert torch.equal(one, other)


@ROWS
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_rows_that_are_not_seen_have_no_effect(library, garbage, head_dim, queries):
    """Keys between and after ranges, queries that see no key and lie in the same tiles as others: NaN in all their tensors."""
    plan = AttentionPlan.from_ranges(200, 300, [((0, 70), [(0, 100), (130, 210)]), ((90, 181), [(0, 100)]), ((181, 200), [])])
    q, k, v, dout, dlse = draw(plan, 1, head_dim, torch.bfloat16)
    clean = check(library, q, k, v, dout, dlse, plan, queries=queries)
    truth = exact(q, k, v, plan, head_dim**-0.5, dout, dlse)
    out, lse = truth.out.to(q.dtype), truth.lse.float()
    for unseen in (slice(70, 90), slice(181, 200)):
        q[:, unseen], dout[:, unseen], out[:, unseen], dlse[:, :, unseen] = garbage, garbage, garbage, garbage
    for unseen in (slice(100, 130), slice(210, 300)):
        k[:, unseen], v[:, unseen] = garbage, garbage
    result = run_backward(library, dout, dlse, q, k, v, out, lse, plan, head_dim**-0.5, queries=queries)
    assert result.report.clean, str(result.report)
    for ours, before in ((result.dq, clean.dq), (result.dk, clean.dk), (result.dv, clean.dv)):
        assert torch.equal(ours, before)
    assert not result.dk[:, 100:130].any() and not result.dv[:, 210:].any() and not result.dq[:, 70:90].any()


def test_nan_in_a_query_reaches_the_keys_it_sees_and_no_other_query(library):
    plan = AttentionPlan.from_ranges(130, 260, [((0, 65), [(0, 130)]), ((65, 130), [(130, 260)])])
    q, k, v, dout, dlse = draw(plan, 1, 64, torch.float16)
    q[:, 7] = math.nan
    truth = exact(q, k, v, plan, 0.125, dout, dlse)
    result = run_backward(library, dout, dlse, q, k, v, truth.out.half(), truth.lse.float(), plan, 0.125)
    for ours, expected in ((result.dq, truth.dq), (result.dk, truth.dk), (result.dv, truth.dv)):
        assert torch.equal(ours.isnan(), expected.isnan())


def test_infinite_scores_give_nan_only_where_the_reference_does(library):
    """Keys with scores of -inf, in a whole tile and in part of one: p is 0, and only 0 times their own infinity is NaN."""
    plan = AttentionPlan.from_ranges(130, 300, [((0, 130), [(0, 300)])])
    q, k, v, dout, dlse = draw(plan, 1, 64, torch.bfloat16)
    q[..., 0], k[:, :150, :, 0] = 1.0, -math.inf
    truth = exact(q, k, v, plan, 0.125, dout, dlse)
    result = run_backward(library, dout, dlse, q, k, v, truth.out.bfloat16(), truth.lse.float(), plan, 0.125)
    assert result.report.clean, str(result.report)
    assert truth.dq[..., 0].isnan().all() and not truth.dq[..., 1:].isnan().any() and truth.dk.isfinite().all()
    for ours, expected in ((result.dq, truth.dq), (result.dk, truth.dk), (result.dv, truth.dv)):
        assert torch.equal(ours.isnan(), expected.isnan())
        assert (ours - expected).nan_to_num().abs().max() < 0.02


# ---- numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", QUERY_ROWS[128])
@pytest.mark.parametrize("factor", [0.1, 8.0, 30.0])
def test_the_size_of_the_scores(library, factor, queries):
    q, k, v, dout, dlse = draw(RAGGED, 1, 128, torch.bfloat16)
    check(library, factor * q, factor * k, v, dout, dlse, RAGGED, queries=queries)


@pytest.mark.parametrize("scale", [0.0, -0.2, 1.0])
def test_scales(library, scale):
    check(library, *draw(RAGGED, 1, 64, torch.float16), RAGGED, scale=scale)


def test_no_gradient_of_lse(library):
    q, k, v, dout, _ = draw(RAGGED, 2, 128, torch.float16)
    check(library, q, k, v, dout, None, RAGGED)


@pytest.mark.parametrize("queries", QUERY_ROWS[128])
@pytest.mark.parametrize("sizes", [(1, 300), (300, 1), (1, 1), (64, 128), (65, 129), (80, 128), (81, 65)])
def test_few_queries_or_keys(library, sizes, queries):
    """One query over many keys is a query-token discriminator, with lse far below -88."""
    q_len, k_len = sizes
    plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
    q, k, v, dout, dlse = draw(plan, 1, 128, torch.bfloat16)
    q[..., 0], k[..., 0] = 100.0, -100.0  # all scores are near -880
    result = check(library, q, k, v, dout, dlse, plan, queries=queries)
    assert all(x.isfinite().all() for x in result[:3])


def test_no_queries_at_all(library):
    plan = AttentionPlan.from_ranges(0, 150, [])
    q, k, v, dout, dlse = draw(plan, 2, 64, torch.bfloat16)
    result = run_backward(library, dout, dlse, q, k, v, q, torch.empty(1, 2, 0), plan, 0.125, deterministic=True)
    assert result.report.clean and not result.dk.any() and not result.dv.any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_dim": 96}, "head_dim must be 64 or 128"),
        ({"scale": math.nan}, "scale must be finite"),
        ({"layout": "misaligned"}, "base must be 16-byte aligned"),
        ({"head_group": 0}, "head_group must be at least 1"),
        ({"queries": 80}, "query_rows must be 64 or 80 at head_dim 128, 128 at head_dim 64"),
        ({"queries": 128, "head_dim": 128}, "query_rows must be 64 or 80 at head_dim 128, 128 at head_dim 64"),
    ],
)
def test_what_is_not_served_is_refused(library, wrong, message):
    plan = AttentionPlan.from_ranges(64, 64, [((0, 64), [(0, 64)])])
    q, k, v, dout, dlse = draw(plan, 1, wrong.get("head_dim", 64), torch.bfloat16, layout=wrong.get("layout", "bshd"))
    options = {"head_group": wrong.get("head_group", 1), "queries": wrong.get("queries")}
    result = run_backward(library, dout, dlse, q, k, v, q, dlse, plan, wrong.get("scale", 0.125), **options)
    assert message in str(result.report) and all(x.isnan().all() for x in result[:3])


# ---- tables -----------------------------------------------------------------------------------------------------------------


@given(plan=plans(max_q=400, max_k=400), queries=st.sampled_from([64, 80, 128]))
def test_tables_hold_each_visible_pair_once_and_number_what_a_query_tile_is_given(plan, queries):
    query_tiles, key_tiles, spans = cut_backward(plan, queries)
    assert [row for start, end in query_tiles for row in range(start, end)] == list(range(plan.q_len))
    seen = torch.zeros(plan.q_len, plan.k_len, dtype=torch.int32)
    given_to = [0] * len(query_tiles)
    steps = []
    for first_key, end_key, first_span, end_span in key_tiles:
        steps.append(0)
        assert 0 < end_key - first_key <= 128
        for first_row, end_row, tile, rank in spans[first_span:end_span]:
            seen[first_row:end_row, first_key:end_key] += 1
            for at in range(first_row, end_row, queries):
                assert query_tiles[tile] == (at, min(at + queries, end_row)) and given_to[tile] == rank
                given_to[tile], tile, steps[-1] = rank + 1, tile + 1, steps[-1] + 1
    assert torch.equal(seen, plan.dense().int())
    assert steps == sorted(steps, reverse=True)
    assert sorted(key for first, end, *_ in key_tiles for key in range(first, end)) == list(range(plan.k_len))


@pytest.mark.slow
@pytest.mark.parametrize("queries", QUERY_ROWS[128])
@pytest.mark.parametrize("window", [Window(), Window(frames=3, sink=1)], ids=str)
@pytest.mark.parametrize("make", [block_causal, teacher_forcing, lambda layout, _: frame_isolated(layout)])
def test_the_masks_of_video(library, make, window, queries):
    plan, options = make(LAYOUT, window), Options(RANDOM, resident_ctas=4)
    check(library, *draw(plan, 2, 128, torch.bfloat16), plan, deterministic=True, options=options, queries=queries)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_plans_in_many_orders(library, seed):
    rng = random.Random(seed)
    plan, random_dtype, head_dim = random_plan(rng, 500, 700), rng.choice([torch.bfloat16, torch.float16]), rng.choice([64, 128])
    inputs, queries = draw(plan, 2, head_dim, random_dtype, batch=rng.randint(1, 2)), rng.choice(QUERY_ROWS[head_dim])
    for deterministic in (False, True):
        results = [
            check(library, *inputs, plan, deterministic=deterministic, options=o, queries=queries)
            for o in schedules(3, resident_ctas=rng.randint(1, 6))
        ]
        assert all(torch.equal(bits(result)[-result.dk.numel() :], bits(results[0])[-result.dk.numel() :]) for result in results)
        if deterministic:
            assert all(torch.equal(bits(result), bits(results[0])) for result in results)


# ---- the device's half ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    BUILD.mkdir(parents=True, exist_ok=True)
    return compile_kernels("attention/sm90/backward.cu", BUILD)


def tile_of(kernel):
    """head_dim and queries."""
    found = re.search(r"BackwardTileILi(\d+)ELi(\d+)E", kernel.name)
    return int(found[1]), int(found[2])


def test_nvcc_makes_every_instance_without_spills_or_serialised_products(compiled):
    kernels, complaints = compiled
    assert complaints == []
    assert len(kernels) == 3 * 2 * 3  # three launches; two types; 64 and 80 queries at head_dim 128, 128 at 64
    assert {kernel.spilled_bytes for kernel in kernels} == {0}


def test_the_main_kernel_keeps_to_its_registers_and_uses_the_units_it_is_written_for(compiled):
    main = [kernel for kernel in compiled[0] if "attention_backward" in kernel.name]
    assert len(main) == 6
    for kernel in main:
        head_dim, queries = tile_of(kernel)
        wide = head_dim == 128
        assert kernel.setmaxnreg == {"producer": 24, "consumer": 240}
        assert 128 * (kernel.setmaxnreg["producer"] + 2 * kernel.setmaxnreg["consumer"]) <= 128 * 3 * kernel.registers <= 65536
        assert kernel.highest["producer"] < 24 and kernel.highest["consumer"] < 240
        # S^T, dP^T, dV, dQ, dK; K, V, Q, dO panels; lse and delta; dQ
        assert kernel.opcodes["HGMMA"] == 2 * head_dim // 16 + queries // 16 + 8 + queries // 16
        assert kernel.opcodes["UTMALDG"] == (8 if wide else 4)
        assert kernel.opcodes["UBLKCP"] == 1 and kernel.opcodes["UBLKRED"] == 1
        assert kernel.stores == [16] * (16 if wide else 8)  # dk and dv, 16 rows a warp


def test_what_a_step_computes_stands_beside_products(compiled):
    """All exponentials under dP^T, dS^T (not with 80 queries) and its way out under dV, dQ's way out under dK."""
    for kernel in (kernel for kernel in compiled[0] if "attention_backward" in kernel.name):
        _, queries = tile_of(kernel)
        assert beside_products(kernel, "MUFU.EX2") == (queries // 2, queries // 2)
        assert beside_products(kernel, "STSM") == (queries // 16, queries // 16)
        assert queries == 80 or beside_products(kernel, "FMUL")[0] >= queries // 2


def test_ptxas_moves_nothing_into_the_flight_of_a_product(compiled):
    """And with any one wait taken out, the check that says so finds something."""
    for kernel in (kernel for kernel in compiled[0] if "attention_backward" in kernel.name):
        assert touched_in_flight(kernel) == []
        waits = [i for i in kernel.code if i.opcode.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) == 4
        for wait in waits:
            assert touched_in_flight(dataclasses.replace(kernel, code=[i for i in kernel.code if i is not wait])), wait
