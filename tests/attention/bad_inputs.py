"""What users get wrong or push to the edge, once for every backend of ``aadkern.attention``: exact, or an error that
names the argument.

Each case is a function of what it runs on, a backend with a device, dtype and head_dim; ``CASES`` lists them under the numbers of
the project's table of bad inputs (cases of packaging and of several ranks are tested elsewhere). ``test_bad_input.py``,
``test_sm90_binding.py`` and ``interpreter/test_bad_input_triton.py`` run them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


@dataclass(frozen=True)
class On:
    """What a case runs on: a backend, and the tensors that it is given where the case names no others."""

    backend: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    head_dim: int = 16

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}-{self.head_dim}"


def attention(on, q, k, v, plan, **options):
    return aadkern.attention(q, k, v, plan, backend=on.backend, deterministic=True, **options)


def attend(on, q, k, v, plan, dout=None, dlse=None, scale=None):
    """The five results; a gradient that is None is left to autograd."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(on, *leaves, plan, return_lse=True, scale=scale)
    pairs = [(x, g) for x, g in ((out, dout), (lse, dlse)) if g is not None]
    grads = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])
    return testing.Results(out.detach(), lse.detach(), *grads)


def check(on, q, k, v, plan, dout=None, dlse=None, scale=None):
    """All five results against fp64, all of them finite where the plan lets a row see anything."""
    if dout is None:
        dout, dlse = testing.make_gradients(q)
    actual = attend(on, q, k, v, plan, dout, dlse, scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    truth = testing.exact(q, k, v, plan, scale, dout, dlse)
    testing.assert_results_close(actual, truth, testing.eager(q, k, v, plan, scale, dout, dlse))
    return actual


def check_gradients(names, gradients, truth, plain):
    for name, gradient, expected, low in zip(names, gradients, truth, plain, strict=True):
        slack = 1e-5 * expected.abs().max().item()  # of p, as testing.assert_results_close says
        testing.assert_close_to_reference(gradient, expected, low, name, slack)


def inputs(on, plan=PLAN, heads=1, **options):
    options = {"head_dim": on.head_dim, "dtype": on.dtype, "device": on.device} | options
    return testing.make_inputs(plan, heads, **options)


@case(1)
def lengths_around_the_tile(on):
    for q_len, k_len in ((1, 1), (16, 33), (31, 17), (63, 32), (64, 15), (65, 64), (127, 1), (1, 128), (128, 128)):
        plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
        check(on, *inputs(on, plan), plan)


@case(2)
def few_queries_whose_lse_is_far_below_zero(on):
    for q_len in (1, 8):
        plan = AttentionPlan.from_ranges(q_len, 250, [((0, q_len), [(0, 250)])])
        q, k, v = inputs(on, plan)
        k = -10 * on.head_dim**0.5 * q[:, :1] / q[:, :1].norm() + 0.1 * k
        q = 20 * q[:, :1] / q[:, :1].norm() + 0.1 * q
        results = check(on, q, k, v, plan)
        assert (results.lse < -88).all() and all(x.isfinite().all() for x in results)


@case(3)
def queries_that_see_nothing(on):
    q, k, v = inputs(on, SPARSE)
    results = check(on, q, k, v, SPARSE)
    assert (results.out[:, 20:25] == 0).all() and (results.dq[:, 20:25] == 0).all()
    assert (results.lse[..., 20:25] == -math.inf).all()
    assert (results.dk[:, 36:] == 0).all() and (results.dv[:, 7:9] == 0).all()
    nothing = AttentionPlan.from_ranges(3, 5, [])
    results = attend(on, *inputs(on, nothing), nothing, torch.ones_like(inputs(on, nothing)[0]))
    assert all((x == 0).all() for x in (results.out, *results[2:])) and (results.lse == -math.inf).all()


@case(3)
def a_window_inside_one_chunk_and_a_sink_beyond_the_clip(on):
    layout = VideoLayout((2, 2), 5)
    for window in (Window(1), Window(None, sink=9), Window(10, sink=9)):
        plan = plans.block_causal(layout, window)
        check(on, *inputs(on, plan), plan)


@case(4)
def nothing_to_do(on):
    for batch, q_len, k_len, heads in ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0), (0, 0, 0, 0)):
        plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
        q, k, v = inputs(on, plan, heads=heads, batch=batch)
        results = attend(on, q, k, v, plan, torch.ones_like(q), torch.ones(batch, heads, q_len, device=on.device))
        assert results.out.shape == results.dq.shape == q.shape and results.dk.shape == results.dv.shape == k.shape
        assert results.lse.shape == (batch, heads, q_len) and (results.lse == -math.inf).all()
        assert all((x == 0).all() for x in (results.out, *results[2:]))


