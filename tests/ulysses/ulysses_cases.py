"""For tests of sequence parallelism: the program that each of several processes runs, and what its cases share.

`python ulysses_cases.py COUNT CASE ...` runs the cases, in order, in COUNT processes of one group; an assertion that fails in one
of them fails the test, with what it printed.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aadkern import AttentionPlan, SequenceGroup, VideoLayout, Window, plans, spans, ulysses_attention
from aadkern.ulysses import enter, leave, merge_pooled
from aadkern.ulysses import group as ulysses_group
from aadkern.ulysses.api import by_frame

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


_groups: dict[int, dist.ProcessGroup] = {}


def group_of(size: int, tokens: int) -> SequenceGroup | None:
    """The group of the first ``size`` ranks, None on the others; every rank must call it, in one order."""
    if size not in _groups:
        _groups[size] = dist.new_group(range(size))
    return SequenceGroup(_groups[size], tokens) if dist.get_rank() < size else None


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-12) -> None:
    error = (actual - expected).abs().max().item() if actual.numel() else 0.0
    assert actual.shape == expected.shape and error <= tolerance, f"rank {dist.get_rank()}, {what}: off by {error}"


def random_plan(rng: random.Random, frames: int, keys: int, n: int) -> AttentionPlan:
    """Runs of whole frames that see up to three ranges of whole frames, some of them nothing."""
    edges = sorted({0, frames, *(rng.randrange(frames + 1) for _ in range(3))})
    runs = []
    for a, b in itertools.pairwise(edges):
        starts = [rng.randrange(keys) for _ in range(rng.randrange(4))]
        runs.append(((a * n, b * n), [(start * n, rng.randrange(start, keys + 1) * n) for start in starts]))
    return AttentionPlan.from_ranges(frames * n, keys * n, runs)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """The definition, [B, L, H, D], of queries that see nothing 0."""
    mask = plan.dense()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = torch.where(mask, scores, -torch.inf).softmax(-1)
    weights = torch.where(mask.any(1)[:, None], weights, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def sliced(x: Tensor, group: SequenceGroup) -> Tensor:
    """This rank's tokens of x [B, F n, ...], apart from it and with gradient if x has."""
    first, end = group.span
    part = x.detach().unflatten(1, (-1, group.tokens_per_frame))[:, :, first:end].flatten(1, 2).clone()
    return part.requires_grad_(x.requires_grad)


def compare_attention(group: SequenceGroup, plan: AttentionPlan, batch: int, heads: int, dim: int, seed: int, what: str) -> None:
    """One sequence in the group against the whole of it in fp64, outputs and gradients."""
    draws = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(batch, length, heads, dim, dtype=torch.float64, generator=draws)
        for length in (plan.q_len, plan.k_len, plan.k_len, plan.q_len)
    )
    whole = [x.requires_grad_() for x in (q, k, v)]
    expected = dense_attention(*whole, plan)
    grads = torch.autograd.grad(expected, whole, dout)
    local = [sliced(x, group) for x in whole]
    out = ulysses_attention(*local, plan, group)
    close(out, sliced(expected.detach(), group), what)
    for name, actual, grad in zip("qkv", torch.autograd.grad(out, local, sliced(dout, group)), grads, strict=True):
        close(actual, sliced(grad, group), f"{what}, d{name}")


def random_attention(sizes: list[int], count: int) -> None:
    rng = random.Random(5)  # the same on every rank
    for i in range(count):
        size = sizes[i % len(sizes)]
        n = rng.randrange(size, size + 4)
        frames, heads, batch, dim = rng.randrange(1, 7), rng.randrange(1, 14), rng.randrange(1, 3), rng.choice([2, 3, 8])
        plan = random_plan(rng, frames, rng.choice([frames, frames + 2]), n)
        group = group_of(size, n)
        if group is not None:
            what = f"case {i}: {size} ranks, {heads} heads, {frames} frames of {n}, {plan.runs}"
            compare_attention(group, plan, batch, heads, dim, i, what)


