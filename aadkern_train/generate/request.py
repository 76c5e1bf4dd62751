"""What a call of ``CausalWanPipeline`` asks for: its options, held to what there is before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from aadkern.checks import whole
from aadkern_train.diffusion.steps import SHIFT, STRENGTH
from aadkern_train.generate.options import wan_settings
from aadkern_train.generate.pictures import frames_of, in_chunks, latent_frames, picture_of, whole_chunks
from aadkern_train.generate.wan_model import check_size
from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.rollout import Noise

FRAMES = 81  # 5 seconds, as the family trains


@dataclass
class VideoRequest:
    """A video that is asked for: ``chunks`` of latents (None: without end), its ``frames``, and what it starts from."""

    settings: WanSettings
    text: Tensor
    noise: Noise
    chunks: int | None
    frames: int | None
    first: Tensor | None
    source: Iterator[Tensor] | None


def video_request(
    pipe: Any,
    prompt: str | None,
    frames: int | None,
    *,
    image: Any = None,
    video: Any = None,
    strength: float | None = None,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    shift: float | None = None,
    generator: torch.Generator | None = None,
    prompt_embeds: Tensor | None = None,
    **other: Any,
) -> VideoRequest:
    """The video of so many ``frames`` (None: the source video's, else without end). ``CausalWanPipeline.__call__`` tells the
    options.

    Raises ValueError, TypeError or FileNotFoundError naming the option.
    """
    for name in other:
        raise TypeError(f"{name} must be left out: this pipeline has no such option, and distilled models need no guidance")
    rows, columns = (own if side is None else side for side, own in zip((height, width), pipe.settings.size, strict=True))
    settings = replace(pipe.settings, size=(whole(rows, "height"), whole(columns, "width")))
    check_size(settings.size, pipe.pixels, pipe.transformer.config["patch_size"][1:])
    if num_inference_steps is not None:
        options: dict[str, Any] = {"steps": str(whole(num_inference_steps, "num_inference_steps", 1))}
        options |= {} if shift is None else {"shift": shift}
        settings = replace(settings, steps=wan_settings(options, pipe.run_facts).steps, first_steps=None)
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("prompt must be given, or prompt_embeds in its place")
    if video is None and strength is not None:
        raise ValueError(f"strength must come with a video, got {strength} without")
    if video is not None and image is not None:
        raise ValueError("image must be left out with a video, whose own frames this one is made from")
    size, chunks = settings.chunk_frames, None
    pictures: Iterator[np.ndarray] | None = None
    if video is not None:
        settings = settings.started(STRENGTH if strength is None else strength, SHIFT if shift is None else shift)
        pictures, count = frames_of(video, settings.size, settings.fps)
        chunks = whole_chunks(count, size)
        frames = min(frames or count, 4 * size * chunks - 3)
    if frames is not None:
        chunks = max(1, -(-(latent_frames(frames) - (image is not None)) // size))
    first = None if image is None else picture_of(image, settings.size)
    text: Any = prompt_embeds if prompt is None else pipe.encode_prompt(prompt)
    first = None if first is None else pipe.encoded_image(first)
    source = None if pictures is None else pipe.encoded(in_chunks(pictures, 4 * size - 3, 4 * size))
    device = pipe._execution_device
    channels, *sides = pipe.frame_of(settings)
    shape = (1, channels, size, *sides)

    def noise(_chunk: int, _step: int) -> Tensor:
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    return VideoRequest(settings, text, noise, chunks, frames, first, source)
