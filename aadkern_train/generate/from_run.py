"""Streaming a video from a run's generator, chunk after chunk, into a file that grows. Wan: ``from_wan``."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.steps import STRENGTH, StepPlan, started
from aadkern_train.engine.processes import start
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.video import SUFFIXES, GrowingVideo, check_place, frame_rate, write_video
from aadkern_train.generate.pictures import SourceVideo, in_chunks, tell_cropping
from aadkern_train.generate.prompts import changes
from aadkern_train.generate.ranks import sequence_of
from aadkern_train.generate.streams import stream_chunks
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.folders import facts, load
from aadkern_train.networks.rollout import TURNS, streaming
from aadkern_train.recipes import read_recipe, recipe_of
from aadkern_train.worlds.base import Filmed, World

CHUNKS = 12
LONGEST_GIF = 4000  # frames: a gif is written at the end, from frames held in memory


def find_weights(checkpoint: Path) -> Path:
    """The folder of a causal generator: a stage's weights themselves, or those of a run's last stage that streams.

    Raises ValueError where there is none.
    """
    if (checkpoint / "config.yaml").is_file():
        for stage in reversed(read_recipe(checkpoint / "config.yaml").stages):
            weights = checkpoint / "weights" / stage
            if facts(weights).get("streams"):
                return weights
    elif "recipe" in facts(checkpoint):
        if facts(checkpoint).get("streams"):
            return checkpoint
        raise ValueError(f"checkpoint must be a causal generator's weights; {checkpoint} is no network that streams")
    own = "a run with a finished causal stage, or the weights' folder of one (RUN/weights/STAGE)"
    raise ValueError(f"checkpoint must be a Wan folder, a .pt file or a .safetensors, {own}; {checkpoint} is none")


def trained_weights(checkpoint: Path) -> Path:
    """The weights of a run's last stage that streams, where ``checkpoint`` is a run's folder; else ``checkpoint`` itself."""
    return find_weights(checkpoint) if (checkpoint / "config.yaml").is_file() else checkpoint


@torch.no_grad()
def generate(
    checkpoint: Path,
    out: Path,
    *,
    prompt: str | None = None,
    then: Sequence[str] = (),
    turn: str = "kept",
    image: Path | None = None,
    video: Path | None = None,
    strength: float = STRENGTH,
    index: int = 0,
    chunks: int | None = None,
    seed: int = 0,
    fps: float = 8.0,
    steps: int | None = None,
    first_steps: int | None = None,
) -> Path:
    """Stream ``chunks`` chunks (None: 12, or what ``video`` has) into ``out``, an mp4 that plays while it grows, or a gif; tells
    the rate. Returns ``out``.

    ``image`` is the first frame's file; without one, image to video starts from the ``index``-th held-out first frame (of those
    that show what ``prompt`` asks for). ``video``, a file, is what the video is made from, in image to video after its own first
    frame: noised to the level ``strength`` (``steps.started``), and as long at most. ``prompt`` None is that frame's own caption.
    ``then`` and ``turn``: prompts that take over on the way (``prompts.changes``, ``TURNS``). ``steps`` and ``first_steps`` are
    passes a chunk, and those of the first chunk (``Recipe.steps_of``); None: as it was trained. On Ctrl-C, or an error, what is
    made so far stays as a whole file. Under torchrun all processes share each frame's tokens (docs/scale.md), and the main one
    writes.

    Raises ValueError, before anything is made, for a checkpoint without a generator, an unknown suffix, a count below 1, and for
    prompts that the run's world cannot read.
    """
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if index < 0:
        raise ValueError(f"index must be at least 0, got {index}")
    if turn not in TURNS:
        raise ValueError(f"turn must be one of {', '.join(TURNS)}, got {turn!r}")
    if out.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out must end in {' or '.join(SUFFIXES)}, got {out}")
    check_place(out)
    if image is not None and not image.is_file():
        raise ValueError(f"image must be a file, got {image}")
    if image is not None and video is not None:
        raise ValueError("image must be left out with a video, whose own frames this one is made from")
    frame_rate(fps)
    weights = find_weights(checkpoint)
    recipe = recipe_of(json.dumps(facts(weights)["recipe"]), weights / "run.json")
    size, plan = max(recipe.chunks), recipe.steps_of(len(recipe.levels) if steps is None else steps, first_steps)
    source = None if video is None else SourceVideo.open(video, fps)
    if source is not None:
        there = (source.count - recipe.given_frames) // size
        if there < 1:
            raise ValueError(f"video must have at least {recipe.given_frames + size} frames for this run, got {source.count}")
        chunks, fps = min(chunks or there, there), source.fps
        plan = replace(plan, first=started(plan.first, strength), rest=started(plan.rest, strength))
    chunks = chunks or CHUNKS
    if out.suffix.lower() == ".gif" and chunks * size > LONGEST_GIF:
        raise ValueError(f"out must be an mp4 for more than {LONGEST_GIF} frames, got {out.name} for {chunks * size}")
    folder = weights.parent.parent / "world"
    world = recipe.data.open(frames=recipe.frames, seed=recipe.seed, folder=folder, clips=image is None and video is None)
    film = None if source is None else filmed(world, source)
    condition = (
        condition_for(world, recipe, prompt, image, index) if film is None else filmed_condition(world, recipe, prompt, film)
    )
    later = {chunk: world.embed([words]) for chunk, words in changes(then, chunks).items()}
    network: Any = load(weights).eval().requires_grad_(False)
    with start("cpu") as processes, sequence_of(processes, network.tokens_per_frame(*world.frame_shape[-2:])) as group:
        network.net.sequence = group
        frames = made(recipe, world, network, condition, later, turn, chunks, seed, plan, film)
        if processes.is_main:
            write(out, fps, world, frames)
        else:
            deque(frames, maxlen=0)
    return out


def condition_for(world: World, recipe: Recipe, prompt: str | None, image: Path | None, index: int) -> Condition:
    """What the video is made under."""
    check_words(world, prompt)
    if recipe.given_frames == 0 and image is not None:
        raise ValueError(f"image must be left out: this run was trained on text to video, got {image}")
    if image is None:
        held_out = world.held_out(index, prompt)
        return held_out if recipe.given_frames else Condition(None, held_out.text)
    text = text_for(world, prompt, "an image")
    return Condition(world.picture(image), text)


def check_words(world: World, prompt: str | None) -> None:
    """Raises ValueError for a prompt in a world without words."""
    if prompt is not None and world.null is None:
        raise ValueError(f"prompt must be left out: this run's clips have no captions, got {prompt!r}")


def text_for(world: World, prompt: str | None, given: str) -> Tensor | None:
    """The prompt's text, which must be there in a world with words where no held-out clip brings its own caption."""
    check_words(world, prompt)
    if prompt is None and world.null is not None:
        raise ValueError(f"prompt must be given with {given}: this run's generator was trained on captions")
    return None if prompt is None else world.embed([prompt])


