"""The kernels for sm_90a on a GPU, against fp64: plans, layouts and scales drawn afresh, order of events, streams, graphs, devices.

What test_sm90_binding.py and the host model cannot show: that the instructions do what the model says, and that nothing goes
wrong at full speed. Each test stands alone. Unverified: not run on a GPU yet.
"""

from __future__ import annotations

import os
import random

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, plans, runtime, testing
from aadkern.range_attention import sm90

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [128, 64])
VIDEO = plans.block_causal(VideoLayout((1, 2, 2, 2), 390), Window(4, sink=1))
ALL_PLANS = {
    "block_causal": VIDEO,
    "teacher_forcing": plans.teacher_forcing(VideoLayout((1, 2, 2), 301), Window(3, sink=1)),
    "frame_isolated": plans.frame_isolated(VideoLayout((2, 2), 257)),
    "bidirectional": plans.bidirectional(VideoLayout((3,), 640)),
    "ring": AttentionPlan.from_ranges(512, 2000, [((0, 512), [(0, 128), (700, 1500), (130, 650), (1600, 2000)])]),
    "empty_run": AttentionPlan.from_ranges(600, 700, [((0, 200), [(0, 1), (5, 300)]), ((263, 600), [(299, 300), (301, 699)])]),
}


@pytest.fixture(autouse=True)
def served():
    reason = runtime.reason_against("sm90", "cuda")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def seed(record_property):
    """Drawn afresh at every run, so that runs add up, and told by the report of a failure; AADKERN_SEED repeats one."""
    drawn = int(os.environ.get("AADKERN_SEED", random.SystemRandom().randrange(2**31)))
    record_property("seed", drawn)
    print(f"AADKERN_SEED={drawn}")
    return drawn


def attend(q, k, v, plan, dout, dlse=None, scale=None, deterministic=False) -> testing.Results:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend="sm90", deterministic=deterministic)
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return testing.Results(out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients))


def check(q, k, v, plan, dout, dlse=None, scale=None, **options) -> None:
    actual = attend(q, k, v, plan, dout, dlse, scale, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    truth = testing.exact(q, k, v, plan, scale, dout, dlse)
    testing.assert_results_close(actual, truth, testing.eager(q, k, v, plan, scale, dout, dlse))


def draw(plan, head_dim, dtype, seed, heads=2, batch=1, layout="bshd", device="cuda"):
    q, k, v = testing.make_inputs(plan, heads, head_dim, dtype, device, batch=batch, seed=seed, layout=layout)
    return (q, k, v), testing.make_gradients(q, seed + 1)


@pytest.mark.parametrize("kernel", sm90.FORWARD_KERNELS)
@HEAD_DIMS
@DTYPES
def test_every_forward_kernel(kernel, dtype, head_dim, seed):
    """From the plainest up: the first that fails says where to look."""
    for plan in ALL_PLANS.values():
        (q, k, v), (dout, _) = draw(plan, head_dim, dtype, seed, batch=2)
        out, lse = sm90.forward(q, k, v, plan, head_dim**-0.5, kernel)
        truth, plain = (f(q, k, v, plan, head_dim**-0.5, dout) for f in (testing.exact, testing.eager))
        testing.assert_close_to_reference(out, truth.out, plain.out, "out")
        slack = 2.0**-22 * (1 + truth.lse[truth.lse.isfinite()].abs().max().item())
        testing.assert_close_to_reference(lse, truth.lse, plain.lse, "lse", slack)


def test_a_chunk_whose_last_keys_are_split(seed):
    """A chunk of 3 frames over 9, where 12 heads leave the fourth wave nearly empty: as in one piece, and the same every time."""
    plan = AttentionPlan.from_ranges(4680, 14040, [((0, 4680), [(0, 14040)])])
    (q, k, v), _ = draw(plan, 128, torch.bfloat16, seed, heads=12)
    if sm90.best_split(plan, 128, 176, 12, 128, sm90.multiprocessors(q.device)) is None:
        pytest.skip("these tiles fill the waves of this GPU")
    whole, whole_lse = sm90.forward(q, k, v, plan, 128**-0.5, split=False)
    out, lse = sm90.forward(q, k, v, plan, 128**-0.5)
    assert (out - whole).abs().max() <= 2.0**-7 * whole.abs().max() and (lse - whole_lse).abs().max() < 1e-4
    again = sm90.forward(q, k, v, plan, 128**-0.5)
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


@pytest.mark.parametrize("plan", ALL_PLANS.values(), ids=ALL_PLANS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "fixed_order"])
@HEAD_DIMS
@DTYPES
def test_results_of_every_plan(plan, dtype, head_dim, deterministic, seed):
    (q, k, v), gradients = draw(plan, head_dim, dtype, seed, heads=3, batch=2)
    check(q, k, v, plan, *gradients, deterministic=deterministic)


