"""What users get wrong or push to the edge, once for every backend of ``aadkern.attention``: exact, or an error that
names the argument.

Each case is a function of the backend's name; ``CASES`` lists them under the numbers of the project's table of bad
inputs (cases of packaging and of several ranks are tested elsewhere). ``test_bad_input.py`` and
``interpreter/test_bad_input_triton.py`` run them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, plans, testing

CASES: list = []
PLAN = plans.block_causal(VideoLayout((1, 2, 2), 7), Window(4, sink=1))
SPARSE = AttentionPlan.from_ranges(40, 37, [((0, 20), [(0, 7), (9, 30)]), ((25, 40), [(3, 4), (20, 36)])])


def case(number: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        CASES.append(pytest.param(function, id=f"{number}-{function.__name__}"))
        return function

    return register


def attend(backend, q, k, v, plan, dout=None, dlse=None, scale=None):
    """The five results; a gradient that is None is left to autograd."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend=backend)
    pairs = [(x, g) for x, g in ((out, dout), (lse, dlse)) if g is not None]
    grads = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])
    return testing.Results(out.detach(), lse.detach(), *grads)


def check(backend, q, k, v, plan, dout=None, dlse=None, scale=None):
    """All five results against fp64, all of them finite where the plan lets a row see anything."""
    if dout is None:
        dout, dlse = testing.make_gradients(q)
    actual = attend(backend, q, k, v, plan, dout, dlse, scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    truth = testing.exact(q, k, v, plan, scale, dout, dlse)
    testing.assert_results_close(actual, truth, testing.eager(q, k, v, plan, scale, dout, dlse))
    return actual


def inputs(plan=PLAN, heads=1, head_dim=16, dtype=torch.float32, **options):
    return testing.make_inputs(plan, heads, head_dim, dtype, **options)


@case(1)
def lengths_around_the_tile(backend):
    for q_len, k_len in ((1, 1), (16, 33), (31, 17), (63, 32), (64, 15), (65, 64), (127, 1), (1, 128), (128, 128)):
        plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
        check(backend, *inputs(plan), plan)


@case(2)
def few_queries_whose_lse_is_far_below_zero(backend):
    for q_len in (1, 8):
        plan = AttentionPlan.from_ranges(q_len, 250, [((0, q_len), [(0, 250)])])
        q, k, v = inputs(plan)
        k = -40 * q[:, :1] / q[:, :1].norm() + 0.1 * k
        q = 20 * q[:, :1] / q[:, :1].norm() + 0.1 * q
        results = check(backend, q, k, v, plan)
        assert (results.lse < -88).all() and all(x.isfinite().all() for x in results)


@case(3)
def queries_that_see_nothing(backend):
    q, k, v = inputs(SPARSE)
    results = check(backend, q, k, v, SPARSE)
    assert (results.out[:, 20:25] == 0).all() and (results.dq[:, 20:25] == 0).all()
    assert (results.lse[..., 20:25] == -math.inf).all()
    assert (results.dk[:, 36:] == 0).all() and (results.dv[:, 7:9] == 0).all()
    nothing = AttentionPlan.from_ranges(3, 5, [])
    results = attend(backend, *inputs(nothing), nothing, torch.ones(1, 3, 1, 16))
    assert all((x == 0).all() for x in (results.out, *results[2:])) and (results.lse == -math.inf).all()


@case(3)
def a_window_inside_one_chunk_and_a_sink_beyond_the_clip(backend):
    layout = VideoLayout((2, 2), 5)
    for window in (Window(1), Window(None, sink=9), Window(10, sink=9)):
        plan = plans.block_causal(layout, window)
        check(backend, *inputs(plan), plan)


@case(4)
def nothing_to_do(backend):
    for batch, q_len, k_len, heads in ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0), (0, 0, 0, 0)):
        plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
        q, k, v = inputs(plan, heads=heads, batch=batch)
        results = attend(backend, q, k, v, plan, torch.ones_like(q), torch.ones(batch, heads, q_len))
        assert results.out.shape == results.dq.shape == q.shape and results.dk.shape == results.dv.shape == k.shape
        assert results.lse.shape == (batch, heads, q_len) and (results.lse == -math.inf).all()
        assert all((x == 0).all() for x in (results.out, *results[2:]))


