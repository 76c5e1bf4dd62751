"""What the stages of one run share: settings, processes, the world's clips and conditions, layout, random numbers, networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from aadkern.plans import VideoLayout, Window
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.figures import Counted
from aadkern_train.engine.files import read_json, replace_file
from aadkern_train.engine.processes import Processes
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.networks import Networks
from aadkern_train.networks.teacher import Teacher
from aadkern_train.worlds.base import World

T = TypeVar("T")


@dataclass
class Run:
    """One run: a recipe on these processes, in this folder."""

    recipe: Recipe
    processes: Processes
    folder: RunFolder
    taken: dict[str, None] = field(default_factory=dict)
    """What this process has read of the data since the trainer last emptied it, in order: "train clip-17", "pair 000012"."""
    counts: Callable[[Run, str], Counted | None] = lambda run, name: None
    """What a step of a stage takes, for the log; by those who can count it."""

    @classmethod
    def alone(cls, recipe: Recipe, folder: Path) -> Run:
        """A run to use, not to train: one process without a process group, on the CPU."""
        return cls(recipe, Processes(0, 1, torch.device("cpu"), None, False), RunFolder(folder, active=False))  # type: ignore[arg-type]

    @cached_property
    def world(self) -> World:
        """The law that gives clips and conditions."""

        def opened() -> World:
            recipe = self.recipe
            world = recipe.data.open(frames=recipe.frames, seed=recipe.seed, folder=self.folder.path / "world")
            recipe.data.fits(world, recipe)
            return world

        if self.processes.size > 1:  # what a world must make, the main process makes; the others then read that
            self.processes.on_main(lambda: opened() and None)
        world = self.processes.agreed(opened)
        if world.fingerprint is not None:
            self.pin("data", world.fingerprint)
        return world

    def pin(self, name: str, fingerprint: str) -> None:
        """Keeps in RUN/data.json what data the run reads, by ``name``. Raises ValueError where it began with others."""
        file = self.folder.path / "data.json"

        def keep() -> None:
            known = read_json(file) if file.exists() else {}
            if known.get(name, fingerprint) != fingerprint:
                had = f"fingerprint {known[name]} in {file}, now {fingerprint}"
                raise ValueError(f"{name} must be what the run began with, it has changed since ({had})")
            if name not in known:
                replace_file(file, json.dumps({**known, name: fingerprint}, indent=1) + "\n")

        if self.processes.mesh is not None:  # a run that is only used leaves nothing behind
            self.processes.on_main(keep)

    @cached_property
    def networks(self) -> Networks:
        """The makers of networks."""
        return Networks(self.recipe, self.processes, self.folder, self.world.frame_shape, self.world.null)

    def teacher(self, guidance: float = 1.0) -> Teacher:
        """Whom stages I and II distil, under a guidance scale."""
        models, null = self.recipe.models, self.world.null
        if models.teacher == "exact":
            exact = self.world.teacher.to(self.processes.device)  # type: ignore[attr-defined]
            return Teacher(exact, guidance, null)
        return self.networks.teacher(models.teacher, guidance, self.layout)

    @property
    def window(self) -> Window:
        """What a chunk sees."""
        return self.recipe.view

    @cached_property
    def layout(self) -> VideoLayout:
        """The training clip's layout."""
        _, height, width = self.world.frame_shape
        patch = self.recipe.network.patch
        return VideoLayout(self.recipe.chunks, (height // patch) * (width // patch))

    @property
    def clean_frames(self) -> int:
        """Frames of a noisy clip that the teacher sees clean: the given ones, unless it was trained to see them noised."""
        return self.recipe.given_frames if self.recipe.models.given == "clean" else 0

    @property
    def frames_that_count(self) -> Tensor:
        """[1, F]: 1 for the frames that a loss counts, 0 for the given ones."""
        counts = torch.ones(1, self.recipe.frames, device=self.processes.device)
        counts[:, : self.recipe.given_frames] = 0
        return counts

    def draws(self, stage: str, step: int) -> Draws:
        """The random numbers of one step."""
        return Draws(self.recipe.seed, stage, step)

    def batch(self, step: int, size: int) -> range:
        """The indices of this process's clips in a step's global batch."""
        return self.processes.local_slice(range(step * size, (step + 1) * size))

    def read(self, action: Callable[[], T]) -> T:
        """What ``action`` reads of the world. Where one rank cannot, every rank raises at once, and none waits for it."""

        def reading() -> T:
            return self.processes.during("reading its data", action)

        return self.processes.agreed(reading) if self.world.fingerprint is not None else reading()

    def take(self, samples: range, split: str) -> None:
        """Notes samples in ``taken``: by their items' names where the world's items have names, else by their numbers."""
        names = getattr(self.world, "names", None)
        self.taken |= dict.fromkeys(f"{split} {name}" for name in (names(samples, split) if names else samples))

    def clips(self, samples: range, split: str = "train") -> Tensor:
        """Clips [B, F, C, H, W] of training length on this process's device."""
        self.take(samples, split)
        return self.read(lambda: self.world.clips(samples, self.recipe.frames, split)).to(self.processes.device)

    def condition(self, samples: range, split: str = "train") -> Condition:
        """What these clips are made under, on this process's device: in text to video the text alone."""
        self.take(samples, split)
        condition = self.read(lambda: self.world.condition(samples, split)).to(self.processes.device)
        return condition if self.recipe.given_frames else Condition(None, condition.text)
