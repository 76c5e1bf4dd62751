"""Random inputs of the block operators, and their results and gradients held to fp64, wherever torch's default device is."""

from __future__ import annotations

import torch

from aadkern import blocks, testing
from aadkern.blocks import RotaryGrid

BATCH, HEADS, HEAD_DIM = 2, 3, 16
GRID = RotaryGrid(range(5, 8), 1, 2)
FRAMES, TOKENS, WIDTH = len(GRID.frames), GRID.tokens, HEADS * HEAD_DIM


def fused_heads(dtype=torch.float32, grid=GRID, heads=HEADS, head_dim=HEAD_DIM):
    """One projection's output [B, L, 3 C], and weights of the two norms."""
    width = heads * head_dim
    weights = [(1 + 0.3 * torch.randn(width)).to(dtype) for _ in range(2)]
    return [torch.randn(BATCH, grid.tokens, 3 * width).to(dtype), *weights]


def run_heads(leaves, gradients, backend, dtype=None, grid=GRID, heads=HEADS):
    """q and k out, and the gradients of the projection's output and of both weights."""
    qkv, q_weight, k_weight = (x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves)
    q, k, _ = (x.unflatten(-1, (heads, -1)) for x in qkv.chunk(3, dim=-1))
    outs = blocks.qk_norm_rope(q, k, q_weight, k_weight, grid, backend=backend)
    return [*outs, *torch.autograd.grad(outs, (qkv, q_weight, k_weight), [g.to(outs[0].dtype) for g in gradients])]


def check_heads(backend, dtype, grid=GRID, heads=HEADS, head_dim=HEAD_DIM):
    leaves = fused_heads(dtype, grid, heads, head_dim)
    gradients = [torch.randn(BATCH, grid.tokens, heads, head_dim).to(dtype) for _ in range(2)]
    exact = run_heads(leaves, gradients, "reference", torch.float64, grid, heads)
    eager = run_heads(leaves, gradients, "reference", None, grid, heads)
    actual = run_heads(leaves, gradients, backend, None, grid, heads)
    for name, ours, truth, plain in zip(("q", "k", "dqkv", "dq_weight", "dk_weight"), actual, exact, eager, strict=True):
        testing.assert_close_to_reference(ours, truth, plain, name)


def tokens_and_rows(dtype=torch.float32, rows=FRAMES, rows_dtype=torch.float32, shape=(BATCH, TOKENS, WIDTH)):
    """x, y like [B, L, C] and modulation [B, F, 6, C]."""
    x, y = torch.randn(shape) + 1, torch.randn(shape)
    return [x.to(dtype), y.to(dtype), torch.randn(BATCH, rows, 6, shape[-1]).to(rows_dtype)]


def run_tokens(leaves, gradients, backend, dtype=None):
    """Norm and residual out, and the gradients of x, y and the modulation."""
    x, y, rows = (tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in leaves)
    shift, scale, gate, *_ = rows.unbind(2)
    outs = [blocks.modulated_norm(x, shift, scale, backend=backend), blocks.gated_residual(x, y, gate, backend=backend)]
    return [*outs, *torch.autograd.grad(outs, (x, y, rows), [g.to(x.dtype) for g in gradients])]


def check_tokens(backend, dtype, rows=FRAMES, rows_dtype=torch.float32, shape=(BATCH, TOKENS, WIDTH)):
    leaves = tokens_and_rows(dtype, rows, rows_dtype, shape)
    gradients = [torch.randn(shape).to(dtype) for _ in range(2)]
    exact, eager = run_tokens(leaves, gradients, "reference", torch.float64), run_tokens(leaves, gradients, "reference")
    for name, ours, truth, plain in zip(
        ("norm", "residual", "dx", "dy", "drows"), run_tokens(leaves, gradients, backend), exact, eager, strict=True
    ):
        testing.assert_close_to_reference(ours, truth, plain, name)
