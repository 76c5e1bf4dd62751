"""Each loss against a value derived by hand or a closed form."""

from __future__ import annotations

import math

import pytest
import torch

from aadkern_train.diffusion import losses
from aadkern_train.diffusion.flow import add_noise, clip_sigma, per_frame
from aadkern_train.diffusion.steps import shifted
from aadkern_train.worlds.linear_gaussian import LinearGaussianWorld, gaussian_w2


def test_regression_counts_only_the_frames_that_count():
    x, y = torch.randn(2, 2, 3, 2, 2, 2, dtype=torch.float64).unbind()
    frames = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    by_hand = torch.cat([(x - y)[0, 1:].flatten(), (x - y)[1, 2:].flatten()]).square().mean()
    torch.testing.assert_close(losses.regression(x, y, frames), by_hand, check_dtype=False, rtol=1e-6, atol=1e-7)


def test_surrogate_sends_the_direction_back():
    x = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    direction, frames = torch.randn_like(x), torch.tensor([[0.0, 1.0, 1.0]] * 2)
    losses.surrogate(x, direction, frames).backward()
    torch.testing.assert_close(x.grad, direction * per_frame(frames) / (4 * 4))


def test_dmd_direction_by_hand():
    x_hat = torch.tensor([1.0, 5.0]).reshape(1, 2, 1, 1, 1)
    real, fake = torch.tensor([0.0, 3.0]).reshape(1, 2, 1, 1, 1), torch.tensor([9.0, 4.0]).reshape(1, 2, 1, 1, 1)
    direction = losses.dmd_direction(x_hat, fake, real, torch.tensor([[0.0, 1.0]]))
    assert direction.flatten().tolist() == [0.0, 0.5]  # (4 - 3) / |5 - 3|; the given frame neither moves nor weighs


def test_dmd_with_exact_scores_reaches_the_teacher_and_a_flipped_sign_leaves_it():
    """World A: a linear generator x = W z. Both scores are known in closed form, so the distance to the teacher is too."""
    world, frames = LinearGaussianWorld(), 6
    teacher = world.covariance(frames)

    def distance_after(sign: float, updates: int = 150) -> tuple[float, float]:
        torch.manual_seed(0)
        size = 2 * frames
        weight = (0.6 * torch.eye(size, dtype=torch.float64) + 0.05 * torch.randn(size, size, dtype=torch.float64)).requires_grad_()
        before = gaussian_w2((weight @ weight.T).detach(), teacher)
        optimiser = torch.optim.Adam([weight], lr=0.02)
        for _ in range(updates):
            z = torch.randn(256, size, dtype=torch.float64)
            x_hat = (z @ weight.T).reshape(256, frames, 2, 1, 1)
            sigma = clip_sigma(shifted(torch.rand(256, dtype=torch.float64), 5.0).clamp(0.02, 0.98), frames, 0)
            x_tau = add_noise(x_hat.detach(), torch.randn_like(x_hat), sigma)
            own = (weight @ weight.T).detach()
            a = (1 - sigma).repeat_interleave(2, 1)
            noisy = a[:, :, None] * own * a[:, None] + torch.diag_embed(sigma.repeat_interleave(2, 1) ** 2)
            fake = (torch.linalg.solve(noisy, x_tau.flatten(1)) * a @ own).reshape(x_tau.shape)
            every = torch.ones(256, frames, dtype=torch.float64)
            direction = losses.dmd_direction(x_hat.detach(), fake, world.denoise(x_tau, sigma), every)
            optimiser.zero_grad()
            losses.surrogate(x_hat, sign * direction, every).backward()
            optimiser.step()
        return before, gaussian_w2((weight @ weight.T).detach(), teacher)

    before, after = distance_after(+1.0)
    assert after < 0.25 * before
    before, after = distance_after(-1.0)
    assert after > before


@pytest.mark.parametrize("real, fake", [(0.0, 0.0), (2.0, -1.5), (-60.0, 70.0), (90.0, -90.0)])
def test_adversarial_losses_by_hand(real, fake):
    r, f = torch.tensor([real], dtype=torch.float64), torch.tensor([fake], dtype=torch.float64)

    def softplus(a: float) -> float:
        return max(a, 0.0) + math.log1p(math.exp(-abs(a)))

    assert losses.discriminator_loss(r, f).item() == pytest.approx(softplus(-real) + softplus(fake))
    assert losses.generator_loss(f).item() == pytest.approx(softplus(-fake))
    assert losses.discriminator_loss(r, f, relativistic=True).item() == pytest.approx(softplus(fake - real))
    assert losses.generator_loss(f, r).item() == pytest.approx(softplus(real - fake))


