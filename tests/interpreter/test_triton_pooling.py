"""The Triton kernels of pooling, interpreted on the CPU, against fp64."""

from __future__ import annotations

import math

import pytest
import torch

import aadkern
from aadkern import ops
from aadkern.pooling import torch_path, triton_forward
from tests.pooling.pooling_cases import check_kernels, gradient_for, make, run, with_lse


@pytest.fixture(autouse=True)
def several_runs_of_tokens(monkeypatch):
    """Small inputs are otherwise one run, since the CPU counts as one processor: here one to six, of one to several tiles."""
    monkeypatch.setattr(triton_forward, "PROGRAMS_PER_PROCESSOR", 6)
    monkeypatch.setattr(triton_forward, "MIN_TILES", 1)


def check(tensors, settings, gradient=None):
    return check_kernels("triton", (tensors, settings), gradient=gradient)


@pytest.mark.parametrize(
    ("norm", "keys", "dtype"),
    [
        ("rms", None, torch.float32),
        ("layer", None, torch.float16),
        (None, None, torch.bfloat16),
        ("rms", "head", torch.float32),
        ("layer", "full", torch.bfloat16),
    ],
)
def test_all_results_match_fp64(norm, keys, dtype):
    check(*make(norm=norm, keys=keys, length=2 * 35, channels=48, segments=2, batch=2, dtype=dtype))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_lengths_around_the_tile(length):
    check(*make(length=length, channels=32, queries=1, batch=1, dtype=torch.float32))


@pytest.mark.parametrize("channels", [4, 31, 33])
def test_channels_around_the_tile(channels):
    check(*make(channels=channels, heads=1, norm="layer", batch=1, dtype=torch.float32))


def test_more_columns_than_one_tile():
    """3 queries of 32 heads: 96 columns, in the backward one launch of 64 and one of 32 that adds to it."""
    assert triton_forward.MAX_BLOCK_J == 64
    check(*make(channels=32, heads=32, queries=3, batch=1, norm="rms", dtype=torch.float32))


def test_frames():
    tensors, settings = make(length=7 * 9, channels=16, segments=7, dtype=torch.float32)
    together = check(tensors, settings)["out"]
    for f in range(7):
        alone = aadkern.attention_pool(**tensors | {"x": tensors["x"][:, 9 * f : 9 * f + 9]}, **settings | {"segments": 1})
        torch.testing.assert_close(together[:, f], alone[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 5000), (torch.float16, 300)])
def test_scores_of_ten_thousand(dtype, size):
    tensors, settings = make(length=30, batch=1)
    tensors["query"] *= size  # plain torch's keys overflow float16 beyond
    check({name: x.to(dtype) for name, x in tensors.items()}, settings)


def test_small_gradients_of_float16_tokens_do_not_underflow(monkeypatch):
    """8000 tokens of about equal score and a gradient of 1/10000: ds is about 1e-8, and float16 ends at 6e-8."""
    monkeypatch.setitem(triton_forward.SMALL, "BLOCK_N", 512)
    tensors, settings = make(length=8000, channels=16, heads=1, queries=1, batch=1, biases=False, dtype=torch.float16)
    tensors = {name: x if name == "x" else x.float() for name, x in tensors.items()}
    tensors["query"] *= 0.01
    gradient = 1e-4 * gradient_for(tensors, settings)
    ours = run(aadkern.attention_pool, tensors, gradient, backend="triton", **settings)
    exact = run(aadkern.attention_pool, tensors, gradient, backend="reference", **settings)
    for name in ("query", "w_k", "w_v", "norm_weight"):
        assert (ours[name] - exact[name]).norm() < 1e-2 * exact[name].norm(), name


