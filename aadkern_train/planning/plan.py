"""A recipe's plan: the layout searched, memory and time of each stage, disk, and what was assumed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from aadkern.plans import VideoLayout
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.work import Sizes
from aadkern_train.planning.disk import disk
from aadkern_train.planning.formulas import RESERVE, Clip
from aadkern_train.planning.layouts import Cluster, Planned, search
from aadkern_train.planning.machines import machine
from aadkern_train.planning.tables import traced_values, values, words

WAN = Sizes((16, 60, 104), (512, 4096))  # 480 x 832 pixels through Wan's VAE, and a padded text
VAE = 8  # rows of pixels in a row of latents
PIXELS = {"480p": (480, 832), "720p": (720, 1280)}
ROLES = ("generator", "teacher", "fake", "discriminator")
NUMBERS = ("gpus", "sequence", "replicate", "node")


def make_plan(recipe: Recipe, own: Mapping[str, str], fixed: Collection[str], trace: bool = False) -> dict[str, Any]:
    """The plan as plain values: of each stage, of disk, and of the stage that needs most memory again at the top.

    ``own``: the command's words; ``fixed``: keys of settings that are not to be searched. Raises ValueError, naming the word.
    """
    gpu, source = machine(own.get("gpu", "h100"))
    numbers = {name: _whole(name, own[name]) for name in NUMBERS if name in own}
    cluster = Cluster(gpu, **numbers, **({"network": _number("network", own["network"])} if "network" in own else {}))
    sizes, sized = _sizes(recipe, own.get("size"))
    patch, (_, height, width) = recipe.network.patch, sizes.frame
    layout = VideoLayout(recipe.chunks, (height // patch) * (width // patch))
    clip = Clip(layout, recipe.view, recipe.given_frames, recipe.steps, sizes)
    roles = {role: own[role] for role in ROLES if role in own}
    stages, left_out = _stages(recipe, own.get("stage"))
    planned = search(recipe, stages, clip, cluster, fixed, roles)
    stage_values = {one.name: values(one, clip, cluster) | {"words": words(one, recipe)} for one in planned}
    kept = disk(recipe, planned, clip, gpu, roles)
    assumptions = [f"GPU rates: {source}", *sized, *left_out, *_shapes(recipe, roles), *_always(planned, cluster)]
    if trace:
        from aadkern_train.planning.trace import trace as traced

        for one in planned:
            stage_values[one.name]["trace"] = traced_values(traced(one, recipe, clip))
    worst = max(planned, key=lambda one: one.bytes).name
    shape = f"sequence {planned[0].layout.sequence}, replicate {planned[0].layout.replicate}"
    return {
        "title": f"{recipe.recipe} on {cluster.gpus} x {gpu.name} ({shape}): clips {_clip(clip)}",
        "recipe": recipe.recipe,
        "gpu": gpu.name,
        "stage": worst,
        **stage_values[worst],
        "fits": all(one.fits for one in planned),
        "stages": stage_values,
        "hours": round(sum(one.total for one in planned) / 3600, 3),
        "disk": {
            "gigabytes": {what: round(count / 1e9, 3) for what, count in kept.bytes.items()},
            "pair_gpu_hours": round(kept.pair_hours, 1),
            "clips_drawn_at_most": kept.drawn,
        },
        "assumptions": assumptions,
    }


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number of at least 1, got {text!r}")
    return int(text)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} must be GB/s above 0, got {text!r}") from None


def _clip(clip: Clip) -> str:
    chunks = ",".join(map(str, clip.layout.chunks))
    return f"of chunks {chunks}, {clip.layout.tokens} tokens"


def _stages(recipe: Recipe, wanted: str | None) -> tuple[list[str], list[str]]:
    """The stages that are planned, and what is to be said of others."""
    there = [name for name, stage in recipe.stages.items() if stage.steps]
    if wanted is not None and wanted not in there:
        raise ValueError(f"stage must be one of {', '.join(there)}, got {wanted!r}")
    names = there if wanted is None else [wanted]
    silent = [name for name in names if recipe.stages[name].work(recipe) is None]
    names = [name for name in names if name not in silent]
    if not names:
        raise ValueError(f"stage must tell its work (Settings.work) to be planned, {', '.join(silent)} does not")
    return names, [f"left out, as it does not tell its work (Settings.work): {', '.join(silent)}"] if silent else []


def _sizes(recipe: Recipe, size: str | None) -> tuple[Sizes, list[str]]:
    """Shapes of frames and texts, and what was assumed of them."""
    own = recipe.data.sizes(recipe)
    if size is None:
        return (own, []) if own is not None else (WAN, ["frames of 480 x 832 pixels, as data.frame names no others"])
    sides = PIXELS.get(size.lower()) or tuple(int(side) for side in size.lower().split("x") if side.isdecimal())
    side = VAE * recipe.network.patch
    if len(sides) != 2 or any(length < side or length % side for length in sides):
        raise ValueError(f"size must be {', '.join(PIXELS)}, or rows x columns of pixels, multiples of {side}, got {size!r}")
    if own is not None and own.frame[0] != WAN.frame[0]:
        raise ValueError(f"size must be left out for latents of other than Wan's VAE, as {recipe.recipe}'s are, got {size!r}")
    rows, columns = (length // VAE for length in sides)
    return Sizes((WAN.frame[0], rows, columns), WAN.text), []


def _shapes(recipe: Recipe, roles: Mapping[str, str]) -> list[str]:
    network, named = recipe.network, [f"{role} {model}" for role, model in roles.items()]
    shape = f"{network.layers} blocks of {network.heads} x {network.head_dim}, ffn {network.ffn}"
    if recipe.models.generator == "":
        named.append(f"every network whose folder is not named: {shape}, as the recipe states")
    return ["shapes: " + "; ".join(named)] if named else []


def _always(planned: list[Planned], cluster: Cluster) -> list[str]:
    first = planned[0].layout
    lines = [
        f"{100 * RESERVE:.0f} % of the GPU's memory is left free for the allocator, CUDA and NCCL; no stage was run to check this",
        "activations by multiples fitted to a trace with plain operators; fused ones keep less; bf16 compute, fp32 states",
        "seconds are FLOPs and bytes by rates: no launches, no reading of data, no evaluation, no checkpoints",
    ]
    if cluster.gpus > 1:
        between = f"{cluster.network:g} GB/s a GPU between nodes" if cluster.gpus > cluster.node else "one node"
        rates = f"{cluster.machine.link:g} GB/s within a node of {cluster.node}, {between}"
        lines.append(f"network: {rates}; exchanges are not hidden, gathers are behind their own pass's computing")
    if first.sequence > 1:
        lines.append("attention is shared evenly by heads and frames (within 5 % of the mean where heads do not divide)")
    return lines
