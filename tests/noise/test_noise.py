"""noised_views: its integers against published vectors, its normals against fp64 and chance, its views against the formula."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import stats

import aadkern
from aadkern.noise import layout, reference

SHAPE = (3, 4, 2, 5, 6)  # 60 elements a frame: not a multiple of 8


def clips(dtype=torch.float32, shape=SHAPE):
    return torch.randn(shape).to(dtype), torch.rand(shape[:2])


def normals_of(seed, shape, stream=layout.EPS_STREAM, first_sample=0):
    return reference.normal(torch.tensor([seed]), first_sample, torch.Size(shape), stream)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),  # Random123's known answers for philox4x32, 10 rounds
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, expected):
    drawn = reference.philox(tuple(torch.tensor([w]) for w in key), tuple(torch.tensor([w]) for w in counter))
    assert tuple(int(w) for w in drawn) == expected


def test_words_follow_the_documented_layout():
    seeds = torch.tensor([-5, 2**62 + 7, 11])
    per_sample = reference.words(seeds, 0, 3, 10, layout.DELTA_STREAM)
    one_seed = reference.words(seeds[1:2], 40, 3, 10, layout.DELTA_STREAM)
    for b, e in itertools.product(range(3), range(10)):

        def word(seed, sample, e=e):
            key = (torch.tensor([seed & layout.WORD]), torch.tensor([seed >> 32 & layout.WORD]))
            return reference.philox(key, tuple(torch.tensor([w]) for w in (e // 4, 0, sample, 1)))[e % 4]

        assert per_sample[b, e] == word(int(seeds[b]), 0)
        assert one_seed[b, e] == word(int(seeds[1]), 40 + b)


def test_normals_are_the_transform_to_a_few_units_in_the_last_place():
    """Measured: the logarithm within 0.83 ulp, the normals within 4.2, on 2^20 random pairs."""
    first, second = torch.randint(2**32, (2, 1 << 20))
    second[:8] = torch.arange(8) * 2**29  # multiples of an eighth turn
    first[8:12] = torch.tensor([0, 1, 2**32 - 1, 2**31])
    u = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius, angle = (-2 * u.double().log()).sqrt(), second.double() * (2 * math.pi / 2**32)
    for got, exact in zip(reference.normals(first, second), (radius * angle.cos(), radius * angle.sin()), strict=True):
        unit = torch.nextafter(exact.abs().float(), torch.tensor(torch.inf)) - exact.abs().float()
        turned = exact.abs() > 1e-9  # fp64's own angle is off by 1e-15 where the cosine should be 0
        assert ((got.double() - exact).abs() / unit)[turned].max() < 6
        assert got[~turned].abs().max() < 1e-8
        assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [0.05, "frames"])
def test_the_views_are_the_formula(dtype, std):
    x0, sigma = clips(dtype)
    stds = torch.rand(SHAPE[:2]) if std == "frames" else torch.full(SHAPE[:2], std, dtype=torch.float64)
    x_sigma, moved = aadkern.noised_views(x0, sigma, delta_std=stds if std == "frames" else std, seed=9)
    wide = torch.promote_types(dtype, torch.float32)
    s, d = (y.to(wide)[:, :, None, None, None].double() for y in (sigma, stds))
    exact = (1 - s) * x0.double() + s * normals_of(9, SHAPE).double()
    exact_moved = exact + d * normals_of(9, SHAPE, layout.DELTA_STREAM).double()
    step = max(torch.finfo(dtype).eps, 1e-14)  # half a step of rounding, and 3 of fp32's in between
    for got, wanted in ((x_sigma, exact), (moved, exact_moved)):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=step, atol=3 * max(torch.finfo(wide).eps, 1e-15))


def test_a_level_per_clip_is_that_level_in_every_frame():
    x0, sigma = clips()
    level = sigma[:, 0]
    one = aadkern.noised_views(x0, level, delta_std=0.1, seed=3)
    all_frames = aadkern.noised_views(x0, level[:, None].expand(SHAPE[:2]), delta_std=torch.full((3,), 0.1), seed=torch.tensor(3))
    assert all(torch.equal(a, b) for a, b in zip(one, all_frames, strict=True))


def test_frames_without_noise_or_perturbation_stay():
    x0, sigma = clips()
    stds = torch.full(SHAPE[:2], 0.3)
    sigma[:, 0] = stds[:, 0] = 0
    x_sigma, moved = aadkern.noised_views(x0, sigma, delta_std=stds, seed=1)
    assert torch.equal(x_sigma[:, 0], x0[:, 0]) and torch.equal(moved[:, 0], x0[:, 0])
    assert (x_sigma[:, 1:] != x0[:, 1:]).float().mean() > 0.99 and (moved[:, 1:] != x_sigma[:, 1:]).float().mean() > 0.99


def test_parts_of_a_batch_draw_what_the_whole_draws():
    x0, sigma = clips()
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,))
    for seed in (77, seeds):
        whole = aadkern.noised_views(x0, sigma, delta_std=0.1, seed=seed)
        for part in (slice(0, 1), slice(1, 3)):
            own = {"seed": seed[part]} if isinstance(seed, torch.Tensor) else {"seed": seed, "first_sample": part.start}
            got = aadkern.noised_views(x0[part], sigma[part], delta_std=0.1, **own)
            assert all(torch.equal(a[part], b) for a, b in zip(whole, got, strict=True))


def test_gradients_reach_x0_alone_and_are_exact():
    x0, sigma = clips(torch.float64)
    x0, sigma = x0.requires_grad_(), sigma.double().requires_grad_()
    torch.autograd.gradcheck(lambda x: aadkern.noised_views(x, sigma, delta_std=0.2, seed=5), x0)
    torch.autograd.gradcheck(lambda x: aadkern.noised_views(x, sigma, delta_std=0.2, seed=5)[1], x0)
    out = sum(view.sum() for view in aadkern.noised_views(x0, sigma, delta_std=0.2, seed=5))
    assert torch.autograd.grad(out, sigma, allow_unused=True) == (None,)


def test_operator_and_compilation():
    x0, sigma = clips()
    seed, std = torch.tensor([4]), torch.full(SHAPE[:2], 0.1)
    torch.library.opcheck(torch.ops.aadkern.noised_views.default, (x0.requires_grad_(), sigma, std, seed, 0, "auto"))
    compiled = torch.compile(lambda x, s, seed: aadkern.noised_views(x, s, delta_std=0.1, seed=seed), fullgraph=True)
    for number in (4, 5):
        made = compiled(x0, sigma, torch.tensor([number]))
        eager = aadkern.noised_views(x0, sigma, delta_std=0.1, seed=number)
        assert all(torch.equal(a, b) for a, b in zip(made, eager, strict=True))


def test_inputs_are_left_alone_and_strides_do_not_matter():
    x0, sigma = clips()
    strided = x0.permute(0, 2, 1, 3, 4).contiguous().permute(0, 2, 1, 3, 4)
    before = strided.clone()
    got = aadkern.noised_views(strided, sigma, delta_std=0.1, seed=2)
    assert torch.equal(strided, before)
    assert all(torch.equal(a, b) for a, b in zip(got, aadkern.noised_views(x0, sigma, delta_std=0.1, seed=2), strict=True))


# Chance. Each test's seeds are fixed; had they been drawn afresh, a right generator would fail one in about 10^4 times.
COUNT = 1 << 18
RARE = 1e-4


def draws(seed, stream=layout.EPS_STREAM, sample=0):
    return normals_of(seed, (1, COUNT), stream, sample)[0].double()


def test_the_normals_are_normal():
    x = draws(123)
    assert stats.kstest(x.numpy(), "norm").pvalue > RARE
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # E x^k and Var x^k
        assert abs(x.pow(power).mean() - moment) < 3.9 * math.sqrt(spread / COUNT)  # 3.9 sigma: 1e-4
    tails = int((x.abs() > 4).sum())
    expected = COUNT * 2 * stats.norm.sf(4)
    assert stats.poisson.cdf(tails, expected) > RARE and stats.poisson.sf(tails - 1, expected) > RARE


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 128, 1024])
def test_elements_are_not_correlated(lag):
    x = draws(7)
    assert abs((x[lag:] * x[:-lag]).mean()) < 4.5 / math.sqrt(COUNT)  # 8 lags: a wider limit for each
    squares = x.square() - 1
    assert abs((squares[lag:] * squares[:-lag]).mean()) < 2 * 4.5 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"seed": 1}, {"seed": 2}),
        ({"seed": 1}, {"seed": 1 + 2**32}),
        ({"seed": 1}, {"seed": -1}),
        ({"seed": 1}, {"seed": 1, "sample": 1}),
        ({"seed": 1}, {"seed": 1, "stream": layout.DELTA_STREAM}),
    ],
)
def test_seeds_samples_and_streams_are_not_correlated(one, other):
    a, b = draws(**one), draws(**other)
    assert abs((a * b).mean()) < 4.5 / math.sqrt(COUNT)
    assert abs(((a.square() - 1) * (b.square() - 1)).mean()) < 2 * 4.5 / math.sqrt(COUNT)


GOOD = {"delta_std": 0.1, "seed": 0}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x0": [1.0]}, TypeError, "x0 must be a torch.Tensor, got list"),
        ({"x0": torch.ones(SHAPE, dtype=torch.int64)}, TypeError, "x0 must be float32.*int64"),
        ({"x0": torch.ones(3, 4, 5)}, ValueError, r"x0 must be \[batch, frames, channels, height, width\], got shape \(3, 4, 5\)"),
        ({"x0": torch.ones(1).expand(3, 4, 2**10, 2**10, 2**10)}, ValueError, "at most .* elements per sample"),
        ({"sigma": 0.5}, TypeError, r"sigma must be a torch\.Tensor, got float"),
        ({"sigma": torch.ones(3, dtype=torch.int64)}, TypeError, "sigma must be a floating-point tensor, got torch.int64"),
        ({"sigma": torch.rand(4)}, ValueError, r"sigma must be \[3\] or \[3, 4\], got \[4\]"),
        ({"sigma": torch.rand(3, 4, device="meta")}, ValueError, "sigma must be on x0's device cpu, got meta"),
        ({"delta_std": -0.1}, ValueError, "delta_std must be finite and not negative, got -0.1"),
        ({"delta_std": math.nan}, ValueError, "delta_std must be finite"),
        ({"delta_std": "0.1"}, TypeError, "delta_std must be a real number, got str"),
        ({"delta_std": torch.rand(3, 5)}, ValueError, r"delta_std must be \[3\] or \[3, 4\], got \[3, 5\]"),
        ({"seed": 0.5}, TypeError, "seed must be an int or an int64 tensor, got 0.5"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"seed": 2**63}, ValueError, "seed must fit in 64 signed bits"),
        ({"seed": torch.tensor([1], dtype=torch.int32)}, TypeError, "seed must be .*int64 tensor, got torch.int32"),
        ({"seed": torch.arange(2)}, ValueError, r"seed must be one number or \[3\], got \[2\]"),
        ({"first_sample": -1}, ValueError, "first_sample must be at least 0, got -1"),
        ({"first_sample": 0.0}, TypeError, "first_sample must be a whole number"),
        ({"seed": torch.arange(3), "first_sample": 3}, ValueError, "and 0 with a seed per sample, got 3"),
        ({"backend": "cuda"}, ValueError, "noised_views: backend must be one of reference, torch, triton, or None, got 'cuda'"),
        ({"backend": "auto"}, ValueError, "noised_views: backend must be one of reference, torch, triton, or None, got 'auto'"),
        ({"backend": 3}, ValueError, "noised_views: backend must be one of reference, torch, triton, or None, got 3"),
        ({"backend": "triton"}, ValueError, "Triton kernels need a GPU"),
    ],
)
def test_bad_input(change, error, says):
    x0, sigma = clips()
    arguments = {"x0": x0, "sigma": sigma, **GOOD, **change}
    with pytest.raises(error, match=says):
        aadkern.noised_views(arguments.pop("x0"), arguments.pop("sigma"), **arguments)


@pytest.mark.parametrize("shape", [(0, 4, 2, 5, 6), (2, 0, 1, 3, 3), (2, 3, 0, 4, 4)])
def test_nothing_in_nothing_out(shape):
    x0 = torch.randn(shape, requires_grad=True)
    views = aadkern.noised_views(x0, torch.rand(shape[:2]), delta_std=0.1, seed=0)
    assert all(view.shape == shape for view in views)
    assert torch.autograd.grad(views[0].sum() + views[1].sum(), x0)[0].shape == shape
