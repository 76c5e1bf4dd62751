"""World A's closed forms against autograd, sampling and Euler's method."""

from __future__ import annotations

import itertools

import pytest
import torch

from aadkern_train.worlds.linear_gaussian import LinearGaussianWorld, gaussian_w2, symmetric_root

WORLD = LinearGaussianWorld()


def euler(world, noise, steps, first_frame=None):
    x = noise.clone()
    for now, then in itertools.pairwise(torch.linspace(1, 0, steps + 1).tolist()):
        sigma = torch.full(x.shape[:2], now, dtype=x.dtype)
        if first_frame is not None:
            x[:, 0], sigma[:, 0] = first_frame, 0
        x = x + (then - now) * world.flow(x, sigma)
    if first_frame is not None:
        x[:, 0] = first_frame
    return x


def test_clips_have_the_covariance_and_follow_the_recursion():
    x = WORLD.clips(range(8000), 6)
    assert x.shape == (8000, 6, 2, 1, 1) and x.dtype == torch.float32
    flat = x.flatten(1).double()
    assert (flat.T @ flat / len(flat) - WORLD.covariance(6)).abs().max() < 0.06
    turn = torch.tensor(WORLD.theta)
    rotation = torch.tensor([[turn.cos(), -turn.sin()], [turn.sin(), turn.cos()]])
    points = x.flatten(2)
    rest = points[:, 1:] - WORLD.rho * points[:, :-1] @ rotation.T
    assert abs(rest.var() - (1 - WORLD.rho**2)) < 0.01
    assert (rest[:, 1:].flatten(0, 1).T @ points[:, 1:-1].flatten(0, 1) / 32000).abs().max() < 0.02


def test_clips_are_a_function_of_seed_split_and_index():
    x = WORLD.clips(range(6), 13)
    torch.testing.assert_close(x[[4, 2], :5], WORLD.clips([4, 2], 5))
    assert not torch.equal(x, WORLD.clips(range(6), 13, "test"))
    assert not torch.equal(x, LinearGaussianWorld(seed=1).clips(range(6), 13))


def test_score_is_the_gradient_of_the_density_and_tweedie_gives_the_denoiser():
    sigma = 0.05 + 0.95 * torch.rand(4, 5, dtype=torch.float64)
    x = torch.randn(4, 5, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    both = sigma.repeat_interleave(2, 1)
    noisy = torch.diag_embed(1 - both) @ WORLD.covariance(5) @ torch.diag_embed(1 - both) + torch.diag_embed(both**2)
    density = torch.distributions.MultivariateNormal(torch.zeros(10, dtype=torch.float64), noisy)
    (expected,) = torch.autograd.grad(density.log_prob(x.flatten(1)).sum(), x)
    score = WORLD.score(x.detach(), sigma)
    torch.testing.assert_close(score, expected)
    level = sigma[:, :, None, None, None]
    x0 = WORLD.denoise(x.detach(), sigma)
    torch.testing.assert_close((1 - level) * x0, x.detach() + level**2 * score)
    torch.testing.assert_close(x.detach() - level * WORLD.flow(x.detach(), sigma), x0)


def test_denoiser_is_the_best_linear_one():
    x = WORLD.clips(range(6000), 4).double()
    sigma = torch.tensor([[0.0, 0.5, 0.9, 1.0]]).expand(6000, 4).double()
    level = sigma[:, :, None, None, None]
    x_sigma = (1 - level) * x + level * torch.randn_like(x)
    x0 = WORLD.denoise(x_sigma, sigma)
    torch.testing.assert_close(x0[:, 0], x[:, 0])
    error, seen = (x0 - x).flatten(1), x_sigma.flatten(1)
    assert (error.T @ seen / 6000).abs().max() < 0.05, "the error is uncorrelated with all that was seen"
    assert error[:, 6:].square().mean() < 0.9, "a frame of pure noise is known from the others"


@pytest.mark.parametrize(("steps", "error"), [(50, 3.5e-2), (200, 8.9e-3), (1000, 1.8e-3)])
def test_euler_reaches_the_endpoint_at_its_rate(steps, error):
    noise = torch.randn(64, 13, 2, 1, 1, dtype=torch.float64)
    end = WORLD.endpoint(noise)
    relative = float((euler(WORLD, noise, steps) - end).norm() / end.norm())
    assert 0.85 * error < relative < 1.15 * error


def test_euler_from_a_clean_first_frame():
    noise, first = torch.randn(2, 16, 7, 2, 1, 1, dtype=torch.float64)
    end = WORLD.endpoint(noise, first[:, 0])
    torch.testing.assert_close(end[:, 0], first[:, 0])
    errors = [float((euler(WORLD, noise, n, first[:, 0]) - end).norm() / end.norm()) for n in (100, 200)]
    assert errors[1] < 0.02 and 1.8 < errors[0] / errors[1] < 2.2


def test_endpoints_have_the_law_of_the_data():
    noise = torch.randn(6000, 4, 2, 1, 1, dtype=torch.float64)
    first = WORLD.clips(range(6000), 1)[:, 0].double()
    for end in (WORLD.endpoint(noise), WORLD.endpoint(noise, first)):
        flat = end.flatten(1)
        assert (flat.T @ flat / 6000 - WORLD.covariance(4)).abs().max() < 0.08


def test_w2():
    a, b = torch.rand(2, 6, dtype=torch.float64) + 0.1
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    first, second = (rotation @ torch.diag(v) @ rotation.T for v in (a, b))
    mean = torch.randn(6, dtype=torch.float64)
    expected = ((a.sqrt() - b.sqrt()).square().sum() + mean.square().sum()).sqrt()
    assert gaussian_w2(first, second, mean) == pytest.approx(float(expected))
    assert gaussian_w2(first, second, other_mean=mean) == pytest.approx(float(expected))
    assert gaussian_w2(first, first) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(symmetric_root(first) @ symmetric_root(first), first)


def test_a_frozen_video_has_the_right_frames_and_the_wrong_law():
    true = WORLD.covariance(13)
    frozen = torch.eye(2, dtype=torch.float64).repeat(13, 13)
    for t in range(13):
        part = slice(2 * t, 2 * t + 2)
        torch.testing.assert_close(true[part, part], frozen[part, part])
    assert gaussian_w2(true, frozen) == pytest.approx(6.23, abs=0.01)


def test_bad_input():
    x = WORLD.clips(range(2), 3)
    for make, match in (
        (lambda: LinearGaussianWorld(rho=1.0), "rho"),
        (lambda: WORLD.denoise(x[:, :, :1], torch.zeros(2, 3)), "x_sigma"),
        (lambda: WORLD.denoise(x, torch.zeros(3)), "sigma"),
        (lambda: WORLD.clips([0], 3, "valid"), "split"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
