"""Streaming a video from a run's generator and a first frame, chunk after chunk, written as mp4 or gif. Wan: ``generate_wan``."""

from __future__ import annotations

import sys
import time
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.checkpoint import load_weights
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.engine.video import SUFFIXES, read_video, write_video
from aadkern_train.networks.rollout import stream
from aadkern_train.recipes import ClipsData, Recipe
from aadkern_train.run import Run
from aadkern_train.worlds.patch_latents import PatchLatents

STREAMERS = ("adversarial", "dmd_continued", "dmd", "ode")  # best first


def find_weights(checkpoint: Path) -> Path:
    """The weights file named, or the furthest stage's of a run folder. Raises ValueError where there is none that streams."""
    if checkpoint.is_file():
        return checkpoint
    for stage in STREAMERS:
        weights = RunFolder(checkpoint).weights(stage)
        if weights.exists():
            return weights
    accepted = "a Wan folder, a .pt file, a run with a finished causal stage, or a .safetensors file of one"
    raise ValueError(f"checkpoint must be {accepted}; {checkpoint} is none")


def first_frame_from(run: Run, image: Path) -> Tensor:
    """The first frame of an image or video file as a latent frame [1, C, H, W], resized and cropped to the run's size."""
    _channels, height, width = run.videos.frame_shape
    if isinstance(run.recipe.data, ClipsData):
        from aadkern_train.worlds.video_folder import decode

        return run.videos.encode(decode(image, (run.recipe.data.height, run.recipe.data.width), None)[None, :1])[:, 0]
    frames, _ = read_video(image)
    grey = torch.as_tensor(frames[0]).float().mean(-1)[None, None]
    grey = torch.nn.functional.interpolate(grey, (height, width), mode="area")
    deviation = grey.std(correction=0)
    if deviation == 0:
        raise ValueError(f"image must show something: {image} is of one colour")
    return (grey - grey.mean()) / deviation


class SavedLatents:
    """What streaming needs of a folder of videos, from the run's own latents: the shape of a frame, and pixels both ways."""

    def __init__(self, path: Path, data: ClipsData) -> None:
        self.latents = PatchLatents.load(path)
        self.frame_shape = (self.latents.channels, data.height // data.patch, data.width // data.patch)
        self.encode, self.to_rgb = self.latents.encode, self.latents.decode


@torch.no_grad()
def generate(
    checkpoint: Path, out: Path, *, image: Path | None = None, index: int = 0, chunks: int = 12, seed: int = 0, fps: float = 8.0
) -> Path:
    """Stream ``chunks`` chunks after a first frame and write ``out``; prints the rate. Returns ``out``.

    Raises ValueError for a checkpoint without a generator, an unknown suffix, or a count below 1.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {out}")
    if image is not None and not image.is_file():
        raise ValueError(f"image must be a file, got {image}")
    path = find_weights(checkpoint)
    weights, facts = load_weights(path)
    if "recipe" not in facts or facts.get("stage") == "pretrain":
        raise ValueError(f"{checkpoint} holds no causal generator of a run")
    run = Run.alone(Recipe.model_validate(facts["recipe"]), path.parent.parent)
    if isinstance(run.recipe.data, ClipsData) and image is not None:  # the videos themselves are not needed
        run.videos = SavedLatents(run.folder.path / "world" / "latents.safetensors", run.recipe.data)
    network: Any = run.plain_network().eval()
    network.net.load_state_dict(weights)
    first = run.first_frames(range(index, index + 1), "test") if image is None else first_frame_from(run, image)
    size, draws = max(run.recipe.chunks), Draws(seed, "generate")

    def noise(chunk: int, step: int) -> Tensor:
        return draws.normal(f"noise {chunk} {step}", [0], (size, *run.videos.frame_shape))

    steps = StepPlan(run.recipe.first_levels or run.recipe.levels, run.recipe.levels)
    made, began = [first[:, None]], time.monotonic()
    for count, chunk in enumerate(stream(network, first, run.window, repeat(size, chunks), noise, steps), start=1):
        made.append(chunk)
        rate = count * size / (time.monotonic() - began)
        print(f"\rchunk {count}/{chunks}, {rate:.1f} latent frames a second", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rgb = run.videos.to_rgb(torch.cat(made, dim=1))[0]
    return write_video(out, rgb, fps, scale=max(1, 256 // rgb.shape[-2]))
