"""QK-norm and positions into an exchange's buffer, beside the norm and then the gather copy, wherever torch's default device is."""

from __future__ import annotations

import torch

from aadkern import AttentionPlan, VideoLayout, blocks, ops, plans
from aadkern.blocks import RotaryGrid
from aadkern.ulysses.exchange import Moves, rows_on, to_heads
from aadkern.ulysses.group import spans_of
from aadkern.ulysses.ops import split, ulysses_pack, ulysses_unpack
from aadkern.ulysses.shares import work_of

EPS = 1e-5
# Of the largest value: the gather sums a shared head's gradients and rounds once more than the kernel.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def moves_of(
    rank: int, ranks: int, heads: int, grid: RotaryGrid, keep: bool, plan: AttentionPlan | None = None
) -> tuple[Moves, tuple[int, int]]:
    """One rank's side of the exchange to heads, and its places in a frame."""
    frames, n = len(grid.frames), grid.height * grid.width
    spans = spans_of(n, ranks)
    work = work_of(plan or plans.bidirectional(VideoLayout((frames,), n)), heads, ranks, n, keep)
    return to_heads(work, rank, spans, heads, frames, frames), spans[rank]


def compare_packed(
    moves: Moves, span: tuple[int, int], batch: int, grid: RotaryGrid, heads: int, dim: int, dtype: torch.dtype, bits: bool
) -> None:
    """The buffer, to the bit or but for roundings in one of a hundred numbers, and the gradients of all five inputs."""
    frames, n_r = len(grid.frames), span[1] - span[0]
    q, k, v = (torch.randn(batch, frames * n_r, heads, dim).to(dtype).requires_grad_() for _ in range(3))
    q_weight, k_weight = ((1 + 0.3 * torch.randn(heads * dim)).requires_grad_() for _ in range(2))
    turns, (places, rows) = grid.turns(dim, dtype, q.device).within(*span), rows_on(moves, batch, q.device)
    packed = ops.qk_norm_rope_pack(q, k, v, q_weight, k_weight, turns.axes, places, turns.numbers(dim), EPS, rows)
    normed = blocks.qk_norm_rope(q, k, q_weight, k_weight, turns, eps=EPS, backend="triton")
    boxes, shapes = [x for group in moves.sent for box in group for x in box], [x for shape in moves.shapes for x in shape]
    parts = [x.detach().unflatten(1, (frames, n_r)) for x in (*normed, v)]
    expected = ulysses_pack(*parts, None, None, boxes, moves.together)
    assert torch.equal(packed, expected) if bits else (packed == expected).double().mean() > 0.99
    torch.testing.assert_close(packed, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    dout = torch.randn_like(packed)
    ours = torch.autograd.grad(packed, (q, k, v, q_weight, k_weight), dout)
    back = ulysses_unpack(dout.float(), boxes, moves.together, shapes, batch, dim)
    dq, dk, dv = (x.flatten(1, 2).to(dtype) for x in split(back, shapes, batch, dim))
    new_q, new_k, q_grad, k_grad = torch.autograd.grad(normed, (q, k, q_weight, k_weight), [dq, dk])
    for name, mine, theirs in zip(
        ("dq", "dk", "dv", "dq_weight", "dk_weight"), ours, (new_q, new_k, dv, q_grad, k_grad), strict=True
    ):
        error, largest = (mine - theirs).abs().max().item(), theirs.abs().max().item()
        assert mine.isfinite().all() and error <= TOLERANCE[dtype] * largest, f"{name}: off by {error} of {largest}"
