"""The flow-matching algebra: identities in fp64, the ODE against its closed form."""

from __future__ import annotations

import itertools

import pytest
import torch

from aadkern_train.diffusion import flow
from aadkern_train.diffusion.steps import shifted, sigma_schedule, unshifted
from aadkern_train.worlds.linear_gaussian import LinearGaussianWorld


def test_conversions_are_inverse_to_each_other():
    x0, eps = torch.randn(2, 3, 4, 1, 2, 2, dtype=torch.float64).unbind()
    sigma = torch.rand(3, 4, dtype=torch.float64) * 0.98 + 0.01
    x = flow.add_noise(x0, eps, sigma)
    v = eps - x0
    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flow.x0_from_flow(x, v, sigma), x0, **close)
    torch.testing.assert_close(flow.eps_from_flow(x, v, sigma), eps, **close)
    torch.testing.assert_close(flow.flow_from_x0(x, x0, sigma), v, **close)
    torch.testing.assert_close(flow.score_from_x0(x, x0, sigma), -eps / flow.per_frame(sigma), **close)


def test_clean_frames_stand_still():
    x = torch.randn(2, 3, 1, 2, 2)
    sigma = torch.tensor([[0.0, 0.5, 1.0]]).expand(2, -1)
    assert (flow.flow_from_x0(x, x + 1, sigma)[:, 0] == 0).all()
    assert flow.flow_from_x0(x, x + 1, sigma)[:, 1].abs().min() > 0


@pytest.mark.parametrize("u, sigma", [(1.0, 1.0), (0.75, 0.9375), (0.5, 5 / 6), (0.25, 0.625), (0.0, 0.0)])
def test_shift_five_gives_self_forcings_levels(u, sigma):
    assert shifted(u, 5.0) == pytest.approx(sigma)
    assert unshifted(sigma, 5.0) == pytest.approx(u)


def test_schedule_falls_from_one_to_zero():
    sigmas = sigma_schedule(24, 5.0)
    assert len(sigmas) == 25 and sigmas[0] == 1.0 and sigmas[-1] == 0.0
    assert all(a > b for a, b in itertools.pairwise(sigmas))
    with pytest.raises(ValueError, match="steps"):
        sigma_schedule(0, 5.0)


def test_clip_sigma_keeps_the_given_frame_clean():
    sigma = flow.clip_sigma(torch.tensor([0.3, 0.9]), 4, 1)
    assert sigma.tolist() == [[0.0, pytest.approx(0.3)] + [pytest.approx(0.3)] * 2, [0.0] + [pytest.approx(0.9)] * 3]


@pytest.mark.parametrize("given", [False, True])
def test_euler_converges_to_the_closed_form(given):
    world = LinearGaussianWorld()
    noise = torch.randn(64, 9, 2, 1, 1, dtype=torch.float64)
    first = world.clips(range(64), 1)[:, 0].double() if given else None
    exact = world.endpoint(noise, first)
    errors = []
    for steps in (25, 100):
        x = flow.integrate_ode(world.denoise, noise, sigma_schedule(steps, 5.0), first)
        errors.append(((x - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.03 and 3 < errors[0] / errors[1] < 5, "Euler's method is of first order"
    if given:
        assert torch.equal(x[:, 0], first)
