"""Videos at fixed prompts, streamed by a stage as it would be used: under the same noise at every step and stage, so that they can
be set side by side. RUN/samples/<stage>/step-000050/003-a-cat-runs-s0.mp4
"""

from __future__ import annotations

import re
from typing import Any

import torch

from aadkern_train.engine.video import write_video
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.rollout import stream
from aadkern_train.prepared.format import Item, Prepared, opened, padded
from aadkern_train.prepared.layout import check_made_with
from aadkern_train.run import Run

SLUG = 40  # letters of a prompt in a file's name


def prompts(run: Run) -> tuple[Prepared, tuple[Item, ...]]:
    """The prepared prompts of ``validate.path``. Raises ValueError where they do not fit the run."""
    settings, world = run.recipe.validation, run.world
    if world.null is None or world.fingerprint is None:
        raise ValueError("validation.path must be left out: prompts are for runs on prepared data")
    prepared = opened("validation.path", settings.path)
    if prepared.kind == "pairs" or not prepared.items:
        raise ValueError(
            f"validation.path must be a folder of `aad prepare` with prompts, or images with prompts, got {prepared.kind}"
        )
    check_made_with(getattr(world, "made_with", {}), prepared.header, "validation.path", "data.path")
    width = prepared.text(prepared.items[0]).shape[-1]
    if width != world.null.shape[-1]:
        raise ValueError(f"validation.path must have texts of width {world.null.shape[-1]}, the run's, it has {width}")
    if run.recipe.given_frames:
        first = None if prepared.kind == "prompts" else tuple(prepared.latents(prepared.items[0], 1).shape[1:])
        if first != tuple(world.frame_shape):
            got = "prompts without images" if first is None else f"latents {first}"
            raise ValueError(f"validation.path must have first frames of {tuple(world.frame_shape)} for i2v, it has {got}")
    return prepared, prepared.items


@torch.no_grad()
def validate(run: Run, stage: str, network: Any, step: int) -> None:
    """Streams every prompt with every seed and writes the videos; the ranks share the prompts, all with equal numbers of passes."""
    settings, recipe, processes = run.recipe.validation, run.recipe, run.processes
    prepared, items = prompts(run)
    wanted = [(i, seed) for seed in range(settings.seeds) for i in range(len(items))]
    rounds = -(-len(wanted) // processes.data_size)
    sizes = recipe.generated_chunks if settings.chunks is None else (max(recipe.chunks),) * settings.chunks
    folder = run.folder.samples / stage / f"step-{step:06d}"
    network.eval()
    for k in range(rounds):
        place = k * processes.data_size + processes.data_rank
        i, seed = wanted[min(place, len(wanted) - 1)]  # a rank without a prompt goes along with the last one
        item, draws = items[i], run.draws("validate", seed)
        text = run.read(lambda item=item: padded(prepared.text(item))[None].float())
        first = run.read(lambda item=item: prepared.latents(item, 1)[0][None].float()) if recipe.given_frames else None
        condition = Condition(first, text).to(processes.device)

        def noise(number: int, k: int, i: int = i, draws: Any = draws) -> torch.Tensor:
            shape = (sizes[number - 1], *run.world.frame_shape)
            return draws.normal(f"noise {number} {k}", [i], shape, device=processes.device)

        first_frame = [] if condition.first is None else [condition.first[:, None]]
        chunks = stream(network, condition, run.world.frame_shape, run.window, sizes, noise, recipe.steps)
        x = torch.cat([*first_frame, *chunks], dim=1)
        if place < len(wanted) and processes.speaks:
            write_video(folder / f"{i:03d}-{slug(item.caption)}-s{seed}.mp4", run.world.to_rgb(x)[0], run.world.fps)
    network.train()


def slug(caption: str) -> str:
    """A caption as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:SLUG].rstrip("-") or "empty"