@case
def attention_up_to_four() -> None:
    random_attention([2, 3, 4], 24)
    layout, window = VideoLayout((1, 2, 2), 5), Window(3, sink=1)
    for size, heads in ((2, 3), (4, 6), (3, 4)):
        group = group_of(size, 5)
        if group is not None:
            for plan in (plans.bidirectional(layout), plans.block_causal(layout, window), plans.teacher_forcing(layout, window)):
                compare_attention(group, plan, 1, heads, 4, 77, f"{size} ranks, {heads} heads, {plan.runs}")


@case
def attention_up_to_eight() -> None:
    random_attention([5, 6, 7, 8], 24)
    group = group_of(8, 12)
    assert group is not None
    compare_attention(group, plans.bidirectional(VideoLayout((7,) * 3, 12)), 1, 12, 4, 77, "12 heads on 8 ranks, 21 frames")


@contextmanager
def operators_counted() -> Iterator[Counter[str]]:
    """How often each of our operators runs within."""
    seen: Counter[str] = Counter()

    @contextmanager
    def opener(name: str) -> Iterator[None]:
        seen[name] += 1
        yield

    with spans.opened_by(opener):
        yield seen


@case
def copies() -> None:
    """Where ranks divide the heads and every query sees every key, what arrives is what attention reads: one copy in, one out."""
    full, causal = plans.bidirectional(VideoLayout((3,), 7)), plans.block_causal(VideoLayout((1, 2), 7))
    for size, heads, plan, batch, packs in (
        (2, 4, full, 1, 1),
        (4, 4, full, 1, 1),
        (3, 6, full, 1, 1),
        (2, 4, full, 2, 2),
        (4, 6, full, 1, 2),
        (2, 4, causal, 1, 2),
    ):
        group = group_of(size, 7)
        if group is None:
            continue
        what = f"{size} ranks, {heads} heads, {batch} samples"
        compare_attention(group, plan, batch, heads, 4, 78, what)
        q, k, v = (torch.randn(batch, 3 * group.tokens, heads, 4).requires_grad_() for _ in range(3))
        with operators_counted() as forward:
            out = ulysses_attention(q, k, v, plan, group)
        with operators_counted() as backward:
            out.sum().backward()
        for direction, seen in (("forward", forward), ("backward", backward)):
            # The gradients of q, k and v are stacked by torch, and come back into the tensors.
            assert seen["ulysses_pack"] == packs and seen["ulysses_unpack"] == packs, f"{what}, {direction}: {dict(seen)}"


@case
def slices() -> None:
    """``enter`` and ``leave`` are what they say, and between them gradients are this rank's part times the ranks."""
    for size, n in ((2, 2), (3, 7), (4, 5)):
        group = group_of(size, n)
        if group is None:
            continue
        draws = torch.Generator().manual_seed(size)
        x, dout = (torch.randn(2, 3, n, 4, dtype=torch.float64, generator=draws) for _ in range(2))
        weight = torch.randn(4, dtype=torch.float64, generator=draws).requires_grad_()
        x.requires_grad_()
        inside = enter(x, group)
        close(inside, x[:, :, slice(*group.span)], f"enter on {size}")
        out = leave(inside * weight.tanh() * inside, group)
        expected = x * weight.tanh() * x
        close(out, expected, f"leave on {size}")
        (dx, dweight), (dx_whole, dweight_whole) = (torch.autograd.grad(y, (x, weight), dout) for y in (out, expected))
        close(dx, dx_whole, f"dx on {size}")
        dist.all_reduce(dweight, group=group.process_group)
        close(dweight / size, dweight_whole, f"the mean over {size} ranks of a weight's gradient")
        assert torch.equal(out, leave(out[:, :, slice(*group.span)].detach(), group)), "leave gives all ranks the same bytes"