@case(5)
def offsets_beyond_31_bits(backend):
    """Views of storage that is touched nowhere else: rows 2^30 and 2^22 elements apart, batch elements 2^30 apart."""
    storage = torch.empty(2**31 + 2**25, dtype=torch.float16)
    small = AttentionPlan.from_ranges(3, 3, [((0, 3), [(0, 3)])])
    long = AttentionPlan.from_ranges(515, 515, [((0, 512), [(0, 1)]), ((512, 515), [(0, 515)])])
    for plan, batch, strides in (
        (small, 1, (16, 2**30, 16, 1)),
        (long, 1, (16, 2**22, 16, 1)),
        (small, 3, (2**30, 16, 16, 1)),
    ):
        shape = (batch, plan.q_len, 1, 16)
        far = [storage.as_strided(shape, strides, storage_offset=1024 * i) for i in range(4)]
        for x in far:
            x.copy_(torch.randn(x.shape))
        check(backend, *far[:3], plan, far[3])


@case(6)
def strided_inputs_and_gradients(backend):
    for layout in ("bhsd", "fused", "sliced"):
        q, k, v = inputs(heads=2, layout=layout, batch=2)
        dout, dlse = testing.make_gradients(q)
        check(backend, q, k, v, PLAN, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse.mT.contiguous().mT)
    q, k, v = (x.transpose(2, 3) for x in inputs(heads=16, head_dim=2))
    dout = torch.cat([testing.make_gradients(q)[0]] * 2, 2)[:, :, :2]
    check(backend, q, k, v, PLAN, dout)


@case(7)
def gradients_of_stride_zero_or_none(backend):
    q, k, v = inputs()
    check(backend, q, k, v, PLAN, torch.ones(()).expand(q.shape))
    dlse = torch.ones(()).expand(1, 1, PLAN.q_len)
    both = attend(backend, q, k, v, PLAN, torch.zeros_like(q), dlse)
    alone = attend(backend, q, k, v, PLAN, None, dlse)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    aadkern.attention(*leaves, PLAN, backend=backend).mean().backward()
    truth = testing.exact(q, k, v, PLAN, 0.25, torch.full_like(q, 1 / q.numel()))
    for x, expected in zip(leaves, truth[2:], strict=True):
        torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-7)


@case(8)
def storage_that_begins_off_16_bytes(backend):
    q, k, v = inputs(heads=2, layout="misaligned", dtype=torch.float16)
    assert q.data_ptr() % 16 != 0
    dout = testing.make_inputs(PLAN, 2, 16, torch.float16, layout="misaligned", seed=9)[0]
    check(backend, q, k, v, PLAN, dout)


@case(9)
def expanded_keys_and_values(backend):
    q, k, v = inputs(heads=3, batch=2, layout="expanded")
    check(backend, q, k, v, PLAN)
    one = [x[:1, :, :1].clone().requires_grad_() for x in (k, v)]
    out = aadkern.attention(q, *(x.expand(2, -1, 3, -1) for x in one), PLAN, backend=backend)
    dout, _ = testing.make_gradients(q)
    truth = testing.exact(q, *(x.expand(2, -1, 3, -1) for x in one), PLAN, 0.25, dout)
    for grad, expected in zip(torch.autograd.grad(out, one, dout), truth[3:], strict=True):
        torch.testing.assert_close(grad.double(), expected.sum((0, 2), keepdim=True), rtol=1e-4, atol=1e-5)
    same = q.detach()[:1].requires_grad_()
    (grad,) = torch.autograd.grad(aadkern.attention(same, same, same, PLAN, backend=backend), same, dout[:1])
    truth = testing.exact(same, same, same, PLAN, 0.25, dout[:1])
    torch.testing.assert_close(grad.double(), truth.dq + truth.dk + truth.dv, rtol=1e-4, atol=1e-5)


