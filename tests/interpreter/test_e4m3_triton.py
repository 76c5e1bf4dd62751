"""The kernel that decodes keys and values in its loads, interpreted on the CPU, against fp64 over the decoded numbers."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from aadkern import StreamingCache, Window
from aadkern.range_attention import api, ops, reference
from aadkern.range_attention.triton_e4m3 import decoded
from tests.fp8.rows import quantised_frames, uneven_frames
from tests.interpreter.plan_cases import CHUNKED, RAGGED


@triton.jit
def decode(bits, scale, out, DTYPE: tl.constexpr):
    rows, columns = tl.arange(0, 4), tl.arange(0, 64)
    at = rows[:, None] * 64 + columns[None, :]
    tl.store(out + at, decoded(tl.load(bits + at), tl.load(scale + rows), DTYPE))


@pytest.mark.parametrize(("kind", "dtype"), [(tl.float32, torch.float32), (tl.float16, torch.float16)])
def test_every_number_of_e4m3_is_decoded(kind, dtype):
    """All but its NaN, which a cache never relies on: there the scale is NaN."""
    bits, scale = torch.arange(256, dtype=torch.uint8).view(4, 64), torch.tensor([1.0, 2.0**-9, 2.0**5, 0.5])
    out = torch.full((4, 64), 7.0, dtype=dtype)
    decode[(1,)](bits, scale, out, DTYPE=kind)
    expected = (bits.view(torch.float8_e4m3fn).double() * scale.double()[:, None]).to(dtype)
    there = ~expected.isnan()
    assert there.sum() == 254 and torch.equal(out[there], expected[there])


def inputs(plan, frames, head_dim, dtype, heads=2):
    """q, and keys and values in e4m3 whose frames and heads differ in size."""
    tokens = plan.k_len // frames
    q = torch.randn(2, plan.q_len, heads, head_dim, dtype=dtype)
    sizes = 2.0 ** (torch.arange(2 * frames * heads).view(2, frames, heads) % 5 - 3).repeat_interleave(tokens, 1)[..., None]
    held = [quantised_frames(torch.randn(2, plan.k_len, heads, head_dim) * sizes, frames) for _ in range(2)]
    (k, k_scale), (v, v_scale) = held
    assert len(k_scale.unique()) > 1
    return q, k, v, k_scale, v_scale


def exact(q, k, v, k_scale, v_scale, plan, scale):
    """out and lse in fp64."""
    wide = [
        x.double() * s.double().repeat_interleave(plan.k_len // s.shape[1], 1)[..., None] for x, s in ((k, k_scale), (v, v_scale))
    ]
    return reference.forward(q.double(), *wide, plan, scale)


@pytest.mark.parametrize(
    ("plan", "frames", "head_dim", "dtype", "scale"),
    [
        (RAGGED, 6, 16, torch.float32, 0.25),  # 15 keys a frame: whole steps of 16 lie over two
        (RAGGED, 30, 80, torch.float32, 0.1),  # 3 keys a frame, padded channels
        (RAGGED, 1, 64, torch.float16, -0.1),
        (CHUNKED, 7, 16, torch.float16, 0.2),
        (CHUNKED, 49, 5, torch.float32, 0.4),  # a scale for each key
        (RAGGED, 2, 32, torch.bfloat16, 0.2),
    ],
)
def test_matches_fp64(plan, frames, head_dim, dtype, scale):
    given = inputs(plan, frames, head_dim, dtype)
    out, lse = ops.range_attention_e4m3(*given, plan.code, scale, "triton")
    true_out, true_lse = exact(*given, plan, scale)
    nothing = true_lse.isinf()
    assert torch.equal(lse.isinf(), nothing)
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    assert (out.double() - true_out).abs().max() <= bound * true_out.abs().max()
    assert (lse.double() - true_lse)[~nothing].abs().max() <= 2e-5 * true_lse[~nothing].abs().max()


def test_strided_heads_and_slices_of_a_ring():
    """What a layer of a cache and a rank's heads are: views."""
    q, k, v, k_scale, v_scale = inputs(CHUNKED, 7, 16, torch.float32, heads=4)
    own = slice(1, 3)
    given = [x[:, :, own] for x in (q, k, v, k_scale, v_scale)]
    out = api.attention_e4m3(*given, CHUNKED, backend="triton", scale=0.25)
    assert (out.double() - exact(*given, CHUNKED, 0.25)[0]).abs().max() <= 2e-5


def test_nothing_beyond_the_ranges_is_read():
    """Keys that no range holds, and their scales, are NaN."""
    given = inputs(RAGGED, 90, 16, torch.float32)
    clean = ops.range_attention_e4m3(*given, RAGGED.code, 0.2, "triton")
    seen = torch.zeros(90, dtype=torch.bool)
    for _, ranges in RAGGED.runs:
        for a, b in ranges:
            seen[a:b] = True
    assert not seen.all()
    for scale in given[3:]:
        scale[:, ~seen] = float("nan")
    assert all(map(torch.equal, clean, ops.range_attention_e4m3(*given, RAGGED.code, 0.2, "triton")))


def test_a_nan_frame_is_seen():
    q, k, v, k_scale, v_scale = inputs(CHUNKED, 7, 16, torch.float32)
    v_scale[1, 6, 0] = float("nan")
    out = api.attention_e4m3(q, k, v, k_scale, v_scale, CHUNKED, backend="triton")
    assert out[1, -14:, 0].isnan().all() and not out[0].isnan().any() and not out[1, :, 1].isnan().any()


def test_what_a_cache_holds():
    x = uneven_frames(4, 5, heads=2, channels=16)
    cache = StreamingCache(1, 2, 2, 16, 5, Window(4), max_chunk_frames=4, precision="fp8")
    with torch.no_grad():
        attend = cache.begin(4)(0)
        attend.store(x, x.flip(1))
        plan, layer = attend.plan_of(20, 20), cache.layer(0)
        q = torch.randn(2, 20, 2, 16)
        out = api.attend(q, layer, plan, backend="triton", scale=0.25)
    true = exact(q, *layer, plan, 0.25)[0]
    assert (out.double() - true).abs().max() <= 2e-5 * true.abs().max()