@case
def dropped_factors() -> None:
    """The checks of gradients are sharp: without the factor of one end, they fail."""
    group = group_of(4, 5)
    assert group is not None
    draws = torch.Generator().manual_seed(6)
    x, dout = (torch.randn(1, 2, 5, 3, dtype=torch.float64, generator=draws) for _ in range(2))
    leaves = [x.requires_grad_(), torch.randn(3, dtype=torch.float64, generator=draws).requires_grad_()]

    def right() -> bool:
        y, weight = leaves
        dx, dweight = torch.autograd.grad(leave((enter(y, group) * weight).tanh(), group), leaves, dout)
        dist.all_reduce(dweight)
        expected = torch.autograd.grad((y * weight).tanh(), leaves, dout)
        return all(torch.allclose(a, b, rtol=1e-12) for a, b in zip((dx, dweight / 4), expected, strict=True))

    assert right()
    for end, factor in ((ulysses_group._Enter, 4.0), (ulysses_group._Leave, 0.25)):
        kept = end.backward

        def dropped(ctx: Any, grad: Tensor, kept: Any = kept, factor: float = factor) -> tuple[Tensor | None, ...]:
            first, *rest = kept(ctx, grad)
            return first * factor, *rest

        end.backward = staticmethod(dropped)  # type: ignore[assignment]
        assert not right(), end
        end.backward = staticmethod(kept)  # type: ignore[assignment]
    assert right()


@case
def pooling() -> None:
    """Each rank's softmax over its own tokens, merged, is the softmax over all."""
    for size, heads in ((2, 1), (4, 3)):
        group = group_of(size, 7)
        if group is None:
            continue
        draws = torch.Generator().manual_seed(size)
        scores = 9 * torch.randn(2, 3, 2, heads, 7, dtype=torch.float64, generator=draws)
        values = torch.randn(2, 3, 2, heads, 7, 4, dtype=torch.float64, generator=draws)
        dout = torch.randn(2, 3, 2, heads * 4, dtype=torch.float64, generator=draws)

        def pooled(s: Tensor, v: Tensor) -> Tensor:
            return (s.softmax(-1)[..., None] * v).sum(-2).flatten(-2)

        whole = [scores.requires_grad_(), values.requires_grad_()]
        expected = pooled(*whole)
        grads = torch.autograd.grad(expected, whole, dout)
        own = slice(*group.span)
        local = [scores[..., own].detach().requires_grad_(), values[..., own, :].detach().requires_grad_()]
        merged = merge_pooled(pooled(*local), local[0].logsumexp(-1), group)
        close(merged, expected, f"pooled on {size}")
        ds, dv = torch.autograd.grad(merged, local, dout)
        close(ds / size, grads[0][..., own], f"ds on {size}")
        close(dv / size, grads[1][..., own, :], f"dv on {size}")


@case
def refusals() -> None:
    group = group_of(4, 4)
    assert group is not None
    plan = plans.bidirectional(VideoLayout((2,), 4))
    q = torch.randn(1, 2, 3, 4)
    with raises(RuntimeError, "ulysses_attention is differentiable in reverse mode only"):
        torch.func.jvp(lambda x: ulysses_attention(x, x, x, plan, group), (q,), (q,))
    x, y, lse = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 1, 3), torch.randn(1, 2, 1, 3)
    for name, function, argument in (
        ("enter", lambda x: enter(x, group), x),
        ("leave", lambda y: leave(y, group), y),
        ("merge_pooled", lambda y: merge_pooled(y, lse, group), y),
    ):
        with raises(RuntimeError, f"{name} is differentiable in reverse mode only"):
            torch.func.jvp(function, (argument,), (argument,))
    q.requires_grad_()
    (first,) = torch.autograd.grad(ulysses_attention(q, q, q, plan, group).square().sum(), q, create_graph=True)
    with raises(RuntimeError, "once"):
        first.sum().backward()


