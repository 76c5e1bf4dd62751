"""The exact teacher of the digits world: E[x0 | x_sigma] by forward-backward over (sprite, position, velocity).

    x_sigma = (1 - sigma) render(sprite, p) + sigma eps
    log p(x_sigma | sprite, p) = -|x_sigma - (1 - sigma) render(sprite, p)|^2 / (2 sigma^2) + const
    P(sprite, p_t | x_sigma) ~ p(x_t | p_t) * sum_u A_t(p_t, u) sum_v K(u, v) B_t(p_t, v)

A is what the frames before t say (u: the velocity that led here), B what the frames after t say (v: the velocity that
leads on), K(u, v) = keep [u = v] + (1 - keep) / 8. Reversed in time the law is the same with opposite velocities, so
A and B come from one recursion over a doubled batch. Everything is in logarithms: no sigma underflows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from aadkern_train.worlds.digits import VELOCITIES, DigitsWorld

IMPOSSIBLE = -1e30  # log-probability of a state that a clean frame rules out: finite, so that no difference is NaN
CLEAN_TOLERANCE = 0.03  # root mean square distance of a clean frame to its render; rounding to bf16 is about 0.003
SMALLEST_SIGMA = 1e-4  # noisy frames below it are read as of this level: the posterior is a single render long before


class ExactTeacher(nn.Module):
    """Posterior mean, flow and likelihood of noisy clips of `world` at any sigma per frame; fp32, fp64 by `.double()`.

    A frame of sigma 0 is known: it must be one of the world's renders, and rules out all states but its own. Where
    every clip has one, its sprite is known and only positions * 8 states remain. Before any frame is seen, all
    sprites and positions are equally likely (the train split's missing first frames are not modelled).

    Raises ValueError where shapes do not fit, sigma is outside [0, 1], a clean frame is no render of the world (give
    frames that a generator made a small sigma, such as 0.01, instead), or the clean frames cannot follow one another
    under the law.
    """

    renders: Tensor  # [sprites * positions, H W]
    source: Tensor  # [positions * 8]: where (p, u) came from, as an index of (p - u, u)

    def __init__(self, world: DigitsWorld) -> None:
        super().__init__()
        self.world = world
        back = world.moved.flip(1)  # the opposite velocity's target
        self.register_buffer("renders", world.renders.flatten(0, 1).flatten(1), persistent=False)
        source = back * len(VELOCITIES) + torch.arange(len(VELOCITIES))
        self.register_buffer("source", source.flatten(), persistent=False)

    @torch.no_grad()
    def forward(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_sigma] in the teacher's precision; x_sigma [B, F, 1, H, W], sigma [B, F] in [0, 1]."""
        weights, sprite = self.posterior(x_sigma, sigma)
        renders = self.renders if sprite is None else self.renders.unflatten(0, (self.world.sprites, -1))[sprite]
        return (weights.flatten(2) @ renders).reshape(x_sigma.shape)

    @torch.no_grad()
    def flow(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """E[eps - x0 | x_sigma] = (x_sigma - E[x0]) / sigma, like x_sigma; -x0 for clean frames."""
        x0 = self(x_sigma, sigma)
        level = sigma.to(x0)[:, :, None, None, None]
        return torch.where(level > 0, (x_sigma.to(x0) - x0) / level.where(level > 0, 1.0), -x0)

    def posterior(self, x_sigma: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor | None]:
        """P(sprite, position | x_sigma) per frame, [B, F, S, P], and the sprites that S stands for.

        S is all sprites (and the second value None), or 1 where every clip has a clean frame: then the clips'
        sprites, [B].
        """
        emission, _, sprite = self._emission(x_sigma, sigma)
        both, _ = self._predictions(torch.cat([emission, emission.flip(1)]))
        before, after = both.chunk(2)
        after = self._next_velocity(after.flip(1, -1))
        log_weights = emission + (before + after).logsumexp(-1)
        if bool((log_weights.amax((2, 3)) < IMPOSSIBLE / 10).any()):
            raise ValueError("x_sigma has clean frames (sigma 0) that cannot follow one another under this world's law")
        return log_weights.flatten(2).softmax(-1).view_as(log_weights), sprite

    def log_likelihood(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_sigma) in nats, [B]: a density over noisy frames and a probability of clean ones. Differentiable.

        Its gradient in x_sigma is the score ((1 - sigma) E[x0 | x_sigma] - x_sigma) / sigma^2. Clips whose clean
        frames cannot follow one another get values below -1e29.
        """
        emission, offset, _ = self._emission(x_sigma, sigma)
        before, shift = self._predictions(emission)
        states = self.world.sprites * self.world.positions * len(VELOCITIES)
        last = (before[:, -1] + emission[:, -1, ..., None]).flatten(1).logsumexp(1)
        return last + shift + offset.sum(1) - math.log(states)

    def _emission(self, x_sigma: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """log p(x_t | sprite, p), [B, F, S, P], maximum 0 for noisy frames; what was taken off, [B, F]; sprites."""
        self._check(x_sigma, sigma)
        sprites, positions = self.world.sprites, self.world.positions
        x, sigma = x_sigma.to(self.renders).flatten(2), sigma.to(self.renders)
        clean = sigma == 0
        match = x @ self.renders.T - (1 - sigma)[:, :, None] / 2 * self.renders.square().sum(1)
        nearest = match.argmax(2)
        match = match.unflatten(2, (sprites, positions))
        state = torch.arange(sprites * positions, device=x.device).view(1, 1, sprites, positions)
        self._check_clean(x, nearest, clean)
        sprite = None
        if bool(clean.any(1).all()):
            sprite = (nearest // positions).gather(1, clean.long().argmax(1, keepdim=True))[:, 0]
            pick = torch.arange(len(x), device=x.device), slice(None), sprite
            match = match[pick][:, :, None]
            state = state.expand(len(x), -1, -1, -1)[pick][:, :, None]
        variance = sigma.clamp_min(SMALLEST_SIGMA) ** 2
        emission = match * ((1 - sigma) / variance)[:, :, None, None]
        top = emission.amax((2, 3))
        known = torch.where(state == nearest[:, :, None, None], 0.0, IMPOSSIBLE)
        emission = torch.where(clean[:, :, None, None], known.to(emission), emission - top[:, :, None, None])
        offset = top - x.square().sum(2) / (2 * variance) - x.shape[2] / 2 * (2 * math.pi * variance).log()
        return emission, torch.where(clean, 0.0, offset), sprite

    def _predictions(self, emission: Tensor) -> tuple[Tensor, Tensor]:
        """log p(p_t, u_t | frames before t) up to a constant per t, [B, F, S, P, 8], and the last constant, [B]."""
        belief = emission.new_zeros(*emission.shape[:1], *emission.shape[2:], len(VELOCITIES))
        shift = emission.new_zeros(len(emission))
        out = [belief]
        for frame in emission[:, :-1].unbind(1):
            mixed = self._next_velocity(belief + frame[..., None])
            belief = mixed.flatten(-2)[..., self.source].view_as(mixed)
            top = belief.amax((1, 2, 3))
            belief = belief - top[:, None, None, None]
            shift = shift + top
            out.append(belief)
        return torch.stack(out, 1), shift

    def _next_velocity(self, log_p: Tensor) -> Tensor:
        """log sum_u p(..., u) K(u, v), over the last dimension."""
        if self.world.keep == 1:
            return log_p
        top = log_p.amax(-1, keepdim=True)
        p = (log_p - top).exp()
        mixed = self.world.keep * p + (1 - self.world.keep) / len(VELOCITIES) * p.sum(-1, keepdim=True)
        return mixed.log() + top

    def _check(self, x_sigma: Tensor, sigma: Tensor) -> None:
        if x_sigma.ndim != 5 or tuple(x_sigma.shape[2:]) != self.world.frame_shape or 0 in x_sigma.shape:
            shape = ", ".join(str(size) for size in self.world.frame_shape)
            raise ValueError(f"x_sigma must be [B, F, {shape}], got {list(x_sigma.shape)}")
        if tuple(sigma.shape) != tuple(x_sigma.shape[:2]):
            raise ValueError(f"sigma must be [B, F] = {list(x_sigma.shape[:2])}, got {list(sigma.shape)}")
        if not bool(((sigma >= 0) & (sigma <= 1)).all()):
            raise ValueError(f"sigma must be in [0, 1], got {sigma.min().item()} to {sigma.max().item()}")
        if not bool(x_sigma.isfinite().all()):
            raise ValueError("x_sigma must be finite, got NaN or infinity")

    def _check_clean(self, x: Tensor, nearest: Tensor, clean: Tensor) -> None:
        distance = (x[clean] - self.renders[nearest[clean]]).square().mean(1).sqrt()
        if bool((distance > CLEAN_TOLERANCE).any()):
            raise ValueError(
                f"x_sigma has a clean frame (sigma 0) that is no frame of this world: root mean square distance "
                f"{distance.max():.3g} to the nearest, at most {CLEAN_TOLERANCE} is accepted; "
                f"give frames that a generator made a small sigma such as 0.01"
            )