def filmed(world: World, source: SourceVideo) -> Iterator[np.ndarray]:
    """The video's frames in the size of the world's. Raises ValueError for a world that takes none."""
    if not isinstance(world, Filmed):
        raise ValueError(f"video must be left out: this run's latents are not made of pictures here, got {source.path}")
    rows, columns = np.asarray(world.to_rgb(torch.zeros(1, 1, *world.frame_shape))).shape[2:4]
    tell_cropping("video", source.sides, (rows, columns))
    return source.frames((rows, columns))


def filmed_condition(world: Any, recipe: Recipe, prompt: str | None, film: Iterator[np.ndarray]) -> Condition:
    """What the video is made under that is made from ``film``, whose first frame is taken in image to video."""
    text = text_for(world, prompt, "a video")
    return Condition(world.film(next(film)[None]) if recipe.given_frames else None, text)


def chunk_noise(seed: int, size: int, frame_shape: tuple[int, int, int]) -> Callable[[int, int], Tensor]:
    """The noise of a stream's chunks of ``size`` frames, as ``StreamingGenerator`` takes it."""
    draws = Draws(seed, "generate")

    def noise(number: int, step: int) -> Tensor:
        return draws.normal(f"noise {number} {step}", [0], (size, *frame_shape)).transpose(1, 2)

    return noise


def made(
    recipe: Recipe,
    world: Any,
    network: Any,
    condition: Condition,
    later: dict[int, Tensor],
    turn: str,
    chunks: int,
    seed: int,
    steps: StepPlan | None = None,
    film: Iterator[np.ndarray] | None = None,
) -> Iterator[Tensor]:
    """The given frame, if any, and then each chunk as it is made, [1, f, C, H, W], from the frames of ``film`` where it is given.
    ``steps`` None: the recipe's."""
    size = max(recipe.chunks)
    noise = chunk_noise(seed, size, world.frame_shape)
    generator = streaming(network, 1, world.frame_shape, recipe.view, steps or recipe.steps, condition.text)
    first = None if condition.first is None else condition.first[:, :, None]
    if condition.first is not None:
        yield condition.first[:, None]
    source = None if film is None else (world.film(part).transpose(0, 1)[None] for part in in_chunks(film, size, size))
    began = time.monotonic()
    for count, chunk in enumerate(stream_chunks(generator, noise, chunks, first, later, turn, source), 1):
        rate = count * size / (time.monotonic() - began)
        print(f"\rchunk {count}/{chunks}, {rate:.1f} latent frames a second", end="", file=sys.stderr, flush=True)
        yield chunk.transpose(1, 2)
    print(file=sys.stderr)


def write(out: Path, fps: float, world: World, parts: Iterator[Tensor]) -> None:
    """Decodes each part as it comes and appends it to the file, enlarged where frames are small."""

    def pictures(x: Tensor) -> np.ndarray:
        rgb = np.asarray(world.to_rgb(x)[0])
        scale = max(1, 256 // rgb.shape[-2])
        return rgb.repeat(scale, axis=1).repeat(scale, axis=2)

    if out.suffix.lower() == ".mp4":
        video = GrowingVideo(out, fps)
        try:
            with video:
                for part in parts:
                    video.write(pictures(part))
        except BaseException:
            say(f"\nstopped; {video.holds()}")
            raise
        say(video.holds())
        return
    held: list[np.ndarray] = []
    try:
        for part in parts:
            held.append(pictures(part))
    finally:
        if held:
            write_video(out, np.concatenate(held), fps)
            say(f"{out} holds {sum(map(len, held))} frames")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