def test_adversarial_gradients():
    r, f = torch.randn(2, 5, dtype=torch.float64).requires_grad_().unbind()
    dr, df = torch.autograd.grad(losses.discriminator_loss(r, f), (r, f))
    torch.testing.assert_close(dr, -torch.sigmoid(-r) / 5)
    torch.testing.assert_close(df, torch.sigmoid(f) / 5)
    torch.testing.assert_close(torch.autograd.grad(losses.generator_loss(f), f)[0], -torch.sigmoid(-f) / 5)


def test_penalty_gradients_reach_both_branches():
    a, b = torch.randn(2, 7, dtype=torch.float64).requires_grad_().unbind()
    da, db = torch.autograd.grad(losses.perturbation_penalty(a, b), (a, b))
    torch.testing.assert_close(da, 2 * (a - b) / 7)
    torch.testing.assert_close(db, -da)


def test_penalty_approximates_the_squared_gradient():
    """E (D(x) - D(x + delta))^2 is close to s^2 |grad D|^2 for a smooth D and small s (methods section 3: ratio 0.95 to 1.05)."""
    w, x, s = torch.randn(32, dtype=torch.float64) * 0.2, torch.randn(32, dtype=torch.float64) * 0.1, 0.05
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(torch.sin(x @ w), x)
    moved = torch.sin((x + s * torch.randn(200_000, 32, dtype=torch.float64)) @ w)
    penalty = losses.perturbation_penalty(torch.sin(x @ w).expand_as(moved), moved).item()
    assert penalty / (s**2 * gradient.square().sum().item()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("relativistic", [False, True])
@pytest.mark.parametrize("shape", [(), (3,)])
@pytest.mark.parametrize("chosen", [[], [0, 2, 3], [4]])
def test_the_discriminators_gradient_in_closed_form_is_autograds(relativistic, shape, chosen):
    count, weight, share = 5, 7.0, 0.4
    chosen = torch.tensor(chosen, dtype=torch.int64)
    logits = (3 * torch.randn(2 * count + 2 * len(chosen), *shape, dtype=torch.float64)).requires_grad_()
    real, fake, real_twins, fake_twins = logits.split([count, count, len(chosen), len(chosen)])
    adversarial = losses.discriminator_loss(real, fake, relativistic)
    pairs = ((real[chosen], real_twins), (fake[chosen], fake_twins)) if len(chosen) else ()
    penalty = share * sum((losses.perturbation_penalty(a, b) for a, b in pairs), torch.zeros((), dtype=torch.float64))
    (wanted,) = torch.autograd.grad(adversarial + weight * penalty, logits)
    got = losses.discriminator_objective(logits, count, chosen, weight=weight, share=share, relativistic=relativistic)
    torch.testing.assert_close(got.gradient, wanted)
    torch.testing.assert_close((got.adversarial, got.penalty), (adversarial.detach(), penalty.detach()))
    assert not got.gradient.requires_grad and not got.adversarial.requires_grad


@pytest.mark.parametrize("frames", [None, 3])
def test_the_two_sides_objectives_are_the_whole_ones(frames):
    """Real and fake views in batches of their own: the same gradient and the same sums."""
    count, chosen = 4, torch.tensor([0, 2, 3])
    logits = torch.randn(2 * count + 6, *([] if frames is None else [frames]), dtype=torch.float64)
    whole = losses.discriminator_objective(logits, count, chosen, weight=7.0, share=0.6)
    real, fake, real_twins, fake_twins = logits.split([count, count, 3, 3])
    sides = [
        losses.side_objective(torch.cat([own, twins]), count, chosen, real=real, weight=7.0, share=0.6)
        for own, twins, real in ((real, real_twins, True), (fake, fake_twins, False))
    ]
    (of_real, of_real_twins), (of_fake, of_fake_twins) = (side.gradient.split([count, 3]) for side in sides)
    torch.testing.assert_close(torch.cat([of_real, of_fake, of_real_twins, of_fake_twins]), whole.gradient, rtol=0, atol=0)
    for part in ("adversarial", "penalty"):
        torch.testing.assert_close(sum(getattr(side, part) for side in sides), getattr(whole, part))
