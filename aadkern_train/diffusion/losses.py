"""The losses of the stages as pure functions of tensors; the formulas are in each docstring.

x, x0 are [B, F, C, H, W]; ``frames`` is a mask [B, F], 1 where a frame counts (the image of image-to-video does not).
Logits are [B] (one per video) or [B, F] (one per frame), in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern_train.diffusion.flow import per_frame


def masked_mean(x: Tensor, frames: Tensor) -> Tensor:
    """Mean of x [B, F, C, H, W] over the frames that count."""
    weights = per_frame(frames).expand_as(x)
    return (x * weights).sum() / weights.sum().clamp_min(1)


def regression(prediction: Tensor, target: Tensor, frames: Tensor) -> Tensor:
    """mean (prediction - target)^2: stage I on x0 (AAD-1 section 3.2), flow matching on the flow."""
    return masked_mean((prediction.float() - target.float()).square(), frames)


def dmd_direction(x_hat: Tensor, x0_fake: Tensor, x0_real: Tensor, frames: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean |x_hat - x0_real| per sample: the gradient that DMD sends into the generator's output.

    In scores it is +(1 - sigma)(s_real - s_fake) up to a positive factor, with the sign that lowers KL(generator, teacher);
    AAD-1's equation 6 read with noise predictions would have the other sign (DMD2 and Self-Forcing use this x0 form).
    """
    weights = per_frame(frames).expand_as(x_hat)
    scale = ((x_hat - x0_real).abs() * weights).sum((1, 2, 3, 4)) / weights.sum((1, 2, 3, 4)).clamp_min(1)
    direction = (x0_fake - x0_real) / scale.clamp_min(1e-6)[:, None, None, None, None]
    return torch.nan_to_num(direction * weights)


def surrogate(x_hat: Tensor, direction: Tensor, frames: Tensor) -> Tensor:
    """0.5 mean (x_hat - sg[x_hat - direction])^2, whose gradient in x_hat is direction / (number of elements that count)."""
    return 0.5 * masked_mean((x_hat - (x_hat - direction).detach()).square(), frames)


def discriminator_loss(real: Tensor, fake: Tensor, relativistic: bool = False) -> Tensor:
    """mean softplus(-real) + mean softplus(fake) (AAD-1 equation 8); relativistic: mean softplus(fake - real)."""
    if relativistic:
        return F.softplus(fake - real).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor, real: Tensor | None = None) -> Tensor:
    """mean softplus(-fake), the non-saturating loss; with real logits, the relativistic mean softplus(real - fake)."""
    return F.softplus(-fake if real is None else real - fake).mean()


def perturbation_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """mean (D(x) - D(x + delta))^2: the approximated R1 or R2 of APT and AAD-1 (equation 9), weighted by lambda outside.

    For small delta ~ N(0, s^2 I) it is about s^2 |grad_x D|^2, so lambda s^2 is the knob that counts.
    """
    return (logits - perturbed).square().mean()


@dataclass(frozen=True)
class DiscriminatorObjective:
    """L_D = adversarial + weight penalty over one batch of views, and its gradient in the logits."""

    adversarial: Tensor
    penalty: Tensor
    gradient: Tensor


@torch.no_grad()
def discriminator_objective(
    logits: Tensor, count: int, chosen: Tensor, *, weight: float, share: float = 1.0, relativistic: bool = False
) -> DiscriminatorObjective:
    """The discriminator's loss and its gradient in closed form, for ``logits.backward(gradient)``: no graph over the loss is made.

    ``logits`` [2 count + 2 c], or [2 count + 2 c, F] per frame: ``count`` real clips, as many fake ones, then the perturbed twins
    of the c real and of the c fake clips that ``chosen`` names by index, each once. ``share`` scales the penalty, for batches
    computed in parts. With n real logits, m of their twins and w = weight * share,

        dL/dreal = -sigmoid(-real) / n + 2 w (real - real') / m,   dL/dreal' = -2 w (real - real') / m,
        dL/dfake =  sigmoid(fake) / n + 2 w (fake - fake') / m,    dL/dfake' = -2 w (fake - fake') / m;

    relativistic: -sigmoid(fake - real) / n and +sigmoid(fake - real) / n in the first terms.
    """
    real, fake, *twins = logits.split([count, count, len(chosen), len(chosen)])
    gradient = torch.empty_like(logits)
    parts = gradient.split([count, count, len(chosen), len(chosen)])
    pull = torch.sigmoid(fake - real) if relativistic else None
    parts[0].copy_((-torch.sigmoid(-real) if pull is None else -pull) / real.numel())
    parts[1].copy_((torch.sigmoid(fake) if pull is None else pull) / real.numel())
    penalty = logits.new_zeros(())
    for own, twin, own_gradient, twin_gradient in zip((real, fake), twins, parts[:2], parts[2:], strict=True):
        penalty = penalty + _penalise(own, twin, chosen, weight, share, own_gradient, twin_gradient)
    return DiscriminatorObjective(discriminator_loss(real, fake, relativistic), penalty, gradient)


