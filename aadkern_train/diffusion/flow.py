"""Flow-matching algebra: x_sigma = (1 - sigma) x0 + sigma eps, and what a network may predict of it.

Everywhere x is [B, F, C, H, W] and sigma is [B, F] in [0, 1]: one noise level per latent frame (methods: AAD-1 section 3, Wan).
The network's flow is eps - x0; at the diffusers boundary the timestep is 1000 sigma.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aadkern_train.diffusion.steps import sigma_schedule


def per_frame(sigma: Tensor) -> Tensor:
    """sigma [B, F] shaped to multiply x [B, F, C, H, W]."""
    return sigma[:, :, None, None, None]


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps."""
    s = per_frame(sigma)
    return (1 - s) * x0 + s * eps


def x0_from_flow(x_sigma: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_sigma - sigma flow."""
    return x_sigma - per_frame(sigma) * flow


def eps_from_flow(x_sigma: Tensor, flow: Tensor, sigma: Tensor) -> Tensor:
    """eps = x_sigma + (1 - sigma) flow."""
    return x_sigma + (1 - per_frame(sigma)) * flow


def flow_from_x0(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """flow = (x_sigma - x0) / sigma, and 0 on frames that are clean (sigma 0), which no sampler moves."""
    s = per_frame(sigma)
    return torch.where(s > 0, (x_sigma - x0) / s.clamp_min(1e-12), torch.zeros_like(x_sigma))


def score_from_x0(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """grad log p_sigma(x_sigma) = ((1 - sigma) x0 - x_sigma) / sigma^2, for sigma > 0."""
    s = per_frame(sigma)
    return ((1 - s) * x0 - x_sigma) / s.square()


def clip_sigma(level: Tensor, frames: int, clean_frames: int) -> Tensor:
    """One level per clip [B] -> sigma [B, frames], the first ``clean_frames`` at 0 (the image of image-to-video)."""
    sigma = level[:, None].expand(-1, frames).clone()
    sigma[:, :clean_frames] = 0
    return sigma


def with_first_frame(x: Tensor, first_frame: Tensor | None) -> Tensor:
    """x with its first frame replaced by ``first_frame`` [B, C, H, W]; x itself where that is None."""
    return x if first_frame is None else torch.cat([first_frame[:, None], x[:, 1:]], dim=1)


def integrate_ode(
    predict_x0: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float], first_frame: Tensor | None = None
) -> Tensor:
    """Euler's method along the probability-flow ODE from ``noise`` [B, F, C, H, W] at sigmas[0] to sigmas[-1].

    ``predict_x0(x_sigma, sigma [B, F])`` is the denoiser. With ``first_frame`` the clip's first frame is held clean.
    """
    x = with_first_frame(noise, first_frame)
    clean = 0 if first_frame is None else 1
    for level, following in itertools.pairwise(sigmas):
        sigma = clip_sigma(torch.full((x.shape[0],), level, dtype=x.dtype, device=x.device), x.shape[1], clean)
        moved = x + (following - level) * flow_from_x0(x, predict_x0(x, sigma), sigma)
        x = with_first_frame(moved, first_frame)
    return x


def solver_grid(steps: int, shift: float, levels: Sequence[float]) -> list[float]:
    """``sigma_schedule`` widened by ``levels`` themselves, so that a latent stored at one of them has exactly that noise."""
    return sorted({*sigma_schedule(steps, shift), *levels}, reverse=True)


def ode_trajectory(
    predict_x0: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    levels: Sequence[float],
    grid: Sequence[float],
    first_frame: Tensor | None = None,
) -> Tensor:
    """The states of ``integrate_ode`` at falling ``levels`` (1 first, 0 last) on a ``solver_grid``: [B, levels, F, C, H, W]."""
    x, stored = noise, []
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        stored.append(x)
        if following is not None:
            x = integrate_ode(predict_x0, x, [s for s in grid if following <= s <= level], first_frame)
    return torch.stack(stored, dim=1)