@contextmanager
def raises(kind: type[Exception], words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"rank {dist.get_rank()}: no {kind.__name__} with {words!r}")


@case
def disagreements() -> None:
    """Ranks that come with other shapes, plans or gradients, seen before or not, all hear of it; and go on together."""
    group = group_of(4, 4)
    assert group is not None
    rank = dist.get_rank()

    def call(heads: int = 3, batch: int = 1, chunks: tuple[int, ...] = (2,), gradient: bool = False, cut: bool = False) -> None:
        plan = plans.block_causal(VideoLayout(chunks, 4))
        x = torch.randn(batch, sum(chunks) - cut, heads, 4, requires_grad=gradient)
        ulysses_attention(x, x, x, plan, group)

    call()
    call(heads=2)
    others = [{"heads": 2}, {"heads": 5}, {"batch": 2}, {"chunks": (1, 1)}, {"chunks": (3,)}, {"gradient": True}, {"cut": True}]
    for other in others:
        with raises(ValueError, "rank"):  # else they wait for one another for the minute that the group has
            call(**(other if rank == 2 else {}))  # type: ignore[arg-type]
        call()
    with raises(ValueError, "alike on all 4 ranks"):
        group.agree("x" * 900 + str(rank == 2), "what is said")


@case
def a_dead_rank() -> None:
    """The last case of a program, as its processes end here: the others hear of one that is gone."""
    group, rank = group_of(4, 4), dist.get_rank()
    assert group is not None
    plan, x = plans.bidirectional(VideoLayout((2,), 4)), torch.randn(1, 2, 3, 4)
    ulysses_attention(x, x, x, plan, group)
    dist.barrier()
    if rank == 3:
        os._exit(0)
    with raises(RuntimeError, ""):  # the group's own time is a minute, and its case two
        ulysses_attention(x, x, x, plan, group)
    time.sleep(1)  # a rank that ends first would be the one that the others hear of
    os._exit(0)


@case
def compiled() -> None:
    compare_compiled("aot_eager")


@case
def compiled_by_inductor() -> None:
    compare_compiled("inductor")
    torch._dynamo.reset()  # another number of heads is another program
    compare_compiled("inductor", heads=2, chunks=(3,))


def compare_compiled(backend: str, heads: int = 3, chunks: tuple[int, ...] = (1, 2)) -> None:
    """One graph, with uneven slices and heads, or whole ones of a clip that sees itself; its backward too."""
    group = group_of(2, 5)
    assert group is not None
    plan = plans.block_causal(VideoLayout(chunks, 5))
    draws = torch.Generator().manual_seed(3)
    q, k, v, dout = (sliced(torch.randn(1, 15, heads, 4, generator=draws), group) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = enter(leave(by_frame(2 * q, group.tokens), group), group).flatten(1, 2)
        return ulysses_attention(x, k, v, plan, group) * 3

    expected = layer(*inputs)
    grads = torch.autograd.grad(expected, inputs, dout)
    out = torch.compile(layer, fullgraph=True, backend=backend)(*inputs)
    close(out, expected, backend, 1e-5)
    for actual, grad in zip(torch.autograd.grad(out, inputs, dout), grads, strict=True):
        close(actual, grad, f"{backend}, gradient", 1e-5)


def run_cases(rank: int, count: int, names: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name in names:
        CASES[name]()
        dist.barrier()
    dist.destroy_process_group()


def main(words: list[str]) -> None:
    """``COUNT CASE ...``: forks that many processes after the imports, which cost more than the cases do. Fails as the first does,
    and ends the others then."""
    count, names = int(words[0]), words[1:]
    ranks: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                run_cases(rank, count, names)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        ranks[pid] = rank
    failed = False
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if status and not failed:
            failed = True
            time.sleep(2)  # the others may fail for the same reason
            for other in ranks:
                os.kill(other, signal.SIGABRT)
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
