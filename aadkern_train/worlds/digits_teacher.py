"""The exact teacher of moving digits: E[x0 | x_sigma, caption] by forward-backward over (sprite, position, velocity or direction).

    x_sigma = (1 - sigma) render_t(sprite, p) + sigma eps
    log p(x_sigma | sprite, p) = -|x_sigma - (1 - sigma) render_t(sprite, p)|^2 / (2 sigma^2) + const

Without captions: P(sprite, p_t | x_sigma) ~ p(x_t | p_t) * sum_u A_t(p_t, u) sum_v K(u, v) B_t(p_t, v)
With captions:    P(sprite, p_t | x_sigma) ~ p(x_t | p_t) * sum_d A_t(p_t, d) B_t(p_t, d)

A is what the frames before t say, B what the frames after t say (u: the velocity that led here, v: the one that leads on,
d: the clip's direction, which never changes), K the law's `transitions`. Reversed in time the law is the same with opposite
velocities, so A and B come from one recursion over a doubled batch. Everything is in logarithms: no sigma underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aadkern_train.worlds.digits_captions import VELOCITIES
from aadkern_train.worlds.digits_law import DigitsLaw

IMPOSSIBLE = -1e30  # log-probability of a state that a clean frame or a caption rules out: finite, so that no difference is NaN
CLEAN_TOLERANCE = 0.03  # root mean square distance of a clean frame to its render; rounding to bf16 is about 0.003
SMALLEST_SIGMA = 1e-4  # noisy frames below it are read as of this level: the posterior is a single render long before


@dataclass(frozen=True)
class _States:
    """What a batch's hidden states can be: S sprites (all, or 1 where every clip's is known) and D velocities or directions."""

    sprite: Tensor | None  # [B] where S is 1
    allowed: Tensor  # [D, S, B]: 0, or IMPOSSIBLE where the caption states another
    directions: Tensor | None  # [D, B], None without captions
    count: Tensor  # [B]: how many (sprite, position, D) the caption leaves, fp64


class ExactTeacher(nn.Module):
    """Posterior mean, flow and likelihood of noisy "train" clips of `law` at any sigma per frame; fp32, fp64 by `.double()`.

    A frame of sigma 0 is known: it must be one of the law's frames (sharp where it is the first, blurred after it in a law
    with captions), and rules out all states but its own. Where every clip has one, or a caption with a digit, its sprite is
    known and fewer states remain. What neither says is equally likely at first (the train split's missing first frames
    are not modelled).

    text [B, 3, 16] is the clips' captions; each may state a digit, a direction, both or neither, which is the same as no text.

    Raises ValueError where shapes do not fit, sigma is outside [0, 1], a clean frame is none of the law's (give frames that
    a generator made a small sigma, such as 0.01, instead), or the clean frames cannot follow one another under the law or
    show another digit than the caption says.
    """

    renders: Tensor  # [sprites * positions, H W]: what the first frame can be
    later_renders: Tensor | None  # the same for the frames after it, None where they are as sharp
    source: Tensor  # [positions * 8]: where (p, u) came from, as an index of (p - u, u)
    comes_from: Tensor  # [8 * positions]: p - v, by v and then p

    def __init__(self, law: DigitsLaw) -> None:
        super().__init__()
        self.law = law
        back = law.moved.flip(1)  # the opposite velocity's target
        blurred = law.blurred_renders.flatten(0, 1).flatten(1) if law.blur_of("train") else None
        source = back * len(VELOCITIES) + torch.arange(len(VELOCITIES))
        self.register_buffer("renders", law.renders.flatten(0, 1).flatten(1), persistent=False)
        self.register_buffer("later_renders", blurred, persistent=False)
        self.register_buffer("source", source.flatten(), persistent=False)
        self.register_buffer("comes_from", back.T.flatten(), persistent=False)

    @torch.no_grad()
    def forward(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None = None) -> Tensor:
        """E[x0 | x_sigma, text] in the teacher's precision; x_sigma [B, F, 1, H, W], sigma [B, F] in [0, 1], text [B, 3, 16]."""
        weights, sprite = self.posterior(x_sigma, sigma, text)
        weights = weights.flatten(2)

        def mean(weights: Tensor, renders: Tensor) -> Tensor:
            return weights @ (renders if sprite is None else renders.unflatten(0, (self.law.sprites, -1))[sprite])

        if self.later_renders is None:
            return mean(weights, self.renders).reshape(x_sigma.shape)
        parts = [mean(weights[:, :1], self.renders), mean(weights[:, 1:], self.later_renders)]
        return torch.cat(parts, 1).reshape(x_sigma.shape)

    @torch.no_grad()
    def flow(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None = None) -> Tensor:
        """E[eps - x0 | x_sigma, text] = (x_sigma - E[x0]) / sigma, like x_sigma; -x0 for clean frames."""
        x0 = self(x_sigma, sigma, text)
        level = sigma.to(x0)[:, :, None, None, None]
        return torch.where(level > 0, (x_sigma.to(x0) - x0) / level.where(level > 0, 1.0), -x0)

    def posterior(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """P(sprite, position | x_sigma, text) per frame, [B, F, S, P], and the sprites that S stands for.

        S is all sprites (and the second value None), or 1 where every clip has a clean frame or a caption that states its
        digit: then the clips' sprites, [B].
        """
        emission, _, states = self._emission(x_sigma, sigma, text)
        doubled, toward = torch.cat([emission, emission.flip(1)]), states.directions
        if toward is None:
            before, after = self._by_velocity(doubled)[0].chunk(2)
            log_weights = emission + (before + self._next_velocity(after.flip(1, -1))).logsumexp(-1)
        else:
            opposite = len(VELOCITIES) - 1 - toward
            both, _ = self._by_direction(doubled, torch.cat([states.allowed] * 2, 2), torch.cat([toward, opposite], 1))
            before, after = both.chunk(2, -1)
            log_weights = emission + (before + after.flip(0)).logsumexp(2).permute(3, 0, 2, 1)
        if bool((log_weights.amax((2, 3)) < IMPOSSIBLE / 10).any()):
            other = "" if text is None else ", or that show another digit than text states"
            raise ValueError(f"x_sigma has clean frames (sigma 0) that cannot follow one another under this world's law{other}")
        return log_weights.flatten(2).softmax(-1).view_as(log_weights), states.sprite

    def log_likelihood(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None = None) -> Tensor:
        """log p(x_sigma | text) in nats, [B]: a density over noisy frames and a probability of clean ones. Differentiable.

        Its gradient in x_sigma is the score ((1 - sigma) E[x0 | x_sigma, text] - x_sigma) / sigma^2. Clips whose clean
        frames cannot follow one another, or show another digit than the caption says, get values below -1e29.
        """
        emission, offset, states = self._emission(x_sigma, sigma, text)
        if states.directions is None:
            before, shift = self._by_velocity(emission)
            last = (before[:, -1] + emission[:, -1, ..., None]).flatten(1).logsumexp(1)
        else:
            before, shift = self._by_direction(emission, states.allowed, states.directions)
            last = (before[-1] + emission[:, -1].permute(2, 1, 0)[:, None]).flatten(0, 2).logsumexp(0)
        return last + shift + offset.sum(1) - states.count.log().to(last)

    def _emission(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None) -> tuple[Tensor, Tensor, _States]:
        """log p(x_t | sprite, p), [B, F, S, P], maximum 0 for noisy frames; what was taken off, [B, F]; the states."""
        self._check(x_sigma, sigma, text)
        sprites, positions = self.law.sprites, self.law.positions
        x, sigma = x_sigma.to(self.renders).flatten(2), sigma.to(self.renders)
        clean = sigma == 0
        match = self._match(x, sigma)
        nearest = match.argmax(2)
        match = match.unflatten(2, (sprites, positions))
        state = torch.arange(sprites * positions, device=x.device).view(1, 1, sprites, positions)
        self._check_clean(x, nearest, clean)
        states = self._states(nearest // positions, clean, text)
        if states.sprite is not None:
            pick = torch.arange(len(x), device=x.device), slice(None), states.sprite
            match = match[pick][:, :, None]
            state = state.expand(len(x), -1, -1, -1)[pick][:, :, None]
        variance = sigma.clamp_min(SMALLEST_SIGMA) ** 2
        emission = match * ((1 - sigma) / variance)[:, :, None, None]
        top = emission.amax((2, 3))
        known = torch.where(state == nearest[:, :, None, None], 0.0, IMPOSSIBLE)
        emission = torch.where(clean[:, :, None, None], known.to(emission), emission - top[:, :, None, None])
        offset = top - x.square().sum(2) / (2 * variance) - x.shape[2] / 2 * (2 * math.pi * variance).log()
        return emission, torch.where(clean, 0.0, offset), states

    def _match(self, x: Tensor, sigma: Tensor) -> Tensor:
        """<x, render> - (1 - sigma) |render|^2 / 2 of frames [B, F, H W] and every state, [B, F, sprites * positions]."""

        def against(renders: Tensor, frames: slice) -> Tensor:
            return x[:, frames] @ renders.T - (1 - sigma[:, frames])[:, :, None] / 2 * renders.square().sum(1)

        if self.later_renders is None:
            return against(self.renders, slice(None))
        return torch.cat([against(self.renders, slice(1)), against(self.later_renders, slice(1, None))], 1)

    def _states(self, shown: Tensor, clean: Tensor, text: Tensor | None) -> _States:
        """The states that captions and clean frames leave; shown [B, F]: the sprite nearest to each frame."""
        law, batch, device = self.law, len(shown), shown.device
        nothing = torch.full((batch,), -1, device=device)
        stated, direction = (nothing, nothing) if text is None else law.language.read(text.to(device))
        known = shown.gather(1, clean.long().argmax(1, keepdim=True))[:, 0]
        known = torch.where(stated >= 0, stated, torch.where(clean.any(1), known, -1))
        sprite = known if bool((known >= 0).all()) else None
        directions = None
        wrong = torch.zeros(1, 1, batch, dtype=torch.bool, device=device)
        if sprite is None:
            wrong = wrong | (stated >= 0) & (stated != torch.arange(law.sprites, device=device)[:, None])
        if law.captions:
            every = torch.arange(len(VELOCITIES), device=device)[:, None].expand(-1, batch)
            directions = direction[None] if bool((direction >= 0).all()) else every
            wrong = wrong | ((direction >= 0) & (direction != directions))[:, None]
        allowed = torch.zeros(wrong.shape, device=device).masked_fill(wrong, IMPOSSIBLE).to(self.renders)
        count = torch.where(stated >= 0, 1, law.sprites) * torch.where(direction >= 0, 1, len(VELOCITIES)) * law.positions
        return _States(sprite, allowed, directions, count.double())

    def _by_velocity(self, emission: Tensor) -> tuple[Tensor, Tensor]:
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

    def _by_direction(self, emission: Tensor, allowed: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """log p(p_t, d | frames before t) up to a constant per t, [F, P, D, S, B], and the last constant, [B].

        The batch comes last, so that sums run over whole vectors: with 32 clips of 13 frames and no known sprite that took a
        call from 17 to 10 ms on one thread.
        """
        table = self.law.transitions.log().clamp_min(IMPOSSIBLE).to(emission)
        chances = table.T[:, directions][:, None, :, None]  # [8, 1, D, 1, B]
        belief = allowed.expand(emission.shape[3], -1, -1, -1)
        shift = emission.new_zeros(len(emission))
        out = [belief]
        for frame in emission[:, :-1].permute(1, 3, 2, 0).contiguous():
            seen = belief + frame[:, None]
            came = seen.flatten(1).index_select(0, self.comes_from).view(len(VELOCITIES), *seen.shape) + chances
            top = came.detach().amax(0)
            belief = (came - top).exp().sum(0).log() + top
            top = belief.amax((0, 1, 2))
            belief = belief - top
            shift = shift + top
            out.append(belief)
        return torch.stack(out), shift

    def _next_velocity(self, log_p: Tensor) -> Tensor:
        """log sum_u p(..., u) K(u, v), over the last dimension."""
        if self.law.keep == 1:
            return log_p
        top = log_p.amax(-1, keepdim=True)
        p = (log_p - top).exp()
        mixed = self.law.keep * p + (1 - self.law.keep) / len(VELOCITIES) * p.sum(-1, keepdim=True)
        return mixed.log() + top

    def _check(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None) -> None:
        if x_sigma.ndim != 5 or tuple(x_sigma.shape[2:]) != self.law.frame_shape or 0 in x_sigma.shape:
            shape = ", ".join(str(size) for size in self.law.frame_shape)
            raise ValueError(f"x_sigma must be [B, F, {shape}], got {list(x_sigma.shape)}")
        if tuple(sigma.shape) != tuple(x_sigma.shape[:2]):
            raise ValueError(f"sigma must be [B, F] = {list(x_sigma.shape[:2])}, got {list(sigma.shape)}")
        if not bool(((sigma >= 0) & (sigma <= 1)).all()):
            raise ValueError(f"sigma must be in [0, 1], got {sigma.min().item()} to {sigma.max().item()}")
        if not bool(x_sigma.isfinite().all()):
            raise ValueError("x_sigma must be finite, got NaN or infinity")
        if text is not None and not self.law.captions:
            raise ValueError("text must be None in a world without captions")
        if text is not None and len(text) != len(x_sigma):
            raise ValueError(f"text must have a row for each of {len(x_sigma)} clips, got {len(text)}")

    def _check_clean(self, x: Tensor, nearest: Tensor, clean: Tensor) -> None:
        renders = self.renders[nearest[clean]]
        if self.later_renders is not None:
            first = (torch.arange(x.shape[1], device=x.device) == 0).expand_as(clean)[clean]
            renders = torch.where(first[:, None], renders, self.later_renders[nearest[clean]])
        distance = (x[clean] - renders).square().mean(1).sqrt()
        if bool((distance > CLEAN_TOLERANCE).any()):
            raise ValueError(
                f"x_sigma has a clean frame (sigma 0) that is no frame of this world: root mean square distance "
                f"{distance.max():.3g} to the nearest, at most {CLEAN_TOLERANCE} is accepted; "
                f"give frames that a generator made a small sigma such as 0.01"
            )
