"""What is served: a model loaded once, and its players, a stream each. Here the protocols, and a run's; Wan's: ``wan``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from aadkern import StreamingCache, runtime
from aadkern_train.engine.recipe import Recipe
from aadkern_train.generate.from_run import chunk_noise, condition_for, find_weights
from aadkern_train.networks.folders import facts, load
from aadkern_train.networks.rollout import streaming, turn_to
from aadkern_train.recipes import recipe_of
from aadkern_train.serve.protocol import RingPlace
from aadkern_train.worlds.base import Steered, World

FPS = 10.0  # of a run's stream: its own pace is for files, and slower than a hand


@dataclass(frozen=True)
class About:
    """What a page must know of a model. ``chunk`` frames of pixels come at a time; ``directions``: it can be told where to move;
    ``prompts``: by words; ``pictures``: it can start from one."""

    name: str
    backend: str
    height: int
    width: int
    chunk: int
    fps: float
    directions: bool
    prompts: bool
    pictures: bool


class Player(Protocol):
    """One stream. All of it is called from one thread."""

    prompt: str

    def begin(self, seed: int, prompt: str | None, picture: Any) -> None:
        """Start anew. The same arguments, and the same turns before the same chunks, give the same pixels."""
        ...

    def turn(self, prompt: str) -> None:
        """The next chunk follows another prompt."""
        ...

    def next(self) -> np.ndarray:
        """The next chunk's frames, uint8 [f, H, W, 3]; the first one's begin with the given frame, if any."""
        ...

    @property
    def place(self) -> RingPlace:
        """Where the newest chunk lies."""
        ...


class Model(Protocol):
    """Weights shared by all players. ``check``, ``toward`` and ``picture`` may be called from any thread."""

    about: About

    def check(self, prompt: str | None) -> None:
        """Raises ValueError for a prompt that cannot be shown."""
        ...

    def toward(self, prompt: str, x: int, y: int) -> str:
        """The prompt that moves by x columns and y rows, each -1, 0 or 1, and is ``prompt`` else."""
        ...

    def picture(self, file: bytes) -> Any:
        """A picture's file as ``Player.begin`` takes it. Raises ValueError for what is none."""
        ...

    def player(self) -> Player:
        """Another stream, with a cache of its own."""
        ...


def backend_on(device: torch.device) -> str:
    """Which attention serves, in words."""
    return f"{runtime.choose_backend('auto', device.type)} on {device.type}"


def place_of(cache: StreamingCache) -> RingPlace:
    """Where the chunk lies that was made last: its clean pass, which would move the cache on, comes with the next one."""
    frame, sink = cache.frame, cache.window.sink
    slot = frame if frame < sink else sink + (frame - sink) % cache.ring
    return RingPlace(frame, slot, cache.capacity_frames, sink)


class RunModel:
    """The generator of a run, in its world. Raises ValueError as ``aad generate`` does."""

    def __init__(self, checkpoint: Path, turn: str | None = None, fps: float | None = None) -> None:
        weights = find_weights(checkpoint)
        self.recipe: Recipe = recipe_of(json.dumps(facts(weights)["recipe"]), weights / "run.json")
        folder = weights.parent.parent / "world"
        self.world: World = self.recipe.data.open(frames=self.recipe.frames, seed=self.recipe.seed, folder=folder)
        self.network: Any = load(weights).eval().requires_grad_(False)
        self.way = turn or "restarted"
        words = self.world.null is not None
        _, height, width = np.asarray(self.world.to_rgb(torch.zeros(1, 1, *self.world.frame_shape))).shape[1:4]
        self.about = About(
            name=f"{self.recipe.recipe}, {weights.name}",
            backend=backend_on(torch.device("cpu")),
            height=height,
            width=width,
            chunk=max(self.recipe.chunks),
            fps=fps or FPS,
            directions=words and isinstance(self.world, Steered),
            prompts=words,
            pictures=False,
        )

    def check(self, prompt: str | None) -> None:
        if prompt is None:
            return
        if not self.about.prompts:
            raise ValueError(f"prompt must be left out: this run's clips have no captions, got {prompt!r}")
        condition_for(self.world, self.recipe, prompt, None, 0)

    def toward(self, prompt: str, x: int, y: int) -> str:
        if not isinstance(self.world, Steered):
            raise ValueError("direction must be left out: this model's words know none")
        return self.world.toward(prompt, x, y)

    def picture(self, file: bytes) -> Any:
        raise ValueError("picture must be left out: this run's streams start from its own first frames")

    def player(self) -> Player:
        return RunPlayer(self)


class RunPlayer:
    """A stream of a run's generator."""

    def __init__(self, model: RunModel) -> None:
        recipe = model.recipe
        self.model, self.prompt = model, ""
        self._stream = streaming(model.network, 1, model.world.frame_shape, recipe.view, recipe.steps)
        self._first: Tensor | None = None

    def begin(self, seed: int, prompt: str | None, picture: Any) -> None:
        world, recipe = self.model.world, self.model.recipe
        # Of the frames that fit a prompt there may be but one.
        condition = condition_for(world, recipe, prompt, None, seed if prompt is None else 0)
        captions = world.describe(condition)
        self.prompt = prompt if prompt is not None else captions[0] if captions else ""
        self._stream.reset()
        self._stream.set_text(condition.text)
        self._first = condition.first
        self._noise = chunk_noise(seed, max(recipe.chunks), world.frame_shape)

    def turn(self, prompt: str) -> None:
        turn_to(self._stream, self.model.world.embed([prompt]), self.model.way)
        self.prompt = prompt

    def next(self) -> np.ndarray:
        first, self._first = self._first, None
        first_frame = None if first is None else first[:, :, None]
        chunk = next(self._stream.chunks(self._noise, 1, first_frame=first_frame)).transpose(1, 2)
        shown = chunk if first is None else torch.cat((first[:, None], chunk), 1)
        return np.asarray(self.model.world.to_rgb(shown)[0])

    @property
    def place(self) -> RingPlace:
        return place_of(self._stream.cache)