@case(5)
def offsets_beyond_31_bits(on):
    """Views of storage that is touched nowhere else: rows 2^30 and 2^22 elements apart, batch elements 2^30 apart."""
    size = on.head_dim
    storage = torch.empty(2**31 + 2**25, dtype=torch.float16 if on.dtype == torch.float32 else on.dtype, device=on.device)
    small = AttentionPlan.from_ranges(3, 3, [((0, 3), [(0, 3)])])
    long = AttentionPlan.from_ranges(515, 515, [((0, 512), [(0, 1)]), ((512, 515), [(0, 515)])])
    for plan, batch, strides in (
        (small, 1, (size, 2**30, size, 1)),
        (long, 1, (size, 2**22, size, 1)),
        (small, 3, (2**30, size, size, 1)),
    ):
        shape = (batch, plan.q_len, 1, size)
        far = [storage.as_strided(shape, strides, storage_offset=1024 * i) for i in range(4)]
        for x in far:
            x.copy_(torch.randn(x.shape))
        far[3][:, 3:-3] = 0  # or key 0 sums 512 gradients, in 16 bits 3 units off where plain torch is 1
        check(on, *far[:3], plan, far[3])


@case(6)
def strided_inputs_and_gradients(on):
    for layout in ("bhsd", "fused", "sliced"):
        q, k, v = inputs(on, heads=2, layout=layout, batch=2)
        dout, dlse = testing.make_gradients(q)
        check(on, q, k, v, PLAN, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse.mT.contiguous().mT)
    q, k, v = (x.transpose(2, 3) for x in inputs(on, heads=on.head_dim, head_dim=2))
    dout = torch.cat([testing.make_gradients(q)[0]] * 2, 2)[:, :, :2]
    check(on, q, k, v, PLAN, dout)


@case(7)
def gradients_of_stride_zero_or_none(on):
    q, k, v = inputs(on)
    check(on, q, k, v, PLAN, q.new_ones(()).expand(q.shape))
    dlse = torch.ones((), device=on.device).expand(1, 1, PLAN.q_len)
    both = attend(on, q, k, v, PLAN, torch.zeros_like(q), dlse)
    alone = attend(on, q, k, v, PLAN, None, dlse)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention(on, *leaves, PLAN).mean().backward()
    scale, dout = on.head_dim**-0.5, torch.full_like(q, 1 / q.numel())
    truth, plain = (f(q, k, v, PLAN, scale, dout)[2:] for f in (testing.exact, testing.eager))
    check_gradients("qkv", [x.grad for x in leaves], truth, plain)


@case(8)
def storage_that_begins_off_16_bytes(on):
    dtype = torch.float16 if on.dtype == torch.float32 else on.dtype
    q, k, v = inputs(on, heads=2, layout="misaligned", dtype=dtype)
    assert q.data_ptr() % 16 != 0
    dout, _, _ = inputs(on, heads=2, layout="misaligned", dtype=dtype, seed=9)
    check(on, q, k, v, PLAN, dout)


@case(9)
def expanded_keys_and_values(on):
    q, k, v = inputs(on, heads=3, batch=2, layout="expanded")
    check(on, q, k, v, PLAN)
    scale, (dout, _) = on.head_dim**-0.5, testing.make_gradients(q)
    one = [x[:1, :, :1].clone().requires_grad_() for x in (k, v)]
    wide = [x.expand(2, -1, 3, -1) for x in one]
    gradients = torch.autograd.grad(attention(on, q, *wide, PLAN), one, dout)
    made = [f(q, *wide, PLAN, scale, dout)[3:] for f in (testing.exact, testing.eager)]
    check_gradients("kv", gradients, *([x.sum((0, 2), keepdim=True) for x in both] for both in made))
    same, dout = q.detach()[:1].requires_grad_(), dout[:1]
    gradients = torch.autograd.grad(attention(on, same, same, same, PLAN), same, dout)
    made = [f(same, same, same, PLAN, scale, dout)[2:] for f in (testing.exact, testing.eager)]
    check_gradients(["q, k and v"], gradients, *([sum(three)] for three in made))


