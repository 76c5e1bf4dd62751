"""The block operators' Triton kernels, interpreted on the CPU, against fp64 and inside CausalWan."""

from __future__ import annotations

import math

import pytest
import torch

from aadkern import blocks, ops
from aadkern.blocks import RotaryGrid, triton_gated_residual, triton_modulated_norm, triton_qk_norm_rope
from tests.blocks.block_cases import (
    BATCH,
    CPU,
    FRAMES,
    GRID,
    HEAD_DIM,
    HEADS,
    TOKENS,
    WIDTH,
    check_heads,
    check_tokens,
    destinations,
    fused_heads,
    run_heads,
    run_tokens,
    tokens_and_rows,
)
from tests.blocks.block_models import backends_agree

DTYPES = [torch.float32, torch.float16]


@pytest.fixture
def short_runs(monkeypatch):
    """Several programs to a frame and several rows to a program, with tails, on clips of a few tokens."""
    monkeypatch.setattr(triton_qk_norm_rope, "PROGRAMS", 7)
    monkeypatch.setattr(triton_modulated_norm, "FORWARD_TOKENS", 1)
    monkeypatch.setattr(triton_modulated_norm, "BACKWARD_TOKENS", 1)
    monkeypatch.setattr(triton_gated_residual, "TOKENS", 1)
    monkeypatch.setattr(triton_gated_residual, "CHANNELS", 32)
    monkeypatch.setattr(triton_gated_residual, "BACKWARD_TILES", 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 16), (1, 10), (5, 24)])
def test_norm_and_rope_match_fp64(short_runs, dtype, heads, head_dim):
    check_heads("triton", dtype, RotaryGrid((4, 9, 4), 2, 1, (16, 3, 2)), heads, head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, FRAMES, TOKENS])
