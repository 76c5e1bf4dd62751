"""QK-norm and positions straight into an exchange's buffer, interpreted on the CPU, against the norm and then the gather copy."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from aadkern import VideoLayout, blocks, ops, plans
from aadkern.blocks import RotaryGrid, triton_qk_norm_rope_pack
from aadkern.ulysses.exchange import Moves, rows_sent, to_heads
from aadkern.ulysses.group import spans_of
from aadkern.ulysses.ops import split, ulysses_pack, ulysses_unpack
from aadkern.ulysses.shares import work_of
from tests.processes import run_processes
from tests.ulysses_cases import random_plan

EPS = 1e-5


def flat(boxes):
    return [number for group in boxes for box in group for number in box]


def one_rank(rank: int, ranks: int, heads: int, frames: int, height: int, width: int, keep: bool, plan=None) -> tuple[Moves, tuple]:
    n = height * width
    plan = plan or plans.bidirectional(VideoLayout((frames,), n))
    spans = spans_of(n, ranks)
    return to_heads(work_of(plan, heads, ranks, n, keep), rank, spans, heads, frames, frames), spans[rank]


def compare(moves: Moves, span: tuple[int, int], batch: int, frames: int, grid: RotaryGrid, heads: int, dim: int, dtype) -> None:
    """The buffer to the bit; gradients to rounding, as copies are summed in float32 here and in the tensors' dtype there."""
    n_r = span[1] - span[0]
    q, k, v = (torch.randn(batch, frames * n_r, heads, dim).to(dtype).requires_grad_() for _ in range(3))
    q_weight, k_weight = ((1 + 0.3 * torch.randn(heads * dim)).requires_grad_() for _ in range(2))
    turns = grid.turns(dim, dtype, q.device).within(*span)
    table, rows = rows_sent(moves, batch)
    packed = ops.qk_norm_rope_pack(
        q, k, v, q_weight, k_weight, turns.axes, torch.tensor(table, dtype=torch.int32), turns.numbers(dim), EPS, rows
    )
    normed = blocks.qk_norm_rope(q, k, q_weight, k_weight, turns, eps=EPS, backend="triton")
    parts = [x.detach().unflatten(1, (frames, n_r)) for x in (*normed, v)]
    boxes = flat(moves.sent)
    assert torch.equal(packed, ulysses_pack(*parts, None, None, boxes, moves.together))
    dout = torch.randn_like(packed)
    leaves = (q, k, v, q_weight, k_weight)
    ours = torch.autograd.grad(packed, leaves, dout)
    shapes = [number for shape in moves.shapes for number in shape]
    back = ulysses_unpack(dout.float(), boxes, moves.together, shapes, batch, dim)
    dq, dk, dv = (x.flatten(1, 2) for x in split(back, shapes, batch, dim))
    exact = torch.autograd.grad(normed, (q, k, q_weight, k_weight), [dq.to(dtype), dk.to(dtype)])
    for mine, theirs in zip(ours, (*exact[:2], dv.to(dtype), *exact[2:]), strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-2 if dtype == torch.float16 else 1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("heads", "ranks", "batch"), [(4, 2, 2), (3, 2, 1), (2, 5, 2)])  # whole heads; 1.5; several ranks a head
def test_the_buffer_is_that_of_norm_and_copy(monkeypatch, dtype, heads, ranks, batch):
    monkeypatch.setattr(triton_qk_norm_rope_pack, "PROGRAMS", 3)
    grid = RotaryGrid(range(2, 4), 2, 3)
    moves, span = one_rank(ranks - 1, ranks, heads, 2, 2, 3, batch == 1)
    assert moves.together == (3 if heads % ranks == 0 else 1)
    compare(moves, span, batch, 2, grid, heads, 6, dtype)


@pytest.mark.slow
def test_random_plans():
    rng = random.Random(4)
    for _ in range(6):
        ranks, frames = rng.randrange(1, 5), rng.randrange(1, 4)
        heads = rng.randrange(1, 6)
        plan = random_plan(rng, frames, frames, 4)
        moves, span = one_rank(rng.randrange(ranks), ranks, heads, frames, 2, 2, rng.random() < 0.5, plan)
        compare(moves, span, 1, frames, RotaryGrid(frames, 2, 2), heads, 6, torch.float32)


def test_the_operators_are_what_their_schemas_say():
    moves, span = one_rank(1, 3, 2, 2, 1, 3, False)
    q, k, v = (torch.randn(1, 2 * (span[1] - span[0]), 2, 6) for _ in range(3))
    weights = [torch.randn(12) for _ in range(2)]
    turns = RotaryGrid(2, 1, 3).turns(6, torch.float32, q.device).within(*span)
    table, rows = rows_sent(moves, 1)
    rest = (turns.axes, torch.tensor(table, dtype=torch.int32), turns.numbers(6), EPS)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *weights)]
    torch.library.opcheck(ops.qk_norm_rope_pack, (*leaves, *rest, rows))
    dout = torch.randn(rows * 6)
    torch.library.opcheck(torch.ops.aadkern.qk_norm_rope_pack_backward.default, (dout, q, k, *weights, *rest))
    with pytest.raises(RuntimeError, match="qk_norm_rope_pack is differentiable once, and in reverse mode only"):
        torch.func.jvp(lambda x: ops.qk_norm_rope_pack(x, k, v, *weights, *rest, rows), (q,), (q,))


@pytest.mark.slow
def test_a_model_on_four_processes():
    run_processes(str(Path(__file__).parents[1] / "ulysses_models.py"), "4", "packed_by_triton", count=1)


def test_nothing_to_do():
    moves, span = one_rank(0, 2, 2, 2, 1, 3, False)
    q = torch.randn(0, 2 * (span[1] - span[0]), 2, 6, requires_grad=True)
    weight = torch.ones(12, requires_grad=True)
    turns = RotaryGrid(2, 1, 3).turns(6, torch.float32, q.device).within(*span)
    table, rows = rows_sent(moves, 0)
    out = ops.qk_norm_rope_pack(
        q, q, q, weight, weight, turns.axes, torch.tensor(table, dtype=torch.int32), turns.numbers(6), EPS, rows
    )
    assert out.shape == (0,) and (torch.autograd.grad(out.sum(), weight)[0] == 0).all()