@case(10)
def dtypes_that_do_not_serve(on):
    q, k, v = inputs(on)
    with pytest.raises(TypeError, match="k must have q's dtype"):
        attention(on, q, k.double(), v, PLAN)
    with pytest.raises(TypeError, match="v must have q's dtype"):
        attention(on, q, k, v.half() if on.dtype != torch.float16 else v.bfloat16(), PLAN)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=r"q must be .*got torch\."):
            attention(on, *(x.to(dtype) for x in (q, k, v)), PLAN)
    for wrong in (None, [1.0], q.float().cpu().numpy()):
        with pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
            attention(on, q, wrong, v, PLAN)


@case(10)
def autocast_casts(on):
    """As torch's own attention: the cast, and nothing else; gradients come back in the inputs' dtype."""
    q, k, v = inputs(on)
    low = torch.float16 if on.dtype == torch.bfloat16 else torch.bfloat16
    dout, dlse = testing.make_gradients(q.to(low))
    plain = attend(on, q.to(low), k.to(low), v.to(low), PLAN, dout, dlse)
    with torch.autocast(on.device, dtype=low):
        cast = attend(on, q, k, v, PLAN, dout, dlse)
    assert cast.out.dtype == low and cast.dq.dtype == on.dtype
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(plain, cast, strict=True))


@case(11)
def devices_that_differ(on):
    q, k, v = inputs(on)
    with pytest.raises(ValueError, match=f"v must be on q's device {q.device}, got meta"):
        attention(on, q, k, v.to("meta"), PLAN)


@case(12)
def any_head_dim(on):
    for head_dim in (1, 3, 24, 96):
        if on.backend == "sm90":
            with pytest.raises(ValueError, match=f"serves head_dim 64 and 128, got {head_dim}"):
                attention(on, *inputs(on, SPARSE, head_dim=head_dim), SPARSE)
        else:
            check(on, *inputs(on, SPARSE, head_dim=head_dim), SPARSE)


@case(12)
def shapes_that_do_not_fit(on):
    q, k, v = inputs(on, heads=4)
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
            attention(on, *bad, PLAN)


@case(13)
def bad_values_stay_where_they_are_seen(on):
    q, k, v = inputs(on, SPARSE)
    gradients = testing.make_gradients(q)
    clean = attend(on, q, k, v, SPARSE, *gradients)
    first, second = (
        slice(0, 20),
        slice(25, 40),
    )  # the runs; keys 20 to 30 are seen by both, 0 to 3 by the first, 30 to 36 by the second
    for bad in (math.nan, math.inf, -math.inf):
        broken = q.clone()
        broken[0, 4] = bad
        results = attend(on, broken, k, v, SPARSE, *gradients)
        assert results.out[0, 4].isnan().all() and results.dq[0, 4].isnan().all()
        others = [i for i in range(40) if i != 4]
        for name in ("out", "dq"):
            assert torch.equal(getattr(results, name)[:, others], getattr(clean, name)[:, others]), name
        for name in ("dk", "dv"):
            assert torch.equal(getattr(results, name)[:, 30:], getattr(clean, name)[:, 30:]), name

        unseen_k, unseen_v = k.clone(), v.clone()
        unseen_k[0, 7:9] = unseen_v[0, 7:9] = unseen_k[0, 36] = unseen_v[0, 36] = bad
        results = attend(on, q, unseen_k, unseen_v, SPARSE, *gradients)
        assert all(torch.equal(a, b) for a, b in zip(results, clean, strict=True))

        for seen_k in (True, False):
            broken_k, broken_v = k.clone(), v.clone()
            (broken_k if seen_k else broken_v)[0, 33] = bad
            results = attend(on, q, broken_k, broken_v, SPARSE, *gradients)
            assert torch.equal(results.out[:, first], clean.out[:, first])
            assert torch.equal(results.dq[:, first], clean.dq[:, first])
            assert torch.equal(results.dk[:, :3], clean.dk[:, :3])
            assert not results.out[:, second].isfinite().all() or seen_k