@case(10)
def dtypes_that_do_not_serve(backend):
    q, k, v = inputs()
    with pytest.raises(TypeError, match="k must have q's dtype"):
        aadkern.attention(q, k.half(), v, PLAN, backend=backend)
    with pytest.raises(TypeError, match="v must have q's dtype"):
        aadkern.attention(q, k, v.double(), PLAN, backend=backend)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"q must be .*got torch\."):
            aadkern.attention(*(x.to(dtype) for x in (q, k, v)), PLAN, backend=backend)
    for wrong in (None, [1.0], q.numpy()):
        with pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
            aadkern.attention(q, wrong, v, PLAN, backend=backend)


@case(10)
def autocast_changes_nothing(backend):
    q, k, v = inputs()
    dout, dlse = testing.make_gradients(q)
    plain = attend(backend, q, k, v, PLAN, dout, dlse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = attend(backend, q, k, v, PLAN, dout, dlse)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@case(11)
def devices_that_differ(backend):
    q, k, v = inputs()
    with pytest.raises(ValueError, match="v must be on q's device cpu, got meta"):
        aadkern.attention(q, k, v.to("meta"), PLAN, backend=backend)


@case(12)
def any_head_dim(backend):
    for head_dim in (1, 3, 24, 96):
        check(backend, *inputs(SPARSE, head_dim=head_dim), SPARSE)


@case(12)
def shapes_that_do_not_fit(backend):
    q, k, v = inputs(heads=4)
    for name, bad in (
        ("q", (q[:, 1:], k, v)),
        ("q", (q[0], k, v)),
        ("q", (q[..., :0], k[..., :0], v[..., :0])),
        ("k", (q, k[:, 1:], v)),
        ("k", (q, k[:, :, :2], v)),  # fewer key heads than query heads
        ("k", (q, k[..., :8], v)),
        ("v", (q, k, v[..., :8])),
        ("v", (q, k, v.expand(2, -1, -1, -1))),
        ("v", (q, k, v[:, :-1])),
    ):
        with pytest.raises(ValueError, match=rf"attention: {name} must .*got"):
            aadkern.attention(*bad, PLAN, backend=backend)


@case(13)
def bad_values_stay_where_they_are_seen(backend):
    q, k, v = inputs(SPARSE)
    gradients = testing.make_gradients(q)
    clean = attend(backend, q, k, v, SPARSE, *gradients)
    first, second = (
        slice(0, 20),
        slice(25, 40),
    )  # the runs; keys 20 to 30 are seen by both, 0 to 3 by the first, 30 to 36 by the second
    for bad in (math.nan, math.inf, -math.inf):
        broken = q.clone()
        broken[0, 4] = bad
        results = attend(backend, broken, k, v, SPARSE, *gradients)
        assert results.out[0, 4].isnan().all() and results.dq[0, 4].isnan().all()
        others = [i for i in range(40) if i != 4]
        for name in ("out", "dq"):
            assert torch.equal(getattr(results, name)[:, others], getattr(clean, name)[:, others]), name
        for name in ("dk", "dv"):
            assert torch.equal(getattr(results, name)[:, 30:], getattr(clean, name)[:, 30:]), name

        unseen_k, unseen_v = k.clone(), v.clone()
        unseen_k[0, 7:9] = unseen_v[0, 7:9] = unseen_k[0, 36] = unseen_v[0, 36] = bad
        results = attend(backend, q, unseen_k, unseen_v, SPARSE, *gradients)
        assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))

        for seen_k in (True, False):
            broken_k, broken_v = k.clone(), v.clone()
            (broken_k if seen_k else broken_v)[0, 33] = bad
            results = attend(backend, q, broken_k, broken_v, SPARSE, *gradients)
            assert torch.equal(results.out[:, first], clean.out[:, first])
            assert torch.equal(results.dq[:, first], clean.dq[:, first])
            assert torch.equal(results.dk[:, :3], clean.dk[:, :3])
            assert not results.out[:, second].isfinite().all() or seen_k


@case(14)
def scores_of_ten_thousand(backend):
    q, k, v = inputs()
    q, k = 200 * q, 200 * k
    results = check(backend, q, k, v, PLAN)
    assert results.lse.abs().max() > 1e4 and all(x.isfinite().all() for x in results)
    half = [(x * size).half() for x, size in zip((q, k, v), (0.2, 0.2, 1), strict=True)]
    check(backend, *half, PLAN)


