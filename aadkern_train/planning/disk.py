"""What a recipe's data, pairs and checkpoints take on a disk, by arithmetic, and the teacher's time for the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aadkern_train.engine.recipe import Recipe
from aadkern_train.planning.formulas import Clip
from aadkern_train.planning.layouts import Planned
from aadkern_train.planning.machines import Machine
from aadkern_train.planning.networks import Net, nets
from aadkern_train.prepared.pairs import PairSettings

TOKENS = 120  # of a caption, as `aad prepare` estimates
SHOWN = 1000  # clips that the table tells


@dataclass(frozen=True)
class Disk:
    """Bytes on disk by what lies there, GPU hours of the pairs, and the most clips that a stage can draw."""

    bytes: dict[str, float]
    pair_hours: float
    drawn: int


def clip_bytes(clip: Clip) -> float:
    """Of a clip's latents in fp16, as they are prepared."""
    return clip.bytes / 2


def text_bytes(clip: Clip) -> float:
    """Of a caption in bf16, without padding."""
    return 0.0 if clip.sizes.text is None else 2.0 * min(TOKENS, clip.sizes.text[0]) * clip.sizes.text[1]


def disk(recipe: Recipe, stages: Sequence[Planned], clip: Clip, machine: Machine, roles: dict[str, str]) -> Disk:
    """Of these stages of a recipe."""
    item = clip_bytes(clip) + text_bytes(clip)
    byte_counts = {f"{SHOWN} prepared clips": SHOWN * item}
    hours = 0.0
    for one in stages:
        pairs = one.work.pairs
        if pairs is None:
            continue
        count = PairSettings().count if pairs.count is None else pairs.count
        byte_counts[f"{one.name}: {count} pairs"] = count * (pairs.levels * clip_bytes(clip) + text_bytes(clip))
        teacher = nets(recipe.models.distilled, recipe, clip.sizes, roles).get("teacher")
        hours += 0.0 if teacher is None else count * pairs.steps * pairs.rows * _forward(teacher, clip, machine) / 3600
    states = {one.name: sum(sum(net.state(1).values()) for net in one.nets.values() if net.member.learns) for one in stages}
    byte_counts[f"checkpoints, {recipe.keep_checkpoints} kept and one that is written"] = (recipe.keep_checkpoints + 1) * max(
        states.values(), default=0.0
    )
    byte_counts["finished weights"] = sum(4.0 * one.nets["generator"].parameters for one in stages)
    return Disk(byte_counts, hours, max((one.settings.steps * one.settings.batch for one in stages), default=0))


def _forward(net: Net, clip: Clip, machine: Machine) -> float:
    """Seconds of one pass over a whole clip."""
    linear = net.shape.linear(clip.layout.tokens) + net.shape.words() + net.shape.levels(clip.layout.frames)
    attention = net.shape.attention(clip.plans["bidirectional"].area)
    return (linear / machine.linear + attention / machine.attention) / 1e12