@torch.no_grad()
def side_objective(
    logits: Tensor, count: int, chosen: Tensor, *, real: bool, weight: float, share: float = 1.0
) -> DiscriminatorObjective:
    """The same of one side alone: ``logits`` [count + c] of ``real`` clips, or of fake ones, and of the chosen twins. Unless it is
    relativistic, the loss is the sum of the two sides', each with a backward of its own."""
    own, twin = logits.split([count, len(chosen)])
    sign, gradient = (-1.0 if real else 1.0), torch.empty_like(logits)
    own_gradient, twin_gradient = gradient.split([count, len(chosen)])
    own_gradient.copy_(sign * torch.sigmoid(sign * own) / own.numel())
    penalty = _penalise(own, twin, chosen, weight, share, own_gradient, twin_gradient)
    return DiscriminatorObjective(F.softplus(sign * own).mean(), penalty, gradient)


def _penalise(
    own: Tensor, twin: Tensor, chosen: Tensor, weight: float, share: float, own_gradient: Tensor, twin_gradient: Tensor
) -> Tensor:
    """share * mean (own - twin)^2 of the chosen, and its gradient, weighted, into those at hand."""
    if not len(chosen):
        return own.new_zeros(())
    push = 2 * weight * share * (own[chosen] - twin) / twin.numel()
    own_gradient.index_add_(0, chosen, push)
    twin_gradient.copy_(-push)
    return share * perturbation_penalty(own[chosen], twin)


def reward_of(advantage: Tensor, spread: float, limit: float) -> Tensor:
    """r [B] in [0, 1] of centred advantages: clip(A / (spread + 1e-4) / limit, -1, 1) / 2 + 1/2, so that A = 0 asks for nothing
    (DiffusionNFT, arXiv 2509.16117). An advantage that is not centred moves the student even where r says nothing of the clip."""
    return (advantage / (spread + 1e-4) / limit).clamp(-1, 1) / 2 + 0.5


def nft_loss(
    x0: Tensor, x0_old: Tensor, clean: Tensor, sigma: Tensor, reward: Tensor, beta: float, normalised: bool = False
) -> Tensor:
    """DiffusionNFT's forward-process loss on clips ``clean`` [B, f, C, H, W] that the old policy made, for each clip: [B].

        r |v+ - v|^2 + (1 - r) |v- - v|^2,   v+- = v_old +- beta (v_theta - v_old),   v = eps - clean

    in means over elements. v is affine in x0, so the mixtures are those of the estimates ``x0`` (of theta) and ``x0_old``, and an
    error in x0 is sigma times that in v. ``sigma`` [B, f] is above 0, ``reward`` r [B] in [0, 1]. The gradient in v_theta is
    -2 beta (2 r - 1) (v - v_old) at v_theta = v_old, and the minimum v_old + E[(2 r - 1) (v - v_old)] / beta given x_sigma.
    ``normalised`` weighs the squared error in x0 of either mixture by its mean absolute one, a constant, as their code does.
    """
    step = beta * (x0 - x0_old)
    total = torch.zeros_like(reward)
    for weight, mixed in ((reward, x0_old + step), (1 - reward, x0_old - step)):
        error = mixed - clean
        if normalised:
            scale = error.detach().abs().mean((1, 2, 3, 4)).clamp_min(1e-5)
            total = total + weight * error.square().mean((1, 2, 3, 4)) / scale
        else:
            total = total + weight * (error / per_frame(sigma)).square().mean((1, 2, 3, 4))
    return total
