"""The Hopper forward kernels, run on the host model of the hardware: numbers against fp64, and no race, deadlock or stray
access in any order of events."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadkern.plans import AttentionPlan, VideoLayout, Window, block_causal
from aadkern.testing import exact, make_inputs, plans, random_plan
from tests.sm90.hopper_device import beside_products, compile_kernels, touched_in_flight
from tests.sm90.hopper_forward import PERSISTENT, PING_PONG, SIMPLE, SPECIALISED, WIDE, assert_right, run_forward
from tests.sm90.hopper_host import EAGER, LAZY, RANDOM, SOURCES, Fault, Options, build, schedules

KERNELS = {"simple": SIMPLE, "specialised": SPECIALISED, "ping_pong": PING_PONG, "wide": WIDE, "persistent": PERSISTENT}
# A run of several tiles, whole key tiles and tails, a run without a tail, one key alone, no key, the last key of the tensor.
RAGGED = AttentionPlan.from_ranges(
    430,
    700,
    [
        ((0, 5), []),
        ((5, 262), [(3, 4), (17, 300), (301, 690)]),
        ((262, 300), [(128, 384)]),
        ((300, 430), [(0, 640), (699, 700)]),
    ],
)


@pytest.fixture(scope="module")
def library():
    return build("forward")


def check(library, q, k, v, plan, kernel, scale=None, **options):
    """The result is within the house's budget of fp64, and the model has nothing to say. Returns it."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    result = run_forward(library, q, k, v, plan, scale, kernel, **options)
    assert result.report.clean, str(result.report)
    assert_right(result, q, k, v, plan, scale)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_ragged_plan_gives_the_same_bits_in_every_order_of_events(library, kernel, head_dim, dtype):
    q, k, v = make_inputs(RAGGED, 1, head_dim, dtype, seed=random.randrange(1 << 30))
    first = check(library, q, k, v, RAGGED, kernel, options=Options(RANDOM, seed=random.randrange(1 << 30)))
    for options in schedules(1):
        result = run_forward(library, q, k, v, RAGGED, head_dim**-0.5, kernel, options=options)
        assert result.report.clean, f"{options}: {result.report}"
        assert torch.equal(result.out, first.out) and torch.equal(result.lse, first.lse), options


@given(plan=plans(max_q=300, max_k=500), data=st.data())
def test_random_plans(plan, data):
    kernel = data.draw(st.sampled_from(sorted(KERNELS.values())))
    head_dim, dtype = data.draw(st.sampled_from([64, 128])), data.draw(st.sampled_from([torch.bfloat16, torch.float16]))
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    q, k, v = make_inputs(plan, heads, head_dim, dtype, batch=batch, seed=data.draw(st.integers(0, 1 << 30)))
    options = Options(data.draw(st.sampled_from([EAGER, LAZY, RANDOM])), seed=data.draw(st.integers(1, 1 << 30)))
    group, ctas = data.draw(st.integers(1, batch * heads)), data.draw(st.integers(1, 5))
    check(build("forward"), q, k, v, plan, kernel, options=options, head_group=group, persistent_ctas=ctas)


@pytest.mark.parametrize("kernel", [PING_PONG, PERSISTENT], ids=["ping_pong", "persistent"])
@pytest.mark.parametrize("layout", ["bhsd", "fused", "sliced"])
def test_strides(library, layout, kernel):
    plan = AttentionPlan.from_ranges(200, 200, [((0, 70), [(0, 200)]), ((70, 200), [(3, 90), (100, 150)])])
    q, k, v = make_inputs(plan, 3, 64, torch.bfloat16, batch=2, layout=layout, seed=random.randrange(1 << 30))
    canary = torch.full((2, 4, 208, 72), float("nan"), dtype=torch.bfloat16)  # out lies inside, and all around it stays NaN
    out = canary[:, :3, 2:202, :64].transpose(1, 2)
    check(library, q, k, v, plan, kernel, out=out)
    assert canary.isnan().sum() == canary.numel() - out.numel()


