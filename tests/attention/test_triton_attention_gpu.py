"""The Triton kernels of attention on a GPU, as they are launched there, against fp64: dtypes and head sizes of training, any
layout, long clips, addresses beyond 32 bits, tangents, torch.compile.

What the interpreter cannot show: that the compiled kernels multiply and synchronise as they should. Unverified: not run on one yet.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, plans, runtime, testing
from tests.attention.gpu_cases import ALL_PLANS, DEVICE, DTYPES, VIDEO, draw

pytestmark = pytest.mark.gpu
HEAD_DIMS = pytest.mark.parametrize("head_dim", [64, 128, 256])
LONG = {
    "window": plans.block_causal(VideoLayout.regular(21, 3, 1560), Window(9, sink=3)),
    "bidirectional": plans.bidirectional(VideoLayout.regular(21, 3, 1560)),
}


@pytest.fixture(autouse=True)
def served():
    reason = runtime.reason_against("triton", DEVICE)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def seed(record_property):
    """Drawn afresh at every run, and told by the report of a failure; AADKERN_SEED repeats one."""
    drawn = int(os.environ.get("AADKERN_SEED", random.SystemRandom().randrange(2**31)))
    record_property("seed", drawn)
    print(f"AADKERN_SEED={drawn}")
    return drawn


def attend(q, k, v, plan, dout, dlse=None, scale=None) -> testing.Results:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend="triton")
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return testing.Results(out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients))


def check(q, k, v, plan, dout, dlse=None, scale=None) -> None:
    actual = attend(q, k, v, plan, dout, dlse, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    truth, plain = (f(q, k, v, plan, scale, dout, dlse) for f in (testing.exact, testing.eager))
    testing.assert_results_close(actual, truth, plain)


@pytest.mark.parametrize("plan", ALL_PLANS.values(), ids=ALL_PLANS)
@HEAD_DIMS
@DTYPES
def test_results_of_every_plan(plan, dtype, head_dim, seed):
    (q, k, v), gradients = draw(plan, head_dim, dtype, seed, heads=3, batch=2)
    check(q, k, v, plan, *gradients)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 128, 256, 80, 20, 5])
@DTYPES
def test_any_strides_and_odd_heads(layout, dtype, head_dim, seed):
    """Also rows and a first element off 16 bytes, and gradients whose heads lie outside their tokens."""
    (q, k, v), (dout, dlse) = draw(VIDEO, head_dim, dtype, seed, layout=layout)
    check(q, k, v, VIDEO, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse, scale=-0.2)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_float32_is_not_rounded_to_tf32(head_dim, seed):
    (q, k, v), gradients = draw(VIDEO, head_dim, torch.float32, seed)
    check(q, k, v, VIDEO, *gradients)


@HEAD_DIMS
@DTYPES
def test_random_plans(dtype, head_dim, seed):
    rng = random.Random(seed)
    for i in range(16):
        plan = testing.random_plan(rng, 700, 900)
        (q, k, v), (dout, dlse) = draw(
            plan, head_dim, dtype, seed + i, rng.randint(1, 5), rng.randint(1, 3), rng.choice(testing.LAYOUTS)
        )
        check(q, k, v, plan, dout, rng.choice((None, dlse)), rng.choice((None, 0.0, -0.2, 0.3)))


@pytest.mark.parametrize("size", [0.1, 5.0, 30.0])
@HEAD_DIMS
def test_sizes_of_inputs(size, head_dim, seed):
    """Real activations are not of unit size."""
    (q, k, v), gradients = draw(VIDEO, head_dim, torch.bfloat16, seed)
    check(size * q, size * k, v, VIDEO, *gradients)


@pytest.mark.parametrize("plan", LONG.values(), ids=LONG)
@DTYPES
def test_a_long_clip_of_the_14b_model(plan, dtype, seed):
    """32760 tokens, 40 heads of 128: some rows of queries and of keys against fp64, and memory that is O(L)."""
    (q, k, v), (dout, _) = draw(plan, 128, dtype, seed, heads=40)
    attend(*(x[:, :, :1] for x in (q, k, v)), plan, dout[:, :, :1])  # makes the tables
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = attend(q, k, v, plan, dout)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 5 * q.nbytes, f"{taken / 2**20:.0f} MiB: out and three gradients are {4 * q.nbytes / 2**20:.0f}"
    assert all(x.isfinite().all() for x in results)
    edges = [row for start, end in (run for run, _ in plan.runs) for row in (start, end - 1)]
    for row, head in ((row, head) for row in edges for head in (0, 39)):
        check_query(results, q, k, v, dout, plan, row, head)
    rng = random.Random(seed)
    for _ in range(6):
        check_key(results, q, k, v, dout, plan, rng.randrange(plan.k_len), rng.randrange(40))


def near(actual, expected, relative):
    torch.testing.assert_close(actual.double(), expected, rtol=relative, atol=relative * expected.abs().max().item())


def check_query(results, q, k, v, dout, plan, row, head):
    """One row of out, lse and dq by their definitions."""
    seen = next(ranges for (start, end), ranges in plan.runs if start <= row < end)
    keys, values = (torch.cat([x[0, a:b, head] for a, b in seen]).double() for x in (k, v))
    scores = keys @ q[0, row, head].double() * 128**-0.5
    p, gradient = torch.softmax(scores, 0), dout[0, row, head].double()
    torch.testing.assert_close(results.lse[0, head, row].double(), torch.logsumexp(scores, 0), rtol=1e-5, atol=1e-4)
    out = p @ values
    near(results.out[0, row, head], out, 2**-7)
    ds = p * (values @ gradient - out @ gradient)
    near(results.dq[0, row, head], 128**-0.5 * ds @ keys, 2**-5)


def check_key(results, q, k, v, dout, plan, row, head):
    """One row of dk and dv from all queries that see it, and their lse and out."""
    seen = [rows for rows, ranges in plan.runs if any(a <= row < b for a, b in ranges)]

    def queries(x):
        return torch.cat([x[0, a:b, head] for a, b in seen]).double()

    lse = torch.cat([results.lse[0, head, a:b] for a, b in seen]).double()
    p = torch.exp(queries(q) @ k[0, row, head].double() * 128**-0.5 - lse)
    gradients = queries(dout)
    near(results.dv[0, row, head], p @ gradients, 2**-5)
    ds = p * (gradients @ v[0, row, head].double() - (gradients * queries(results.out)).sum(-1))
    near(results.dk[0, row, head], 128**-0.5 * ds @ queries(q), 2**-5)


@DTYPES
def test_addresses_beyond_31_bits(dtype, seed):
    """Tokens and batch elements 2^30 elements apart, in storage that is touched nowhere else."""
    plan = AttentionPlan.from_ranges(3, 3, [((0, 3), [(0, 2), (2, 3)])])
    storage = torch.empty(2**31 + 2**25, dtype=dtype, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for shape, strides in (((1, 3, 2, 64), (128, 2**30, 64, 1)), ((3, 3, 2, 64), (2**30, 128, 64, 1))):
        far = [storage.as_strided(shape, strides, storage_offset=1024 * i) for i in range(4)]
        for x in far:
            x.copy_(torch.randn(shape, device=DEVICE, generator=generator))
        near_by = [x.contiguous() for x in far]
        results = [attend(*inputs[:3], plan, inputs[3]) for inputs in (near_by, far)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        check(*near_by[:3], plan, near_by[3])


@HEAD_DIMS
def test_repeats_to_the_bit(head_dim, seed):
    """100 times beside matrix products on a second stream: a race would show in some of them."""
    (q, k, v), gradients = draw(VIDEO, head_dim, torch.bfloat16, seed, heads=8, batch=2)
    first = attend(q, k, v, VIDEO, *gradients)
    beside, a = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE, dtype=torch.bfloat16)
    beside.wait_stream(torch.cuda.current_stream())
    for i in range(100):
        with torch.cuda.stream(beside):
            for _ in range(i % 4):
                a = torch.nn.functional.normalize(a @ a)
        again = attend(q, k, v, VIDEO, *gradients)
        assert [name for name in first._fields if not torch.equal(getattr(first, name), getattr(again, name))] == [], f"repeat {i}"
    torch.cuda.synchronize()


@HEAD_DIMS
@DTYPES
def test_nan_beyond_a_range_does_not_show(dtype, head_dim, seed):
    plan = ALL_PLANS["empty_run"]
    (q, k, v), gradients = draw(plan, head_dim, dtype, seed)
    clean, unseen = attend(q, k, v, plan, *gradients), ~plan.dense().any(0).to(DEVICE)
    assert 0 < unseen.sum() < plan.k_len
    for x in (k, v):
        x[:, unseen] = float("nan")
    again = attend(q, k, v, plan, *gradients)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
    assert (again.dk[:, unseen] == 0).all() and (again.dv[:, unseen] == 0).all()


@HEAD_DIMS
@DTYPES
def test_tangents_match_fp64(dtype, head_dim, seed):
    (q, k, v), _ = draw(VIDEO, head_dim, dtype, seed)
    tangents = testing.make_inputs(VIDEO, 2, head_dim, dtype, DEVICE, seed=seed + 1)

    def both(backend, *inputs):
        return torch.func.jvp(lambda *x: aadkern.attention(*x, VIDEO, backend=backend), inputs[:3], inputs[3:])

    ours = both("triton", q, k, v, *tangents)
    truth = both("reference", *(x.double() for x in (q, k, v, *tangents)))
    for actual, expected in zip(ours, truth, strict=True):
        assert (actual.double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_whole(head_dim, seed):
    (q, k, v), _ = draw(VIDEO, head_dim, torch.bfloat16, seed)

    def loss(q, k, v):
        return aadkern.attention(q, k, v, VIDEO, backend="triton").float().square().sum()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(loss, fullgraph=True)
    for ours, expected in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())
