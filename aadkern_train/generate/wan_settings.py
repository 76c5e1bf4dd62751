"""How a Wan model is streamed, whatever asks for it: chunks, window, noise levels, where it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aadkern.streaming.cache import PRECISIONS
from aadkern_train.diffusion.steps import SHIFT, are_falling, fewer, shifted, started
from aadkern_train.engine.processes import device_of
from aadkern_train.generate.prompts import changes
from aadkern_train.networks.rollout import TURNS
from aadkern_train.networks.wan_parts import PIXELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_STEPS = 100
DECODERS = ("full", "tiny")


@dataclass(frozen=True)
class WanSettings:
    """How to stream. Frames of ``chunk_frames``, ``window`` and ``sink`` are latent frames, of four video frames each; the defaults
    are what Self-Forcing's models were trained with, but for ``steps``.

    ``size`` is (rows, columns) of pixels. ``steps`` and ``first_steps`` (None: the same) are noise levels as ``noise_levels``
    makes them. ``rope`` None: the checkpoint's. ``device`` None: the GPU if there is one. ``dtype`` None: bf16 on a GPU, fp32 on a
    CPU. ``fp8`` quantises the large linear layers (docs/fp8.md), ``kv_cache`` "fp8" the keys and values in view, ``compile`` runs
    the blocks through torch.compile, and ``cuda_graphs`` (None: on a GPU) replays passes (docs/streaming.md). ``lora`` are files
    as ``lora_of`` takes them. ``then`` and ``turn`` are prompts that take over on the way (``prompts.changes``, ``TURNS``).
    ``decoder`` "tiny" decodes with the file ``tiny_decoder`` (None: the one beside the VAE, ``wan_decoder.TINY_FILES``) instead of
    the VAE. ``offload`` keeps the blocks' weights in the host's memory, for a GPU that they do not fit on.
    """

    chunks: int = 7
    chunk_frames: int = 3
    window: int = 21
    sink: int = 1
    steps: tuple[float, ...] = (1.0,)
    first_steps: tuple[float, ...] | None = None
    rope: str | None = None
    size: tuple[int, int] = (480, 832)
    fps: float = 16.0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    fp8: bool = False
    kv_cache: str = "full"
    compile: bool = False
    cuda_graphs: bool | None = None
    lora: Sequence[str] = ()
    then: Sequence[str] = ()
    turn: str = "kept"
    decoder: str = "full"
    tiny_decoder: Path | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        changes(self.then, self.chunks)
        for word in self.lora:
            lora_of(word)
        if self.turn not in TURNS:
            raise ValueError(f"turn must be one of {', '.join(TURNS)}, got {self.turn!r}")
        if self.kv_cache not in PRECISIONS:
            raise ValueError(f"kv_cache must be one of {', '.join(PRECISIONS)}, got {self.kv_cache!r}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        if self.decoder == "full" and self.tiny_decoder is not None:
            raise ValueError(f"tiny_decoder must be left out with the full decoder (say decoder tiny), got {self.tiny_decoder}")
        for name in ("cuda_graphs", "compile"):
            if self.offload and getattr(self, name):
                raise ValueError(f"{name} must be left out with offload: the weights are elsewhere in each pass")
        for name in ("chunks", "chunk_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sink < 0:
            raise ValueError(f"sink must be at least 0, got {self.sink}")
        least = self.sink + self.chunk_frames
        if self.window < least:
            raise ValueError(f"window must be at least {least}, to hold the sink and a chunk, got {self.window}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype to run with. Raises ValueError for a device that is not there."""
        device = device_of(self.device)
        if self.cuda_graphs and device.type != "cuda":
            raise ValueError(f"cuda_graphs must be left out on {device}: they need a GPU")
        if self.offload and device.type != "cuda":
            raise ValueError(f"offload must be left out on {device}: it spares a GPU's memory")
        return device, DTYPES[self.dtype or ("bf16" if device.type == "cuda" else "fp32")]

    def started(self, strength: float, shift: float = SHIFT) -> WanSettings:
        """With those of the noise levels that a video runs which is made from another one (``steps.started``)."""
        first = None if self.first_steps is None else started(self.first_steps, strength, shift)
        return replace(self, steps=started(self.steps, strength, shift), first_steps=first)


def lora_of(word: str) -> tuple[Path, float]:
    """A file and its weight out of "FILE" or "FILE:WEIGHT". Raises ValueError or FileNotFoundError, naming ``lora``."""
    file, _, weight = (word, "", "1") if Path(word).exists() else word.rpartition(":")
    if not Path(file or word).exists():
        raise FileNotFoundError(f"lora must be FILE or FILE:WEIGHT, found nothing at {file or word}")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"lora must be FILE or FILE:WEIGHT, a finite number, got {word!r}")
    return Path(file), number


def trained_settings(run_facts: Mapping[str, Any]) -> dict[str, Any]:
    """How the weights of a run stream, by their run.json: as they were trained. Nothing for other weights."""
    recipe = run_facts.get("recipe")
    if not recipe:
        return {}
    given_chunks = 1 if recipe["task"] == "i2v" else 0
    _, height, width = run_facts["frame"]
    return {
        "chunks": len(recipe["chunks"]) - given_chunks,
        "chunk_frames": max(recipe["chunks"]),
        "window": recipe["window"],
        "sink": recipe["sink"],
        "steps": tuple(recipe["levels"]),
        "first_steps": None if recipe["first_levels"] is None else tuple(recipe["first_levels"]),
        "size": (PIXELS * height, PIXELS * width),
    }


def trained_levels(recipe: Mapping[str, Any], name: str, count: int) -> tuple[float, ...]:
    """A count of the levels that a run was trained at, by its settings; ``name`` "first_steps": of the first chunk's own, where it
    has some. Raises ValueError, naming it, for more than there are."""
    own = recipe.get("first_levels") if name == "first_steps" else None
    return fewer(own or recipe["levels"], count, recipe.get("spacing", "prefix"), name)


def noise_levels(steps: str, shift: float = SHIFT) -> tuple[float, ...]:
    """Noise levels from a count ("4") or a falling list of timesteps ("1000,750,500,250"), both ``shifted``.

    A count means timesteps evenly spaced from 1000. "4" and shift 5 give Self-Forcing's levels 1, 0.9375, 0.8333, 0.625. Raises
    ValueError naming ``steps`` or ``shift``.
    """
    wanted = f'steps must be a count of 1 to {MAX_STEPS} or falling timesteps in (0, 1000], say "1000,750,500,250", got {steps!r}'
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be above 0 and finite, got {shift}")
    try:
        if "," not in steps:
            count = int(steps)
            times = [1 - i / count for i in range(count)] if 1 <= count <= MAX_STEPS else []
        else:
            times = [float(word) / 1000 for word in steps.split(",")]
    except ValueError:
        raise ValueError(wanted) from None
    if not are_falling(times):
        raise ValueError(wanted)
    return tuple(shifted(s, shift) for s in times)