def by_the_rule(q, k, v, plan, scale, dout, dlse):
    """The contract, a query at a time, of one batch element and head: p = exp(score - lse) over the keys in view; lse is -inf where
    none is or all scores are, +inf where one is, else NaN where one is."""
    q, k, v, dout, dlse = (x.detach().double().cpu() for x in (q[0, :, 0], k[0, :, 0], v[0, :, 0], dout[0, :, 0], dlse[0, 0]))
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    lse = torch.full((len(q),), -math.inf, dtype=torch.float64)
    for i, seen in enumerate(plan.dense()):
        scores = scale * (k[seen] @ q[i])
        if not len(scores) or (scores == -math.inf).all():
            p, slope = torch.zeros_like(scores), 0.0
        else:
            lse[i] = math.inf if (scores == math.inf).any() else torch.logsumexp(scores, 0)
            p, slope = (scores - lse[i]).exp(), dlse[i]
        out[i] = (p[:, None] * v[seen]).sum(0)
        ds = scale * p * (v[seen] @ dout[i] - out[i] @ dout[i] + slope)
        dq[i] = (ds[:, None] * k[seen]).sum(0)
        dk[seen] += ds[:, None] * q[i]
        dv[seen] += p[:, None] * dout[i]
    return out, lse, dq, dk, dv


@case(13)
def scores_that_are_infinite(on):
    far = AttentionPlan.from_ranges(40, 70, [((0, 20), [(0, 7), (9, 63)]), ((25, 40), [(3, 4), (20, 36)])])
    scale, dense = 1 / math.sqrt(on.head_dim), far.dense()
    for planted in (
        [(dense[0].nonzero()[:, 0], -math.inf)],
        [(dense[30].nonzero()[:, 0], -math.inf)],
        [(9, -math.inf), (62, math.inf), (3, -math.inf)],
        [(2, math.inf)],
        [(2, -math.inf), (34, math.inf)],
        [(34, math.nan), (5, -math.inf)],
        [(12, math.nan), (34, math.inf), (20, -math.inf)],
    ):
        q, k, v = inputs(on, far)
        q = q.abs() + 0.1  # so that an infinite key gives infinite scores of its own sign
        for keys, value in planted:
            k[:, keys] = value
        dout, dlse = testing.make_gradients(q)
        nothing = by_the_rule(q, k, v, far, scale, dout, dlse)[1] == -math.inf
        dlse[..., nothing.to(dlse.device)] = math.nan  # which is not used there
        results, expected = attend(on, q, k, v, far, dout, dlse), by_the_rule(q, k, v, far, scale, dout, dlse)
        for name, actual, truth in zip(results._fields, results, expected, strict=True):
            actual = (actual[0, 0] if name == "lse" else actual[0, :, 0]).double().cpu()
            torch.testing.assert_close(actual, truth, rtol=0.03, atol=0.03, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@case(14)
def scores_of_ten_thousand(on):
    q, k, v = inputs(on)
    if on.dtype != torch.float16:  # in which plain torch, the yardstick, overflows
        size = 200 if on.dtype == torch.float32 else 100
        results = check(on, size * q, size * k, v, PLAN)
        assert results.lse.abs().max() > 1e4 and all(x.isfinite().all() for x in results)
    if on.dtype != torch.bfloat16:
        size = 40 * (16 / on.head_dim) ** 0.25
        check(on, *((x * by).half() for x, by in zip((q, k, v), (size, size, 1), strict=True)), PLAN)


@case(14)
def scales(on):
    q, k, v = inputs(on)
    for scale in (0.0, -0.5, 3):
        check(on, q, k, v, PLAN, scale=scale)
    for scale in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="scale must be finite"):
            attention(on, q, k, v, PLAN, scale=scale)
    for scale in ("1", torch.ones(2), 1j):
        with pytest.raises(TypeError, match="scale must be"):
            attention(on, q, k, v, PLAN, scale=scale)


@case(16)
def masks_that_are_not_plans(on):
    q, k, v = inputs(on)
    block_mask = PLAN.block_mask()
    for wrong in (block_mask, block_mask[:, :, :1], PLAN.dense(), PLAN.code, lambda b, h, i, j: i >= j, None):
        with pytest.raises(TypeError, match=r"plan must be an aadkern\.AttentionPlan"):
            attention(on, q, k, v, wrong)


