"""The FP8 quantisation kernel, interpreted on the CPU: bit for bit what the reference gives."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl

from aadkern.fp8 import quantise_rows
from aadkern.fp8.triton_quantise import to_e4m3
from tests.fp8.rows import DTYPES, strided, uneven_rows


def assert_same(x):
    ours, theirs = (quantise_rows(x, backend=backend) for backend in ("triton", "reference"))
    assert ours.values.shape == x.shape and ours.values.dtype == torch.float8_e4m3fn
    assert torch.equal(ours.scale, theirs.scale) and torch.equal(ours.values.float(), theirs.values.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 5, 96, 1536, 1540])
def test_the_references_bits(dtype, channels):
    assert_same(uneven_rows(dtype, max(channels, 4))[..., -channels:])


def test_wans_widest_row():
    assert_same(torch.randn(2, 13824).bfloat16())


@pytest.mark.parametrize("shape", [(7, 32), (3, 2, 32), (2, 3, 2, 32), (0, 32), (2, 0, 32)])
def test_shapes(shape):
    assert_same(torch.randn(shape))


@pytest.mark.parametrize("kind", ["apart", "exchanged", "off"])
def test_any_strides(kind):
    assert_same(strided(kind, uneven_rows(torch.float16)))
    assert_same(uneven_rows(torch.float32)[:, 1:])


@triton.jit
def convert(x, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, to_e4m3(tl.load(x + at), True))


def test_every_e4m3_every_tie_and_their_neighbours_round_as_torch_rounds():
    """The interpreter's own conversion fails this, which is why there is another."""
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (numbers[1:] + numbers[:-1]) / 2
    edges = torch.cat((numbers, ties, torch.randn(1000) * 100))
    x = torch.cat((edges, torch.nextafter(edges, torch.tensor(math.inf)), torch.nextafter(edges, torch.tensor(-math.inf))))
    x = torch.cat((x, -x, torch.tensor([math.nan])))
    x = torch.cat((x, torch.zeros(-len(x) % 512)))
    out = torch.full(x.shape, 7.0).to(torch.float8_e4m3fn)
    convert[(len(x) // 512,)](x, out, SIZE=512)
    torch.testing.assert_close(out.float(), x.to(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_visible_and_in_its_row(bad):
    x = uneven_rows(torch.bfloat16)
    broken = x.clone()
    broken[1, 3, 7] = bad
    ours, theirs, clean = quantise_rows(broken, backend="triton"), quantise_rows(broken), quantise_rows(x)
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0, equal_nan=True)
    assert (ours.values.float() * ours.scale)[1, 3].isnan().any()
    assert torch.equal(ours.values[0].float(), clean.values[0].float())


def test_offsets_beyond_31_bits():
    """Views of storage that is touched nowhere else: rows 2^30 elements apart, batch elements 2^30 apart."""
    storage = torch.empty(2**31 + 2**25, dtype=torch.float16)
    for shape, strides in (((1, 3, 16), (16, 2**30, 1)), ((3, 3, 16), (2**30, 16, 1))):
        far = storage.as_strided(shape, strides)
        far.copy_(torch.randn(shape))
        assert_same(far)


def test_opcheck():
    for x in (torch.randn(2, 3, 32), torch.randn(6, 48).half()[:, ::2], torch.randn(0, 16)):
        torch.library.opcheck(torch.ops.aadkern.quantise_rows.default, (x,))


def test_too_wide_a_row_goes_to_torch_unless_triton_is_named():
    x = torch.randn(2, 16400)
    with pytest.raises(ValueError, match="up to 16384 channels, got 16400"):
        quantise_rows(x, backend="triton")
    assert quantise_rows(x).values.shape == x.shape