def test_modulation_matches_fp64_for_rows_per_clip_frame_and_token(short_runs, dtype, rows):
    check_tokens("triton", dtype, rows)
    check_tokens("triton", dtype, rows, dtype, (BATCH, FRAMES, TOKENS // FRAMES, WIDTH))


def test_the_launches_as_they_are_match_fp64():
    check_heads("triton", torch.float16, RotaryGrid(range(3, 5), 1, 3), 12, 128)
    check_tokens("triton", torch.float16, 2, torch.float32, (BATCH, 2 * 66, 520))


def test_rounds_where_the_torch_path_rounds():
    """Bits, not errors: pairs differ where a fused product tips a rounding, one in a hundred at most."""
    qkv, q_weight, k_weight = fused_heads(torch.float16)
    q, k, _ = (x.unflatten(-1, (HEADS, -1)) for x in qkv.chunk(3, dim=-1))
    ours, theirs = (torch.stack(blocks.qk_norm_rope(q, k, q_weight, k_weight, GRID, backend=b)) for b in ("triton", "torch"))
    assert (ours == theirs).double().mean() > 0.99


def test_writes_into_given_destinations():
    destinations("triton")


def test_keys_alone():
    qkv, _, k_weight = fused_heads()
    k = qkv[..., WIDTH : 2 * WIDTH].unflatten(-1, (HEADS, -1)).requires_grad_()
    dout = torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM)
    grads = []
    for backend in ("triton", "reference"):
        q, out = blocks.qk_norm_rope(None, k, None, k_weight, GRID, backend=backend)
        assert q is None
        grads.append([out, *torch.autograd.grad(out, k, dout)])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def views(kind, *tensors):
    """The same numbers in other memory: channels apart, batch and tokens exchanged, storage that begins off 16 bytes."""
    if kind == "apart":
        return [torch.stack((x, x), dim=-1)[..., 0] for x in tensors]
    if kind == "exchanged":
        return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    return [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in tensors]


@pytest.mark.parametrize("kind", ["exchanged", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("apart", "off"))])
def test_any_strides(kind):
    leaves, gradients = fused_heads(), [torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM) for _ in range(2)]
    plain = run_heads(leaves, gradients, "triton")
    other = run_heads([*views(kind, leaves[0]), *leaves[1:]], views(kind, *gradients), "triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    leaves, gradients = tokens_and_rows(), [torch.randn(BATCH, TOKENS, WIDTH) for _ in range(2)]
    plain = run_tokens(leaves, gradients, "triton")
    other = run_tokens(views(kind, *leaves), views(kind, *gradients), "triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_gradients_of_stride_zero():
    ones = torch.ones(()).expand(BATCH, TOKENS, HEADS, HEAD_DIM)
    leaves = fused_heads()
    expanded, dense = (run_heads(leaves, [g] * 2, "triton") for g in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))
    ones, leaves = torch.ones(()).expand(BATCH, TOKENS, WIDTH), tokens_and_rows()
    expanded, dense = (run_tokens(leaves, [g] * 2, "triton") for g in (ones, ones.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


def test_offsets_beyond_31_bits():
    """Views of storage that is touched nowhere else: tokens 2^30 elements apart, batch elements 2^30 apart."""
    storage = torch.empty(2**31 + 2**25, dtype=torch.float16)
    for shape, strides in (((1, 3, 16), (16, 2**30, 1)), ((3, 3, 16), (2**30, 16, 1))):
        far = [storage.as_strided(shape, strides, storage_offset=1024 * i) for i in range(3)]
        for x in far:
            x.copy_(torch.randn(shape))
        near = [x.contiguous() for x in far]
        rows, weight, grid = torch.randn(shape[0], 1, 16), torch.randn(16).half(), RotaryGrid(3, 1, 1)
        results = []
        for x, y, dout in (near, far):
            x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
            outs = [
                blocks.modulated_norm(x, rows, rows, backend="triton"),
                blocks.gated_residual(x, y, rows, backend="triton"),
                blocks.qk_norm_rope(None, x.unflatten(-1, (2, 8)), None, weight, grid, backend="triton")[1].flatten(2),
            ]
            results.append([*outs, *torch.autograd.grad(outs, (x, y), [dout] * 3)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with torch.no_grad():
            out = far[2].unflatten(-1, (2, 8))
            blocks.qk_norm_rope(None, near[0].unflatten(-1, (2, 8)), None, weight, grid, k_out=out, backend="triton")
        assert torch.equal(far[2], results[0][2])


def test_bad_values_stay_in_their_token():
    leaves, gradients = tokens_and_rows(), [torch.randn(BATCH, TOKENS, WIDTH) for _ in range(2)]
    heads, heads_gradients = fused_heads(), [torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM) for _ in range(2)]
    clean, clean_heads = run_tokens(leaves, gradients, "triton"), run_heads(heads, heads_gradients, "triton")
    others = [i for i in range(TOKENS) if i != 3]
    for bad in (math.nan, math.inf):
        broken = [leaves[0].clone(), *leaves[1:]]
        broken[0][1, 3, 3] = bad
        results = run_tokens(broken, gradients, "triton")
        assert results[0][1, 3].isnan().all()
        for ours, expected in zip(results[:4], clean[:4], strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1, others], expected[1, others])
        assert torch.equal(results[4][:, [0, 2]], clean[4][:, [0, 2]])
        broken = [heads[0].clone(), *heads[1:]]
        broken[0][1, 3, 3] = bad
        for ours, expected in zip(run_heads(broken, heads_gradients, "triton")[:3], clean_heads[:3], strict=True):
            assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1, others], expected[1, others])


def test_a_slice_of_every_frame_turns_as_in_the_whole():
    """Forward, in place and backward: the rows of tokens that stand at some places of their frames."""
    whole = RotaryGrid(3, 2, 5)
    q, k, dq, dk = (torch.randn(2, 30, HEADS, HEAD_DIM) for _ in range(4))
    weights = [torch.randn(WIDTH).requires_grad_() for _ in range(2)]
    for first, end in ((0, 3), (3, 10), (7, 8)):
        turns = whole.turns(HEAD_DIM, torch.float32, CPU, spread=True).within(first, end)
        own = [x.unflatten(1, (3, 10))[:, :, first:end].flatten(1, 2).detach() for x in (q, k, dq, dk)]
        results = []
        for backend in ("triton", "torch", "reference"):
            leaves = [x.clone().requires_grad_() for x in own[:2]]
            outs = blocks.qk_norm_rope(*leaves, *weights, turns, backend=backend)
            results.append([*outs, *torch.autograd.grad(outs, (*leaves, *weights), own[2:])])
        expected = blocks.qk_norm_rope(q, k, *weights, whole, backend="reference")
        for out, full in zip(results[0], expected, strict=False):
            torch.testing.assert_close(out, full.unflatten(1, (3, 10))[:, :, first:end].flatten(1, 2))
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            into = blocks.qk_norm_rope(own[0], own[1], *weights, turns, q_out=torch.empty_like(own[0]), backend="triton")
        assert torch.equal(into[0], results[0][0].detach())


def test_runs_are_bitwise_equal():
    leaves, gradients = fused_heads(torch.float16), [torch.randn(BATCH, TOKENS, HEADS, HEAD_DIM).half() for _ in range(2)]
    first, second = (run_heads(leaves, gradients, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaves, gradients = tokens_and_rows(torch.float16), [torch.randn(BATCH, TOKENS, WIDTH).half() for _ in range(2)]
    first, second = (run_tokens(leaves, gradients, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_to_do():
    k = torch.randn(0, TOKENS, HEADS, HEAD_DIM, requires_grad=True)
    weight = torch.ones(WIDTH, requires_grad=True)
    outs = blocks.qk_norm_rope(k, k, weight, weight, GRID, backend="triton")
    grads = torch.autograd.grad(outs, (k, weight), [torch.randn_like(k)] * 2)
    assert outs[0].shape == grads[0].shape == k.shape and (grads[1] == 0).all()
    x, rows = torch.randn(2, 0, WIDTH, requires_grad=True), torch.randn(2, 1, WIDTH, requires_grad=True)
    out = blocks.gated_residual(x, blocks.modulated_norm(x, rows, rows, backend="triton"), rows, backend="triton")
    assert out.shape == x.shape and (torch.autograd.grad(out.sum(), rows)[0] == 0).all()


def test_operator_contracts():
    q, k = (torch.randn(1, 2, 1, 6).requires_grad_() for _ in range(2))
    q_weight, k_weight = (torch.randn(6).requires_grad_() for _ in range(2))
    turns = RotaryGrid(2, 1, 1).turns(6, torch.float32, CPU)
    rest = (turns.axes, [1, 1, *turns.sizes], 1e-6)
    torch.library.opcheck(ops.qk_norm_rope, (q, k, q_weight, k_weight, *rest))
    torch.library.opcheck(ops.qk_norm_rope, (None, k, None, k_weight, *rest))
    outs = [torch.randn(1, 2, 1, 6) for _ in range(2)]
    for sources in ((q.detach(), k.detach()), (None, None)):
        torch.library.opcheck(ops.qk_norm_rope_into, (*sources, q_weight.detach(), k_weight.detach(), *rest, *outs))
    x, y = (torch.randn(1, 2, 6).half().requires_grad_() for _ in range(2))
    shift, scale, gate = (torch.randn(1, 1, 6).requires_grad_() for _ in range(3))
    torch.library.opcheck(ops.modulated_norm, (x, shift, scale, 1e-6))
    torch.library.opcheck(ops.gated_residual, (x, y, gate))
    backwards = torch.ops.aadkern
    heads, weights = (q.detach(), k.detach()), (q_weight.detach(), k_weight.detach())
    torch.library.opcheck(backwards.qk_norm_rope_backward.default, (*map(torch.randn_like, heads), *heads, *weights, *rest))
    dout = torch.randn_like(x).detach()
    torch.library.opcheck(backwards.modulated_norm_backward.default, (dout, x.detach(), scale.detach(), 1e-6))
    torch.library.opcheck(backwards.gated_residual_backward.default, (dout, y.detach(), gate.detach()))


def test_a_second_derivative_says_what_to_do():
    x, _, rows = (tensor.requires_grad_() for tensor in tokens_and_rows())
    out = blocks.modulated_norm(x, rows[:, :, 0], rows[:, :, 1], backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="modulated_norm is differentiable once"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.slow
def test_causal_wan_computes_the_same_as_in_torch():
    backends_agree("triton", "torch", layers=2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_compiles_to_one_graph():
    (qkv, q_weight, k_weight), (x, y, rows) = fused_heads(), tokens_and_rows()

    def block(x, y, rows, qkv):
        shift, scale, gate, *_ = rows.unbind(2)
        q, k, _ = (z.unflatten(-1, (HEADS, -1)) for z in qkv.chunk(3, dim=-1))
        q, k = blocks.qk_norm_rope(q, k, q_weight, k_weight, GRID, backend="triton")
        normed = blocks.modulated_norm(x, shift, scale, backend="triton")
        return blocks.gated_residual(normed, y, gate, backend="triton").square().sum() + (q * k).sum()

    leaves = [tensor.requires_grad_() for tensor in (x, y, rows, qkv)]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(function(*leaves), leaves) for function in (compiled, block)]
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected)
    slot = torch.zeros(2, BATCH, TOKENS, HEADS, HEAD_DIM)

    def fill(k, slot):
        blocks.qk_norm_rope(None, k, None, k_weight, GRID, k_out=slot[1], backend="triton")
        return slot.sum()

    with torch.no_grad():
        k = qkv.detach()[..., :WIDTH].unflatten(-1, (HEADS, -1))
        total = torch.compile(fill, backend="aot_eager", fullgraph=True)(k, slot)
        written = blocks.qk_norm_rope(None, k, None, k_weight, GRID, backend="triton")[1]
    assert torch.equal(slot[1], written) and (slot[0] == 0).all()
    torch.testing.assert_close(total, written.sum())


def test_refuses_what_it_does_not_serve():
    x, rows = torch.randn(1, 2, 16), torch.randn(1, 1, 16)
    with pytest.raises(TypeError, match="'triton' serves float32, float16 and bfloat16, got float64"):
        blocks.modulated_norm(x.double(), rows, rows, backend="triton")
    with pytest.raises(ValueError, match="up to 16384 channels, got 16385"):
        blocks.gated_residual(torch.randn(1, 2, 16385), torch.randn(1, 2, 16385), torch.randn(1, 1, 16385), backend="triton")