@pytest.mark.parametrize("head_group", range(1, 7))
def test_every_tile_is_done_once_whatever_the_order_of_heads(library, head_group):
    plan = AttentionPlan.from_ranges(150, 140, [((0, 20), [(0, 140)]), ((20, 150), [(5, 6)])])
    q, k, v = make_inputs(plan, 3, 64, torch.float16, batch=2, seed=head_group)
    check(library, q, k, v, plan, SPECIALISED, head_group=head_group)  # a row written twice is reported, one never written is NaN


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_lies_beyond_a_range_has_no_effect(library, kernel, garbage):
    """Neither do keys that the run does not see, whatever is in them, nor queries of another run."""
    first, second = ((0, 40), [(50, 60)]), [(2, 180), (190, 330)]
    plan = AttentionPlan.from_ranges(140, 400, [first, ((40, 140), second)])
    q, k, v = make_inputs(plan, 1, 128, torch.bfloat16, seed=random.randrange(1 << 30))
    k[:, 330:], v[:, 330:] = garbage, garbage
    k[:, 180:190], v[:, 180:190] = garbage, garbage
    check(library, q, k, v, plan, kernel)
    q[:, 90:] = garbage  # these queries are of no run
    check(library, q, k, v, AttentionPlan.from_ranges(140, 400, [first, ((40, 90), second)]), kernel)


@pytest.mark.parametrize("factor", [0.1, 1.0, 8.0, 30.0])
def test_the_size_of_the_scores(library, factor):
    q, k, v = make_inputs(RAGGED, 1, 128, torch.bfloat16, seed=random.randrange(1 << 30))
    check(library, factor * q, factor * k, v, RAGGED, PING_PONG)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 3.0])
def test_scales(library, scale):
    q, k, v = make_inputs(RAGGED, 1, 64, torch.float16, seed=random.randrange(1 << 30))
    check(library, q, k, v, RAGGED, SPECIALISED, scale=scale)


def test_infinite_scores_give_nan_only_where_the_reference_does(library):
    """Scores of -inf in a whole first tile and beside finite ones, scores of +inf, and NaN."""
    plan = AttentionPlan.from_ranges(130, 300, [((0, 130), [(0, 300)])])
    q, k, v = make_inputs(plan, 1, 64, torch.bfloat16, seed=random.randrange(1 << 30))
    q[:, :, :, 0] = 1.0
    k[:, :200, :, 0] = -math.inf
    q[:, 7, :, 0] = -1.0  # +inf here
    q[:, 9, :, 0] = math.nan
    for kernel in KERNELS.values():
        result = run_forward(library, q, k, v, plan, 0.125, kernel)
        truth = exact(q, k, v, plan, 0.125, torch.zeros_like(q))
        assert torch.equal(result.out.isnan(), truth.out.isnan()) and torch.equal(result.lse.isnan(), truth.lse.isnan())
        rows = [row for row in range(130) if row not in (7, 9)]
        assert (result.out - truth.out)[:, rows].abs().max() < 0.02
        assert (result.lse - truth.lse)[:, :, rows].abs().max() < 1e-4


