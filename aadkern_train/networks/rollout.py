"""Self-rollout: the generator makes a clip chunk by chunk, each chunk seeing its own earlier ones through the K/V cache.

A chunk costs its denoising passes and one clean pass that writes the keys and values later chunks will see. Cached keys and values
are constants for the gradient, so given the rollout each chunk's graph stands alone (Self-Forcing; AAD-1 section 3.2). ``replay``
uses that: it sends dL/dx into one chunk at a time, with the peak memory of one chunk and the exact gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aadkern.plans import VideoLayout, Window
from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.generator import StreamingGenerator
from aadkern.wan import CachedChunk, TextCache
from aadkern_train.diffusion.flow import add_noise
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.processes import accumulating, is_sharded
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.denoiser import Denoiser, new_cache

Noise = Callable[[int, int], Tensor]  # (n, step) -> standard normal noise [B, f, C, H, W] of the n-th generated chunk, n from 1


@dataclass
class Made:
    """One generated chunk, by its index in the layout, and what its exit pass started from."""

    chunk: int
    x: Tensor  # [B, f, C, H, W]
    exit_input: Tensor
    exit_level: float


@dataclass
class Rollout:
    """A finished rollout: the clip, and what is needed to run any chunk again."""

    x: Tensor  # [B, F, C, H, W], a given first frame included
    made: list[Made]
    layout: VideoLayout
    cache: StreamingCache | None
    text: Tensor | None
    new_cache: Callable[[], StreamingCache]

    def forget_cache(self) -> None:
        """Frees the keys and values (6 GB a clip at 1.3B, 480p); ``replay`` makes them again, by one more clean pass a chunk."""
        self.cache = None

    def replay(self, gradient: Tensor, generator: Denoiser, last: bool = True) -> None:
        """Add dL/d(parameters) given dL/dx ``gradient`` [B, F, C, H, W], running one chunk again at a time.

        ``last`` says that no further backward of this update follows, so sharded gradients are reduced in its final chunk.
        """
        kept, cache = self.cache is not None, self.cache or self.new_cache()
        text = None if self.text is None else TextCache.lazy(self.text)
        for made in self.made:
            start, end = self.layout.chunk_frames(made.chunk)
            if kept:
                cache.rewind(start)
            elif start:
                write_clean(generator, self.x[:, slice(*self.layout.chunk_frames(made.chunk - 1))].detach(), text, cache)
            with accumulating(generator, last=last and made is self.made[-1]), torch.enable_grad():
                again = generator(made.exit_input, uniform(made.x, made.exit_level), self.text, cache)
                again.backward(gradient[:, start:end])


def write_clean(generator: Denoiser, clean: Tensor, text: TextCache | None, cache: StreamingCache) -> None:
    """The keys and values of a finished chunk, which later ones will see."""
    with torch.no_grad():
        generator(clean, uniform(clean, 0.0), text, CachedChunk(cache, cache_only=True))
    cache.commit()


def uniform(x: Tensor, level: float) -> Tensor:
    """sigma [B, f], every frame of x at one level."""
    return torch.full(x.shape[:2], level, dtype=torch.float32, device=x.device)


def rollout(
    generator: Denoiser,
    condition: Condition,
    layout: VideoLayout,
    window: Window,
    noise: Noise,
    steps: StepPlan,
    *,
    with_grad: bool = False,
) -> Rollout:
    """A clip under its condition, for training: after its first frame, or in text to video from nothing.

    With ``with_grad`` the exit passes are recorded, so ``x`` can be differentiated at once (the memory of the whole clip);
    otherwise nothing is, and ``Rollout.replay`` takes the gradient. Raises ValueError for a first frame without its own chunk.
    """
    first = condition.first
    text = None if condition.text is None else TextCache.lazy(condition.text)
    if first is not None and layout.chunks[0] != 1:
        raise ValueError(f"layout.chunks must start with the first frame's own chunk of 1, got {layout.chunks}")
    start = noise(1, 0)
    sizes = (start.shape[0], start.shape[2:], window, max(layout.chunks))
    empty = partial(new_cache, generator, *sizes, capacity_frames=layout.frames)
    cache = empty()
    given_chunks = 0 if first is None else 1
    clean = None if first is None else first[:, None]
    made: list[Made] = []
    for chunk in range(given_chunks, len(layout.chunks)):
        number = chunk - given_chunks + 1
        if clean is not None:
            write_clean(generator, clean, text, cache)
        x = start if number == 1 else noise(number, 0)
        levels = steps.levels(number == 1)
        for k, level in enumerate(levels[:-1]):
            with torch.no_grad():
                x0 = generator(x, uniform(x, level), text, cache)
                x = add_noise(x0, noise(number, k + 1), uniform(x, levels[k + 1]))
        with nullcontext() if with_grad else torch.no_grad():
            out = generator(x, uniform(x, levels[-1]), text, cache)
        made.append(Made(chunk, out, x, levels[-1]))
        clean = out.detach()
    frames = [] if first is None else [first[:, None]]
    return Rollout(torch.cat([*frames, *(chunk.x for chunk in made)], dim=1), made, layout, cache, condition.text, empty)


class _Sharded:
    """A sharded network as ``StreamingGenerator`` takes it: without ``time_cache``, as nothing can be computed outside of its
    forward, where FSDP gathers it. Its text cache is a lazy one."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.net(*arguments, **options)

    def text_cache(self, text: Tensor) -> TextCache:
        return self.net.text_cache(text)  # type: ignore[no-any-return]


def streaming(
    generator: Denoiser, batch: int, frame_shape: Sequence[int], window: Window, steps: StepPlan, text: Tensor | None = None
) -> StreamingGenerator:
    """The generator's stream of ``batch`` clips in constant memory, through a ring cache; chunks are [B, C, f, H, W].

    A chunk has at most window.frames - window.sink latent frames.
    """
    sharded = is_sharded(generator)
    cache = new_cache(generator, batch, frame_shape, window, (window.frames or 0) - window.sink, merged=True)
    return StreamingGenerator(
        _Sharded(generator.net) if sharded else generator.net,
        cache,
        levels=steps.levels(False),
        first_levels=steps.levels(True),
        predicts=generator.predicts,
        text=text,
        inference_mode=not sharded,  # what FSDP gathers under inference mode could not be trained with afterwards
    )


def stream(
    generator: Denoiser,
    condition: Condition,
    frame_shape: Sequence[int],
    window: Window,
    sizes: Iterable[int],
    noise: Noise,
    steps: StepPlan | None = None,
) -> Iterator[Tensor]:
    """Endless generation under one condition: yields each chunk [B, f, C, H, W] as it is made.

    ``sizes`` are the chunks' sizes in latent frames; it may be infinite.
    """
    first = None if condition.first is None else condition.first[:, :, None]
    held = condition.first if condition.first is not None else condition.text
    if held is None:
        raise ValueError("condition must have a first frame or a text, it has neither")
    generator_stream = streaming(generator, held.shape[0], frame_shape, window, steps or StepPlan(), condition.text)
    chunks = generator_stream.chunks(lambda number, step: noise(number, step).transpose(1, 2), first_frame=first)
    for _, chunk in zip(sizes, chunks, strict=False):
        yield chunk.transpose(1, 2)


TURNS = ("kept", "recached", "restarted")
"""What becomes of what is in view when the prompt changes: it stays, its keys and values are made anew under the new prompt, or its
last frame starts a video of its own."""


def turn_to(stream: StreamingGenerator, text: Tensor, turn: str) -> None:
    """Gives a stream its next text in one of the ``TURNS``."""
    stream.set_text(text, recache=turn == "recached", restart=turn == "restarted")
