"""Self-rollout: the generator makes a clip chunk by chunk, each chunk seeing its own earlier ones through the K/V cache.

A chunk costs its denoising passes and one clean pass that writes the keys and values later chunks will see. Cached keys and values
are constants for the gradient, so given the rollout each chunk's graph stands alone (Self-Forcing; AAD-1 section 3.2). ``replay``
uses that: it sends dL/dx into one chunk at a time, with the peak memory of one chunk and the exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aadkern.plans import VideoLayout, Window
from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.generator import StreamingGenerator
from aadkern_train.diffusion.flow import add_noise
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.processes import accumulating, is_sharded
from aadkern_train.networks.denoiser import Denoiser, new_cache

Noise = Callable[[int, int], Tensor]  # (chunk, step) -> standard normal noise of that chunk [B, f, C, H, W]


@dataclass
class Made:
    """One generated chunk, and what its exit pass started from."""

    chunk: int
    x: Tensor  # [B, f, C, H, W]
    exit_input: Tensor
    exit_level: float


@dataclass
class Rollout:
    """A finished rollout: the clip, and what is needed to run any chunk again."""

    x: Tensor  # [B, F, C, H, W], first frame included
    made: list[Made]
    layout: VideoLayout
    cache: StreamingCache

    def replay(self, gradient: Tensor, generator: Denoiser, last: bool = True) -> None:
        """Add dL/d(parameters) given dL/dx ``gradient`` [B, F, C, H, W], running one chunk again at a time.

        ``last`` says that no further backward of this update follows, so sharded gradients are reduced in its final chunk.
        """
        for made in self.made:
            start, end = self.layout.chunk_frames(made.chunk)
            self.cache.rewind(start)
            with accumulating(generator, last=last and made is self.made[-1]), torch.enable_grad():
                again = generator(made.exit_input, uniform(made.x, made.exit_level), cache=self.cache)
                again.backward(gradient[:, start:end])


def uniform(x: Tensor, level: float) -> Tensor:
    """sigma [B, f], every frame of x at one level."""
    return torch.full(x.shape[:2], level, dtype=torch.float32, device=x.device)


def generated(
    generator: Denoiser,
    cache: StreamingCache,
    first_frame: Tensor,
    sizes: Iterable[int],
    noise: Noise,
    steps: StepPlan,
    *,
    with_grad: bool = False,
) -> Iterator[Made]:
    """Chunks 1, 2, ... of these sizes after ``first_frame`` [B, C, H, W], through ``cache``; each is committed when the next is
    asked for."""
    clean, x = first_frame[:, None], None
    for chunk, _ in enumerate(sizes, start=1):
        with torch.no_grad():
            generator(clean, uniform(clean, 0.0), cache=cache, cache_only=True)
        cache.commit()
        x = noise(chunk, 0)
        levels = steps.levels(chunk == 1)
        for k, level in enumerate(levels[:-1]):
            with torch.no_grad():
                x0 = generator(x, uniform(x, level), cache=cache)
                x = add_noise(x0, noise(chunk, k + 1), uniform(x, levels[k + 1]))
        with nullcontext() if with_grad else torch.no_grad():
            made = generator(x, uniform(x, levels[-1]), cache=cache)
        clean = made.detach()
        yield Made(chunk, made, x, levels[-1])


def stream(
    generator: Denoiser, first_frame: Tensor, window: Window, sizes: Iterable[int], noise: Noise, steps: StepPlan | None = None
) -> Iterator[Tensor]:
    """Endless generation in constant memory: yields each chunk [B, f, C, H, W] as it is made, through a ring cache.

    ``sizes`` are the chunks' sizes in latent frames, each at most window.frames - window.sink; it may be infinite.
    """
    room = (window.frames or 0) - window.sink
    steps, cache = steps or StepPlan(), new_cache(generator, first_frame, window, room, merged=True)

    def model(x: Tensor, timestep: Tensor, text: None, **options: Any) -> Tensor | None:
        # Through the denoiser, not its net: sharded parameters are gathered by its hooks.
        x0 = generator(x.transpose(1, 2), timestep / 1000, **options)
        return None if x0 is None else x0.transpose(1, 2)

    # What FSDP gathers under inference mode could not be trained with afterwards.
    options = {"levels": steps.levels(False), "first_levels": steps.levels(True), "inference_mode": not is_sharded(generator)}
    streaming = StreamingGenerator(model, cache, predicts="x0", **options)
    chunks = streaming.chunks(lambda chunk, step: noise(chunk, step).transpose(1, 2), first_frame=first_frame[:, :, None])
    for _, chunk in zip(sizes, chunks, strict=False):
        yield chunk.transpose(1, 2)


def rollout(
    generator: Denoiser,
    first_frame: Tensor,
    layout: VideoLayout,
    window: Window,
    noise: Noise,
    steps: StepPlan,
    *,
    with_grad: bool = False,
) -> Rollout:
    """A clip from its first frame [B, C, H, W], for training. With ``with_grad`` the exit passes are recorded, so ``x`` can be
    differentiated at once (the memory of the whole clip); otherwise nothing is, and ``Rollout.replay`` takes the gradient."""
    if layout.chunks[0] != 1:
        raise ValueError(f"layout.chunks must start with the first frame's own chunk of 1, got {layout.chunks}")
    cache = new_cache(generator, first_frame, window, max(layout.chunks), capacity_frames=layout.frames)
    made = list(generated(generator, cache, first_frame, layout.chunks[1:], noise, steps, with_grad=with_grad))
    return Rollout(torch.cat([first_frame[:, None], *(chunk.x for chunk in made)], dim=1), made, layout, cache)