@pytest.mark.parametrize("plan", ALL_PLANS.values(), ids=ALL_PLANS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "fixed_order"])
@DTYPES
def test_80_query_rows_a_step(plan, dtype, deterministic, seed):
    (q, k, v), (dout, dlse) = draw(plan, 128, dtype, seed, heads=3, batch=2)
    scale = 128**-0.5
    out, lse = sm90.forward(q, k, v, plan, scale)
    gradients = sm90.backward(dout, dlse, q, k, v, out, lse, plan, scale, deterministic, rows=80)
    truth, plain = (f(q, k, v, plan, scale, dout, dlse) for f in (testing.exact, testing.eager))
    testing.assert_results_close(testing.Results(out, lse, *gradients), truth, plain)


@HEAD_DIMS
@DTYPES
def test_random_plans_and_layouts(dtype, head_dim, seed):
    rng = random.Random(seed)
    for i in range(24):
        plan = testing.random_plan(rng, 700, 900)
        layout, batch, heads = rng.choice(testing.LAYOUTS), rng.randint(1, 3), rng.randint(1, 5)
        (q, k, v), (dout, dlse) = draw(plan, head_dim, dtype, seed + i, heads, batch, layout)
        if rng.random() < 0.5:
            dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
        scale = rng.choice((None, 0.0, -0.2, 0.3))
        check(q, k, v, plan, dout, rng.choice((None, dlse)), scale, deterministic=rng.random() < 0.5)


@pytest.mark.parametrize("size", [0.1, 1.0, 5.0, 30.0])
@HEAD_DIMS
def test_sizes_of_inputs(size, head_dim, seed):
    """Real activations are not of unit size; in fp16 the yardstick, plain torch, overflows at the largest."""
    (q, k, v), gradients = draw(VIDEO, head_dim, torch.bfloat16, seed)
    check(size * q, size * k, v, VIDEO, *gradients)


def test_a_long_clip(seed):
    """21 latent frames at 480p: 32760 tokens. Two rows of queries and of keys in each chunk against fp64, by hand."""
    plan = plans.block_causal(VideoLayout.regular(21, 3, 1560), Window(9, sink=3))
    (q, k, v), (dout, _) = draw(plan, 128, torch.bfloat16, seed, heads=1)
    results = attend(q, k, v, plan, dout)
    assert all(x.isfinite().all() for x in results)
    rows = [row for start, end in (run for run, _ in plan.runs) for row in (start, end - 1)]
    for row in rows:
        seen = next(ranges for (start, end), ranges in plan.runs if start <= row < end)
        keys, values = (torch.cat([x[0, a:b, 0] for a, b in seen]).double() for x in (k, v))
        scores = keys @ q[0, row, 0].double() * 128**-0.5
        p = torch.softmax(scores, 0)
        torch.testing.assert_close(results.lse[0, 0, row].double(), torch.logsumexp(scores, 0), rtol=1e-5, atol=1e-4)
        expected = p @ values
        torch.testing.assert_close(results.out[0, row, 0].double(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())
        ds = p * (values @ dout[0, row, 0].double() - expected @ dout[0, row, 0].double())
        expected = 128**-0.5 * ds @ keys
        torch.testing.assert_close(results.dq[0, row, 0].double(), expected, rtol=2**-6, atol=2**-5 * expected.abs().max().item())


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "fixed_order"])
@HEAD_DIMS
def test_repeats(deterministic, head_dim, seed):
    """200 times beside matrix products on a second stream: out, lse, dk and dv to the bit, and dq in a fixed order."""
    (q, k, v), gradients = draw(VIDEO, head_dim, torch.bfloat16, seed, heads=8, batch=2)
    first = attend(q, k, v, VIDEO, *gradients, deterministic=deterministic)
    bitwise = [name for name in first._fields if deterministic or name != "dq"]
    beside, a = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    beside.wait_stream(torch.cuda.current_stream())
    for i in range(200):
        with torch.cuda.stream(beside):
            for _ in range(i % 4):
                a = torch.nn.functional.normalize(a @ a)
        again = attend(q, k, v, VIDEO, *gradients, deterministic=deterministic)
        differ = [name for name in bitwise if not torch.equal(getattr(first, name), getattr(again, name))]
        assert differ == [], f"repeat {i}"
    torch.cuda.synchronize()