@pytest.mark.parametrize("ctas", [1, 3, 7, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_persistent_launch_gives_the_same_bits_however_many_ctas_it_has(library, head_dim, ctas):
    """Among their tiles are some without keys, at the beginning, at the end and between others."""
    plan = AttentionPlan.from_ranges(
        520, 420, [((0, 130), []), ((130, 270), [(0, 176), (180, 401)]), ((270, 390), []), ((390, 520), [(5, 6)])]
    )
    q, k, v = make_inputs(plan, 2, head_dim, torch.bfloat16, batch=2, seed=random.randrange(1 << 30))
    wide = run_forward(library, q, k, v, plan, head_dim**-0.5, WIDE)
    options = Options(RANDOM, seed=random.randrange(1 << 30), resident_ctas=min(ctas, 2))
    result = check(library, q, k, v, plan, PERSISTENT, options=options, head_group=3, persistent_ctas=ctas)
    assert torch.equal(result.out, wide.out) and torch.equal(result.lse, wide.lse)


def test_more_than_four_ranges(library):
    """The table has room for any number, though a plan has at most 4."""
    pieces = [(10 * i, 10 * i + 3) for i in range(20)] + [(210, 380), (381, 515)]
    halves = [AttentionPlan.from_ranges(60, 520, [((0, 60), [piece])]) for piece in pieces]
    q, k, v = make_inputs(halves[0], 1, 64, torch.float16, seed=random.randrange(1 << 30))
    result = run_forward(library, q, k, v, halves[0], 0.125, PING_PONG, tables=([(0, 60, 0, len(pieces))], pieces))
    assert result.report.clean, str(result.report)
    parts = [exact(q, k, v, half, 0.125, torch.zeros_like(q)) for half in halves]
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    out = sum(part.out * (part.lse - lse).exp().transpose(1, 2)[..., None] for part in parts)
    assert (result.out - out).abs().max() < 2e-3 and (result.lse - lse).abs().max() < 1e-5


def test_a_window_over_uneven_chunks_equals_its_chunks_alone(library):
    """A plan's run gives the same bits as a launch over that run's queries alone."""
    layout = VideoLayout(chunks=(1, 2, 2), tokens_per_frame=60)
    plan = block_causal(layout, Window(frames=3, sink=1))
    q, k, v = make_inputs(plan, 1, 64, torch.bfloat16, seed=random.randrange(1 << 30))
    whole = check(library, q, k, v, plan, PING_PONG)
    for (start, end), ranges in plan.runs:
        alone = AttentionPlan.from_ranges(end - start, plan.k_len, [((0, end - start), ranges)])
        part = run_forward(library, q[:, start:end], k, v, alone, 0.125, PING_PONG)
        assert torch.equal(part.out, whole.out[:, start:end]) and torch.equal(part.lse, whole.lse[:, :, start:end])


def test_no_keys_at_all(library):
    plan = AttentionPlan.from_ranges(70, 0, [])
    q, k, v = make_inputs(plan, 2, 64, torch.bfloat16)
    result = check(library, q, k, v, plan, PING_PONG)
    assert not result.out.any() and (result.lse == -math.inf).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_dim": 96}, "head_dim must be 64 or 128"),
        ({"scale": -1.0}, "scale must be finite and not negative"),
        ({"scale": math.nan}, "scale must be finite and not negative"),
        ({"scale": 3e38}, "scale must be finite and not negative"),  # in base 2 it is not
        ({"layout": "misaligned"}, "base must be 16-byte aligned"),
        ({"head_group": 0}, "head_group must be at least 1"),
    ],
)
def test_what_is_not_served_is_refused(library, wrong, message):
    plan = AttentionPlan.from_ranges(64, 64, [((0, 64), [(0, 64)])])
    head_dim = wrong.get("head_dim", 64)
    q, k, v = make_inputs(plan, 1, head_dim, torch.bfloat16, layout=wrong.get("layout", "bshd"))
    out = torch.empty(q.shape, dtype=q.dtype)
    result = run_forward(library, q, k, v, plan, wrong.get("scale", 0.125), head_group=wrong.get("head_group", 1), out=out)
    assert message in str(result.report) and out.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_many_plans_in_many_orders(library, seed):
    rng = random.Random(seed)
    plan = random_plan(rng, 500, 1400)
    dtype, head_dim = rng.choice([torch.bfloat16, torch.float16]), rng.choice([64, 128])
    q, k, v = make_inputs(plan, 2, head_dim, dtype, batch=rng.randint(1, 2), seed=seed)
    for kernel in KERNELS.values():
        results = [check(library, q, k, v, plan, kernel, options=options) for options in schedules(4)]
        for first, other in itertools.pairwise(results):
            assert torch.equal(first.out, other.out) and torch.equal(first.lse, other.lse)


# ---- what nvcc makes of them ----


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    kernels, complaints = compile_kernels("attention/sm90/forward.cu", tmp_path_factory.mktemp("sm90_forward"))
    assert complaints == []  # ptxas would make every wgmma wait
    return {kernel.name: kernel for kernel in kernels}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["8BFloat16", "7Float16"])