@pytest.mark.parametrize(("norm", "keys"), [("rms", None), ("layer", None), ("rms", "head")])
def test_lse_and_its_gradient(norm, keys):
    tensors, settings = make(norm=norm, keys=keys, segments=2, dtype=torch.float32)
    for of_pooled in (True, False):
        ours, expected = with_lse("triton", tensors, settings, of_pooled)
        for name, value in expected.items():
            torch.testing.assert_close(ours[name].double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_the_operators_mean_what_they_mean_in_torch(norm):
    """Also for a u whose rows have a mean, which a layer norm does not see."""
    x, u = torch.randn(2, 2 * 25, 40) + 0.3, 0.4 * torch.randn(5, 40) + 1
    ours, theirs = (ops.pool_tokens(x, u, None, norm, 1e-6, 2, backend) for backend in ("triton", "torch"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    dz = torch.randn_like(ours[0])
    pairs = (
        ops.pool_tokens_backward(dz, x, u, *result[1:], norm, 2, backend)
        for result, backend in ((ours, "triton"), (theirs, "torch"))
    )
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_layer_norm_of_a_first_channel_far_out():
    """Squares are summed about the first channels' mean, which here is far from all channels'."""
    x = torch.randn(1, 20, 100)
    x[..., :32] += 300
    statistics = torch_path.row_statistics(x.double(), "layer", 1e-6)
    ours = ops.pool_tokens(x, torch.randn(4, 100), None, "layer", 1e-6, 1, "triton")[3]
    torch.testing.assert_close(ours[:, 0].double(), statistics, rtol=1e-5, atol=0)


def test_any_strides():
    tensors, settings = make(segments=2, dtype=torch.float32)
    wide = torch.randn(2, 14, 24)
    wide[:, 1:13, 3:19] = tensors["x"]
    gradient = gradient_for(tensors, settings)
    for x in (wide[:, 1:13, 3:19], tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        check(tensors | {"x": x}, settings, gradient)
    one = tensors["x"][:1].expand(2, -1, -1)
    check(tensors | {"x": one}, settings, gradient[..., :1].expand_as(gradient))


def test_offsets_beyond_31_bits():
    storage = torch.empty(2**31 + 2**20, dtype=torch.float16)
    for shape, strides in (((1, 3, 16), (16, 2**30, 1)), ((3, 2, 16), (2**30, 16, 1))):
        far = storage.as_strided(shape, strides)
        tensors, settings = make(batch=shape[0], length=shape[1], dtype=torch.float16)
        gradient = gradient_for(tensors, settings)
        near, beyond = (
            run(aadkern.attention_pool, tensors | {"x": x}, gradient, backend="triton", **settings)
            for x in (tensors["x"], far.copy_(tensors["x"]))
        )
        assert all(torch.equal(beyond[name], near[name]) for name in near)


# numpy, which interprets, warns where a GPU makes inf and NaN quietly.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_numbers_stay_in_their_segment():
    tensors, settings = make(segments=3, dtype=torch.float32)
    clean = aadkern.attention_pool(**tensors, **settings, backend="triton")
    for bad in (math.nan, math.inf):
        broken = tensors["x"].clone()
        broken[0, 5, 3] = bad
        out = aadkern.attention_pool(**tensors | {"x": broken}, **settings, backend="triton")
        assert out[0, 1].isnan().all()
        assert torch.equal(out[1], clean[1]) and torch.equal(out[0, [0, 2]], clean[0, [0, 2]])


def test_nothing_to_pool_and_what_is_not_served():
    tensors, settings = make(batch=0, dtype=torch.float32)
    empty = run(aadkern.attention_pool, tensors, gradient_for(tensors, settings), backend="triton", **settings)
    assert all((x == 0).all() for x in empty.values()) and empty["x"].shape == tensors["x"].shape
    with pytest.raises(TypeError, match=r"'triton' serves float32, float16 and bfloat16, got x of torch\.float64"):
        aadkern.attention_pool(**make()[0], **settings, backend="triton")


def test_results_repeat_to_the_bit():
    tensors, settings = make(length=60, dtype=torch.float32)
    gradient = gradient_for(tensors, settings)
    first, second = (run(aadkern.attention_pool, tensors, gradient, backend="triton", **settings) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