@case(14)
def scales(backend):
    q, k, v = inputs()
    for scale in (0.0, -0.5, 3):
        check(backend, q, k, v, PLAN, scale=scale)
    for scale in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="scale must be finite"):
            aadkern.attention(q, k, v, PLAN, scale=scale, backend=backend)
    for scale in ("1", torch.ones(2), 1j):
        with pytest.raises(TypeError, match="scale must be"):
            aadkern.attention(q, k, v, PLAN, scale=scale, backend=backend)


@case(16)
def masks_that_are_not_plans(backend):
    q, k, v = inputs()
    block_mask = PLAN.block_mask()
    for wrong in (block_mask, block_mask[:, :, :1], PLAN.dense(), PLAN.code, lambda b, h, i, j: i >= j, None):
        with pytest.raises(TypeError, match=r"plan must be an aadkern\.AttentionPlan"):
            aadkern.attention(q, k, v, wrong, backend=backend)


@case(17)
def gradients_wanted_of_some_inputs_or_none(backend):
    q, k, v = inputs()
    dout, dlse = testing.make_gradients(q)
    full = attend(backend, q, k, v, PLAN, dout, dlse)
    for i, x in enumerate((q, k, v)):
        leaf = x.clone().requires_grad_()
        out, lse = aadkern.attention(
            *(leaf if j == i else y for j, y in enumerate((q, k, v))), PLAN, return_lse=True, backend=backend
        )
        (grad,) = torch.autograd.grad([out, lse], [leaf], [dout, dlse])
        assert torch.equal(grad, full[2 + i])
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            out = aadkern.attention(*(x.clone().requires_grad_() for x in (q, k, v)), PLAN, backend=backend)
            assert not out.requires_grad and torch.equal(out, full.out)


@case(17)
def a_second_derivative(backend):
    q, k, v = (x.requires_grad_() for x in inputs())
    out = aadkern.attention(q, k, v, PLAN, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), q)


@case(17)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def vmap(backend):
    q, k, v = inputs()
    many = torch.stack([q, 2 * q])
    together = torch.vmap(lambda one: aadkern.attention(one, k, v, PLAN, backend=backend))(many)
    for one, out in zip(many, together, strict=True):
        assert torch.equal(out, aadkern.attention(one, k, v, PLAN, backend=backend))


@case(18)
def compiled_for_changing_batch_sizes(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def f(q, k, v):
        return aadkern.attention(2 * q, k, v, PLAN, backend=backend) + 1

    for batch in (1, 2, 3):
        q, k, v = (x.requires_grad_() for x in inputs(batch=batch))
        out = f(q, k, v)
        expected = aadkern.attention(2 * q, k, v, PLAN, backend=backend) + 1
        torch.testing.assert_close(out, expected)
        ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2


@case(18)
def recomputed_under_checkpointing(backend):
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.requires_grad_() for x in inputs())

    def f(q, k, v):
        return aadkern.attention(q.sin(), k, v, PLAN, backend=backend).cos()

    plain = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    again = torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@case(19)
def repeated(backend):
    q, k, v = inputs(SPARSE)
    gradients = testing.make_gradients(q)
    first = attend(backend, q, k, v, SPARSE, *gradients)
    for _ in range(3 if backend == "triton" else 200):
        assert all(torch.equal(a, b) for a, b in zip(first, attend(backend, q, k, v, SPARSE, *gradients), strict=True))


@case(20)
def backends_that_cannot_serve(backend):
    q, k, v = inputs()
    with pytest.raises(ValueError, match=rf"backend must be one of .*{backend}.* got 'cudnn'"):
        aadkern.attention(q, k, v, PLAN, backend="cudnn")
    with pytest.raises(ValueError, match="'sm90' cannot serve"):
        aadkern.attention(q, k, v, PLAN, backend="sm90")


@case(22)
def inputs_are_left_alone(backend):
    q, k, v = inputs()
    dout, dlse = testing.make_gradients(q)
    before = [x.clone() for x in (q, k, v, dout, dlse)]
    results = attend(backend, q, k, v, PLAN, dout, dlse)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, dout, dlse), strict=True))
    storages = {x.untyped_storage().data_ptr() for x in (q, k, v, dout, dlse)}
    assert storages.isdisjoint(x.untyped_storage().data_ptr() for x in results)
