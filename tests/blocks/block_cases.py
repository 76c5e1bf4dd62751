"""Random inputs of the block operators, and their results and gradients held to fp64, wherever torch's default device is."""

from __future__ import annotations

import functools

import pytest
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


def block_cases():
    """Of each operator in fp64: a function of the backend that gives one of tensors, and such tensors."""
    randn = functools.partial(torch.randn, dtype=torch.float64)
    grid, rows = blocks.RotaryGrid(2, 2, 3), (randn(2, 3, 8), randn(2, 3, 8))
    return {
        "qk_norm_rope": (
            lambda backend: lambda q, k, a, b: torch.stack(blocks.qk_norm_rope(q, k, a, b, grid, backend=backend)),
            (randn(2, 12, 2, 8), randn(2, 12, 2, 8), randn(16), randn(16)),
        ),
        "modulated_norm": (
            lambda backend: lambda x, shift, scale: blocks.modulated_norm(x, shift, scale, backend=backend),
            (randn(2, 12, 8), *rows),
        ),
        "gated_residual": (
            lambda backend: lambda x, y, gate: blocks.gated_residual(x, y, gate, backend=backend),
            (randn(2, 12, 8), randn(2, 12, 8), rows[0]),
        ),
    }


CPU = torch.device("cpu")


def destinations(backend):
    """Cache slots, send buffers and in place, each against the plain result; what lies around a destination stays."""
    qkv, q_weight, k_weight = fused_heads()
    heads = [x.unflatten(-1, (HEADS, -1)) for x in qkv.chunk(3, dim=-1)]
    weights = (q_weight, k_weight)
    q, k = blocks.qk_norm_rope(*heads[:2], *weights, GRID, backend=backend)
    layers = torch.full((2, BATCH, TOKENS + 9, HEADS, HEAD_DIM), 7.0)
    slot = layers[1, :, 4 : 4 + TOKENS]
    with torch.no_grad():
        new_q, new_k = blocks.qk_norm_rope(*heads[:2], *weights, GRID, k_out=slot, backend=backend)
        assert new_k is slot and torch.equal(slot, k) and torch.equal(new_q, q)
        slot.fill_(7.0)
        assert (layers == 7.0).all()
        assert blocks.qk_norm_rope(None, heads[1], None, k_weight, GRID, k_out=slot, backend=backend)[0] is None
        assert torch.equal(slot, k)
        send = torch.full((HEADS, BATCH, TOKENS, 3, 1, HEAD_DIM), 7.0)  # destination-major: one head for each of 3 ranks
        q_out, k_out, v_out = send.permute(3, 1, 2, 0, 4, 5)
        blocks.qk_norm_rope(*heads[:2], *weights, GRID, q_out=q_out, k_out=k_out, backend=backend)
        assert torch.equal(q_out.flatten(2, 3), q) and torch.equal(k_out.flatten(2, 3), k) and (v_out == 7.0).all()
        before = qkv.clone()
        turned = blocks.qk_norm_rope(*heads[:2], *weights, GRID, q_out=heads[0], k_out=heads[1], backend=backend)
        assert turned[0] is heads[0] and torch.equal(turned[0], q) and torch.equal(turned[1], k)
        assert torch.equal(qkv[..., 2 * WIDTH :], before[..., 2 * WIDTH :])
    with pytest.raises(ValueError, match="q_out and k_out must be None where gradients are recorded"):
        blocks.qk_norm_rope(*heads[:2], q_weight.requires_grad_(), k_weight, GRID, k_out=slot, backend=backend)