@case(17)
def gradients_wanted_of_some_inputs_or_none(on):
    q, k, v = inputs(on)
    dout, dlse = testing.make_gradients(q)
    full = attend(on, q, k, v, PLAN, dout, dlse)
    for i, x in enumerate((q, k, v)):
        leaf = x.clone().requires_grad_()
        out, lse = attention(on, *(leaf if j == i else y for j, y in enumerate((q, k, v))), PLAN, return_lse=True)
        (grad,) = torch.autograd.grad([out, lse], [leaf], [dout, dlse])
        assert torch.equal(grad, full[2 + i])
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            out = attention(on, *(x.clone().requires_grad_() for x in (q, k, v)), PLAN)
            assert not out.requires_grad and torch.equal(out, full.out)


@case(17)
def a_second_derivative(on):
    q, k, v = (x.requires_grad_() for x in inputs(on))
    out = attention(on, q, k, v, PLAN)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(grad.sum(), q)


@case(17)
@pytest.mark.filterwarnings("error:There is a performance drop")  # one call, not a loop
def vmap(on):
    q, k, v = inputs(on)
    many = torch.stack([q, 2 * q])
    together = torch.vmap(lambda one: attention(on, one, k, v, PLAN))(many)
    for one, out in zip(many, together, strict=True):
        assert torch.equal(out, attention(on, one, k, v, PLAN))


@case(18)
def compiled_for_changing_batch_sizes(on):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, name = CompileCounterWithBackend("aot_eager"), on.backend

    @torch.compile(fullgraph=True, backend=counter)
    def f(q, k, v):
        return aadkern.attention(2 * q, k, v, PLAN, backend=name, deterministic=True) + 1

    for batch in (1, 2, 3):
        q, k, v = (x.requires_grad_() for x in inputs(on, batch=batch))
        out = f(q, k, v)
        expected = attention(on, 2 * q, k, v, PLAN) + 1
        torch.testing.assert_close(out, expected)
        ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
        torch.testing.assert_close(ours, theirs)
    assert counter.frame_count <= 2


@case(18)
def recomputed_under_checkpointing(on):
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.requires_grad_() for x in inputs(on))

    def f(q, k, v):
        return attention(on, q.sin(), k, v, PLAN).cos()

    plain = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    again = torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@case(19)
def repeated(on):
    q, k, v = inputs(on, SPARSE)
    gradients = testing.make_gradients(q)
    first = attend(on, q, k, v, SPARSE, *gradients)
    for _ in range(3 if on.device == "cpu" and on.backend in ("triton", "sm90") else 200):
        assert all(torch.equal(a, b) for a, b in zip(first, attend(on, q, k, v, SPARSE, *gradients), strict=True))


@case(20)
def backends_that_cannot_serve(on):
    q, k, v = inputs(on)
    with pytest.raises(TypeError, match="deterministic must be True or False, got 'yes'"):
        aadkern.attention(q, k, v, PLAN, backend=on.backend, deterministic="yes")
    with pytest.raises(ValueError, match=rf"backend must be one of .*{on.backend}.* got 'cudnn'"):
        aadkern.attention(q, k, v, PLAN, backend="cudnn")
    if on.backend == "sm90":
        with pytest.raises(TypeError, match=r"'sm90' serves bfloat16 and float16, got q of torch\.float32"):
            attention(on, q.float(), k.float(), v.float(), PLAN)
    elif on.device == "cpu":
        with pytest.raises(ValueError, match="'sm90' cannot serve"):
            aadkern.attention(q, k, v, PLAN, backend="sm90")


@case(22)
def inputs_are_left_alone(on):
    q, k, v = inputs(on)
    dout, dlse = testing.make_gradients(q)
    before = [x.clone() for x in (q, k, v, dout, dlse)]
    results = attend(on, q, k, v, PLAN, dout, dlse)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v, dout, dlse), strict=True))
    storages = {x.untyped_storage().data_ptr() for x in (q, k, v, dout, dlse)}
    assert storages.isdisjoint(x.untyped_storage().data_ptr() for x in results)