def test_a_side_stream(seed):
    """What is launched there waits for what came before on that stream, and for nothing else."""
    (q, k, v), (dout, _) = draw(VIDEO, 128, torch.bfloat16, seed)
    expected = attend(q, k, v, VIDEO, dout, deterministic=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(20_000_000)
        late.copy_(q)
        aside = attend(late, k, v, VIDEO, dout, deterministic=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(aside, expected, strict=True))


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "fixed_order"])
def test_a_captured_graph(deterministic, seed):
    """Forward and backward, replayed on new inputs."""
    (q, k, v), (dout, dlse) = draw(VIDEO, 128, torch.bfloat16, seed)
    code, scale = VIDEO.code, 128**-0.5

    def both():
        out, lse = aadkern.ops.range_attention(q, k, v, code, scale, "sm90", deterministic)
        backward = aadkern.ops.range_attention_backward
        return testing.Results(out, lse, *backward(dout, dlse, q, k, v, out, lse, code, scale, "sm90", deterministic))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()  # makes the tables
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        for x in (q, k, v, dout):
            x.copy_(torch.randn_like(x))
        graph.replay()
        truth, plain = (f(q, k, v, VIDEO, scale, dout, dlse) for f in (testing.exact, testing.eager))
        testing.assert_results_close(captured, truth, plain)


def test_nan_beyond_a_range_and_memory_beyond_an_output(seed):
    """Keys that nobody sees are NaN, and so is memory from torch.empty (conftest.py): neither shows."""
    plan = ALL_PLANS["empty_run"]
    (q, k, v), gradients = draw(plan, 128, torch.bfloat16, seed)
    clean = attend(q, k, v, plan, *gradients, deterministic=True)
    unseen = ~plan.dense().any(0)
    assert 0 < unseen.sum() < plan.k_len
    for x in (k, v):
        x[:, unseen.to(x.device)] = float("nan")
    again = attend(q, k, v, plan, *gradients, deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
    assert (again.dk[:, unseen] == 0).all() and (again.dv[:, unseen] == 0).all()


def test_torch_asks_for_determinism(seed):
    (q, k, v), (dout, _) = draw(VIDEO, 64, torch.bfloat16, seed, heads=8)
    expected = attend(q, k, v, VIDEO, dout, deterministic=True).dq
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(attend(q, k, v, VIDEO, dout).dq, expected) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_current(seed):
    if (reason := runtime.reason_against("sm90", "cuda:1")) is not None:
        pytest.skip(reason)
    (q, k, v), (dout, _) = draw(VIDEO, 128, torch.bfloat16, seed, device="cuda:0")
    here = attend(q, k, v, VIDEO, dout, deterministic=True)
    there = attend(*(x.to("cuda:1") for x in (q, k, v)), VIDEO, dout.to("cuda:1"), deterministic=True)
    assert there.out.device.index == 1 and torch.cuda.current_device() == 0
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(here, there, strict=True))
