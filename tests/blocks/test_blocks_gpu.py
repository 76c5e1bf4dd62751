"""The block operators' Triton kernels on a GPU against fp64, at the sizes of Wan's blocks. Unverified: not run on a GPU yet."""

from __future__ import annotations

import pytest
import torch

from aadkern import blocks, runtime
from aadkern.blocks import RotaryGrid
from tests.blocks.block_cases import BATCH, check_heads, check_tokens, fused_heads, run_heads, run_tokens, tokens_and_rows
from tests.ulysses.pack_cases import compare_packed, moves_of

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
CLIP = RotaryGrid(range(5, 8), 6, 5)


@pytest.fixture(autouse=True)
def on_the_gpu():
    reason = runtime.reason_against("triton", DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize(("heads", "head_dim"), [(12, 128), (40, 128), (3, 64), (1, 10), (5, 24)])
@DTYPES
def test_norm_and_rope_match_fp64(dtype, heads, head_dim):
    check_heads("triton", dtype, CLIP, heads, head_dim)
    check_heads("triton", dtype, RotaryGrid((4, 9, 4), 2, 1, (16, 3, 2)), heads, head_dim)


@pytest.mark.parametrize("rows", [1, 3, 90])
@pytest.mark.parametrize("width", [1536, 5120, 520])
@DTYPES
def test_modulation_matches_fp64_for_rows_per_clip_frame_and_token(dtype, width, rows):
    check_tokens("triton", dtype, rows, torch.float32, (BATCH, 90, width))
    check_tokens("triton", dtype, rows, dtype, (BATCH, 3, 30, width))


@DTYPES
def test_a_chunk_at_480p(dtype):
    """Many programs, every multiprocessor busy."""
    check_heads("triton", dtype, RotaryGrid(3, 30, 52), 12, 128)
    check_tokens("triton", dtype, 3, torch.float32, (BATCH, 3 * 1560, 1536))


@pytest.mark.parametrize(("heads", "ranks"), [(12, 4), (12, 8), (40, 8), (2, 5)])
@DTYPES
def test_the_send_buffer_is_that_of_norm_and_copy(dtype, heads, ranks):
    moves, span = moves_of(ranks - 1, ranks, heads, CLIP, heads == 12)
    compare_packed(moves, span, BATCH, CLIP, heads, 128, dtype, bits=False)


def elsewhere(kind, *tensors):
    """The same numbers in other memory: channels apart, batch and tokens exchanged, storage that begins off 16 bytes."""
    if kind == "apart":
        return [torch.stack((x, x), dim=-1)[..., 0] for x in tensors]
    if kind == "exchanged":
        return [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    return [torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape) for x in tensors]


@pytest.mark.parametrize("kind", ["exchanged", "apart", "off"])
@DTYPES
def test_any_strides(kind, dtype):
    leaves, gradients = fused_heads(dtype, CLIP, 4, 64), [torch.randn(BATCH, CLIP.tokens, 4, 64).to(dtype) for _ in range(2)]
    plain = run_heads(leaves, gradients, "triton", grid=CLIP, heads=4)
    other = run_heads([*elsewhere(kind, leaves[0]), *leaves[1:]], elsewhere(kind, *gradients), "triton", grid=CLIP, heads=4)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    shape = (BATCH, 90, 520)
    leaves, gradients = tokens_and_rows(dtype, 3, torch.float32, shape), [torch.randn(shape).to(dtype) for _ in range(2)]
    plain = run_tokens(leaves, gradients, "triton")
    other = run_tokens(elsewhere(kind, *leaves), elsewhere(kind, *gradients), "triton")
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@DTYPES
def test_keys_alone_into_a_cache_slot(dtype):
    qkv, _, k_weight = fused_heads(dtype, CLIP, 12, 128)
    k = qkv[..., 1536:3072].unflatten(-1, (12, -1))
    slot = torch.full((2, BATCH, CLIP.tokens, 12, 128), 7.0, dtype=dtype)
    with torch.no_grad():
        blocks.qk_norm_rope(None, k, None, k_weight, CLIP, k_out=slot[1], backend="triton")
        written = blocks.qk_norm_rope(None, k, None, k_weight, CLIP, backend="triton")[1]
    assert torch.equal(slot[1], written) and (slot[0] == 7).all()


@DTYPES
def test_repeats_to_the_bit(dtype):
    leaves, gradients = fused_heads(dtype, CLIP, 12, 128), [torch.randn(BATCH, CLIP.tokens, 12, 128).to(dtype) for _ in range(2)]
    first = run_heads(leaves, gradients, "triton", grid=CLIP, heads=12)
    shape = (BATCH, 3 * 390, 1536)
    tokens, token_gradients = tokens_and_rows(dtype, 3, torch.float32, shape), [torch.randn(shape).to(dtype) for _ in range(2)]
    first_tokens = run_tokens(tokens, token_gradients, "triton")
    for _ in range(20):
        again = run_heads(leaves, gradients, "triton", grid=CLIP, heads=12)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first_tokens, run_tokens(tokens, token_gradients, "triton"), strict=True))


def test_replays_in_a_cuda_graph():
    qkv, q_weight, k_weight = fused_heads(torch.bfloat16, CLIP, 12, 128)
    x, y, rows = tokens_and_rows(torch.bfloat16, 3, torch.float32, (BATCH, 90, 1536))
    shift, scale, gate, *_ = rows.unbind(2)

    def make():
        q, k, _ = (part.unflatten(-1, (12, -1)) for part in qkv.chunk(3, dim=-1))
        normed = blocks.modulated_norm(x, shift, scale, backend="triton")
        pair = blocks.qk_norm_rope(q, k, q_weight, k_weight, CLIP, backend="triton")
        return [*pair, blocks.gated_residual(normed, y, gate, backend="triton")]

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(side):
            make()
        side.synchronize()
        with torch.cuda.graph(graph):
            captured = make()
        for _ in range(2):
            qkv.normal_()
            x.normal_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, make(), strict=True))