@pytest.mark.parametrize(
    ("keys", "ping_pong", "persistent"), [(128, False, False), (128, True, False), (176, True, False), (176, True, True)]
)
def test_the_specialised_kernels_compile_to_what_they_say(compiled, dtype, head_dim, keys, ping_pong, persistent):
    instance = f"14forward_kernelINS_{dtype}ELi{head_dim}ELi{keys}ELb{int(ping_pong)}ELb{int(persistent)}E"
    (kernel,) = [k for name, k in compiled.items() if instance in name]
    assert kernel.spilled_bytes == 0
    assert kernel.registers * 384 <= 65536
    most = {"producer": 32, "consumer": 232} if persistent else {"producer": 24, "consumer": 240}
    assert kernel.setmaxnreg == most and most["producer"] + 2 * most["consumer"] <= 3 * kernel.registers
    assert kernel.highest["producer"] < most["producer"] and kernel.highest["consumer"] < most["consumer"]
    # q k and p v, each before the loop or after it and once in it; 16 columns, or 16 keys, a step
    assert kernel.opcodes["HGMMA"] == 2 * (head_dim // 16 + keys // 16)
    assert kernel.opcodes["UTMALDG"] == 4 * (head_dim // 64)  # q, k at two places, v
    assert (
        kernel.opcodes["BAR"] == 1 + (not persistent) + 6 * ping_pong
    )  # the start, before the way out; turns begun and ended, taken and passed twice
    assert touched_in_flight(kernel) == []
    beside, exponentials = beside_products(kernel, "MUFU.EX2")
    assert exponentials >= keys // 2 and beside > 0.9 * exponentials  # the softmax stands between q k's end and p v's
    assert kernel.stores == [4] * 2 + [16] * (head_dim // 16)  # lse; out, 16 rows a warp


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_a_wait_for_the_next_k_anywhere_else_leaves_the_softmax_alone(head_dim, tmp_path):
    """The order that suggests itself: k is waited for where it is used. ptxas then moves the wait for p v above the softmax."""
    file = "attention/sm90/forward.cuh"
    text = (SOURCES / file).read_text()
    early = text[
        text.index("            // The next k is waited for here") : text.index(
            "            wgmma_wait<0>();\n            keep(o);"
        )
    ]
    late = "            scale_rows(o, decay);\n"
    faults = [Fault(file, early, ""), Fault(file, late, late + early)]
    instance = f"forward_kernel<BFloat16, {head_dim}, 128, true, false>(AADKERN_GRID_CONSTANT ForwardParameters)"
    ((kernel,), complaints) = compile_kernels(file, tmp_path, instance=instance, faults=faults)
    beside, exponentials = beside_products(kernel, "MUFU.EX2")
    assert complaints == [] and exponentials >= 64 and beside == 0


def test_a_limit_to_spins_leaves_the_products_in_flight(tmp_path):
    """A debug build must hang where the real one does: the same pipeline, and a look at the clock in every spin."""
    instance = "forward_kernel<BFloat16, 128, 176, true, false>(AADKERN_GRID_CONSTANT ForwardParameters)"
    ((kernel,), complaints) = compile_kernels(
        "attention/sm90/forward.cuh", tmp_path, instance=instance, defines=["AADKERN_SPIN_SECONDS=2"]
    )
    beside, exponentials = beside_products(kernel, "MUFU.EX2")
    assert complaints == [] and beside == exponentials >= 88
    clocks = sum("SR_GLOBALTIMERLO" in operand for i in kernel.code for operand in i.operands)
    assert clocks >= sum(i.opcode.startswith("SYNCS.PHASECHK") for i in kernel.code) / 2 > 0  # each spin stands there twice


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["8BFloat16", "7Float16"])
def test_the_simple_kernel_compiles_to_what_it_says(compiled, dtype, head_dim):
    (kernel,) = [k for name, k in compiled.items() if f"21simple_forward_kernelINS_{dtype}ELi{head_dim}E" in name]
    assert kernel.spilled_bytes == 0 and kernel.registers <= 255
    assert kernel.opcodes["HGMMA"] == head_dim // 16 + 128 // 16
    assert kernel.opcodes["UTMALDG"] == 3 * (head_dim // 64)
    assert touched_in_flight(kernel) == []
    assert kernel.stores == [4] * 2 + [16] * (head_dim // 16)
