"""What a step of a training run takes, by the formulas of ``aad plan``, for the run's log."""

from __future__ import annotations

import torch

from aadkern_train.engine.figures import Counted
from aadkern_train.engine.work import Sizes
from aadkern_train.planning.formulas import Clip, Layout, flops, traffic
from aadkern_train.planning.machines import known
from aadkern_train.planning.networks import nets
from aadkern_train.run import Run


def counts(run: Run, name: str) -> Counted | None:
    """FLOPs and bytes of a mean step of stage ``name``; None where its work is not told, or a network is not there yet."""
    recipe, world, processes, settings = run.recipe, run.world, run.processes, run.recipe.stages[name]
    work = settings.work(recipe)
    if work is None or recipe.models.lora is not None:  # adapters are none of what the formulas know
        return None
    text = None if world.null is None else (world.null.shape[1], world.null.shape[2])
    clip = Clip(run.layout, recipe.view, recipe.given_frames, recipe.steps, Sizes(tuple(world.frame_shape), text))
    clips = settings.batch // (settings.accumulate * processes.data_size)
    layout = Layout(
        processes.size, recipe.parallel.replicate, processes.sequence_size, clips, settings.accumulate,
        recipe.models.keep_gathered, settings.checkpointing,
    )  # fmt: skip
    try:
        members = nets(work.members, recipe, clip.sizes, {})
    except (ValueError, OSError):
        return None
    total = sum(one.times * sum(flops(one, members[one.role], clip, "none").values()) for one in work.passes)
    gpu = known(torch.cuda.get_device_name(processes.device)) if processes.device.type == "cuda" else None
    width = 2 if processes.device.type == "cuda" else 4
    return Counted(
        total * settings.batch, traffic(work.passes, members, clip, layout, width), None if gpu is None else gpu.peak * 1e12
    )
