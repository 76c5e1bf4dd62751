"""The Triton kernels of pooling on a GPU against fp64, at the widths of Wan's tokens. Unverified: not run on a GPU yet."""

from __future__ import annotations

import pytest
import torch

import aadkern
from aadkern import runtime
from tests.pooling.pooling_cases import check_kernels, gradient_for, make, run

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


@pytest.fixture(autouse=True)
def on_the_gpu():
    reason = runtime.reason_against("triton", DEVICE)
    if reason is not None:
        pytest.skip(reason)
    with torch.device(DEVICE):
        yield


def check(tensors, settings, gradient=None):
    return check_kernels("triton", (tensors, settings), gradient=gradient)


@pytest.mark.parametrize(("channels", "heads"), [(1536, 12), (5120, 40), (96, 3)])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
@DTYPES
def test_all_results_match_fp64(dtype, norm, channels, heads):
    """Whole clips and one pooling a frame."""
    for segments in (1, 3):
        check(*make(norm=norm, length=3 * 390, channels=channels, heads=heads, segments=segments, queries=1, dtype=dtype))


@pytest.mark.parametrize("keys", ["head", "full"])
@DTYPES
def test_a_norm_on_the_keys(dtype, keys):
    check(*make(norm="rms", keys=keys, length=777, channels=384, heads=6, queries=4, dtype=dtype))


@pytest.mark.parametrize("channels", [4, 31, 33, 520])
def test_sizes_around_a_tile(channels):
    sizes = {"channels": channels, "heads": 1, "queries": 3, "norm": "layer", "dtype": torch.float32}
    check_kernels("triton", *(make(length=length, **sizes) for length in (1, 15, 16, 17, 127, 129, 4097)))


def test_more_columns_than_one_tile():
    check(*make(channels=512, heads=32, queries=3, batch=1, length=300, dtype=torch.float32))


@DTYPES
def test_any_strides(dtype):
    tensors, settings = make(length=60, channels=32, segments=2, dtype=dtype)
    wide = torch.randn(2, 62, 40).to(dtype)
    wide[:, 1:61, 3:35] = tensors["x"]
    gradient = gradient_for(tensors, settings)
    for x in (wide[:, 1:61, 3:35], tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)):
        check(tensors | {"x": x}, settings, gradient)
    one = tensors["x"][:1].expand(2, -1, -1)
    check(tensors | {"x": one}, settings, gradient[..., :1].expand_as(gradient))


def test_a_bad_number_stays_in_its_segment():
    tensors, settings = make(length=600, channels=64, segments=3, dtype=torch.float32)
    clean = aadkern.attention_pool(**tensors, **settings, backend="triton")
    for bad in (float("nan"), float("inf")):
        broken = tensors["x"].clone()
        broken[0, 250, 3] = bad
        out = aadkern.attention_pool(**tensors | {"x": broken}, **settings, backend="triton")
        assert out[0, 1].isnan().all()
        assert torch.equal(out[1], clean[1]) and torch.equal(out[0, [0, 2]], clean[0, [0, 2]])


@DTYPES
def test_repeats_to_the_bit(dtype):
    tensors, settings = make(length=3 * 1560, channels=1536, heads=12, segments=3, dtype=dtype)
    gradient = gradient_for(tensors, settings)
    first = run(aadkern.attention_pool, tensors, gradient, backend="triton", **settings)
    for _ in range(20):
        again = run(aadkern.attention_pool, tensors, gradient, backend="triton", **settings)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []
