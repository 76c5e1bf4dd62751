"""Which layouts of GPUs a recipe can run on, and of these the fastest that fits."""

from __future__ import annotations

import itertools
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from aadkern_train.engine.recipe import Recipe, StageSettings
from aadkern_train.engine.work import Work
from aadkern_train.planning.formulas import Clip, Layout, Parts, fits, flops, memory, peak, seconds
from aadkern_train.planning.machines import Machine
from aadkern_train.planning.networks import Net, nets

SAVERS = ("views", "checkpointing")
"""Settings of a stage that change its memory and not its result; each value that their types name is tried."""


@dataclass(frozen=True)
class Cluster:
    """The GPUs that are asked for. ``sequence`` and ``replicate`` None: whatever is best. ``node``: GPUs that NVLink joins;
    ``network``: GB/s of each to other nodes.

    Raises ValueError for numbers that do not divide each other.
    """

    machine: Machine
    gpus: int = 1
    sequence: int | None = None
    replicate: int | None = None
    node: int = 8
    network: float = 50.0

    def __post_init__(self) -> None:
        for name in ("gpus", "sequence", "replicate", "node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.network <= 0:
            raise ValueError(f"network must be GB/s above 0, got {self.network:g}")
        if self.gpus > self.node and self.gpus % self.node:
            raise ValueError(f"gpus must be whole nodes of {self.node} (node=N says how many a node has), got {self.gpus}")
        if self.sequence is not None and self.gpus % self.sequence:
            raise ValueError(f"sequence must divide gpus {self.gpus}, got {self.sequence}")
        groups = self.gpus // (self.sequence or 1)
        if self.replicate is not None and groups % self.replicate:
            raise ValueError(f"replicate must divide the {groups} groups of GPUs that have a clip each, got {self.replicate}")

    def meshes(self) -> Iterator[tuple[int, int]]:
        """(sequence, replicate) that can be: a sequence stays inside of a node, unless it is asked for."""
        inside = [p for p in range(1, self.node + 1) if self.gpus % p == 0 and (self.gpus <= self.node or self.node % p == 0)]
        for sequence in [self.sequence] if self.sequence else inside:
            groups = self.gpus // sequence
            every = [r for r in range(1, groups + 1) if groups % r == 0]
            for replicated in [self.replicate] if self.replicate else every:
                if groups % replicated == 0:
                    yield sequence, replicated


@dataclass(frozen=True)
class Planned:
    """A stage under a layout: its settings, the bytes of its fullest pass and the seconds of its passes by part."""

    name: str
    settings: StageSettings
    work: Work
    nets: Mapping[str, Net]
    layout: Layout
    fullest: str
    memory: Parts
    passes: Mapping[str, Parts]
    first: float
    fits: bool

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(sum(parts.values()) for parts in self.passes.values())

    @property
    def total(self) -> float:
        """Seconds of the stage: all its steps, and those before the first."""
        return self.settings.steps * self.step + self.first

    @property
    def bytes(self) -> float:
        """On a GPU at the stage's peak."""
        return sum(self.memory.values())

    def petaflops(self, clip: Clip) -> dict[str, float]:
        """Of each pass for one clip, in a step."""
        return {
            one.name: one.times * sum(flops(one, self.nets[one.role], clip, self.layout.checkpointing).values()) / 1e15
            for one in self.work.passes
        }


def planned(
    name: str, settings: StageSettings, recipe: Recipe, clip: Clip, layout: Layout, machine: Machine, roles: Mapping[str, str]
) -> Planned:
    """A stage under a layout, counted."""
    work = settings.work(recipe)
    assert work is not None
    members = nets(work.members, recipe, clip.sizes, roles)
    fullest, parts = peak(memory(work, members, clip, layout))
    first = 0.0
    if work.first_steps:
        each = seconds(work.first, members, clip, layout, machine)
        first = work.first_steps * sum(sum(part.values()) for part in each.values())
    passes = seconds(work.passes, members, clip, layout, machine)
    return Planned(name, settings, work, members, layout, fullest, parts, passes, first, fits(parts, machine))


def variants(name: str, recipe: Recipe, share: int, fixed: Collection[str]) -> Iterator[StageSettings]:
    """The stage's settings with every value of what saves memory, but for those that are ``fixed``."""
    settings = recipe.stages[name]
    tried: dict[str, list[Any]] = {"accumulate": [n for n in range(1, share + 1) if share % n == 0]}
    for saver in SAVERS:
        if saver in type(settings).model_fields:
            tried[saver] = list(typing.get_args(type(settings).model_fields[saver].annotation))
    for key in tried:
        if name in fixed or f"{name}.{key}" in fixed:
            tried[key] = [getattr(settings, key)]
    for values in itertools.product(*tried.values()):
        changed = settings.model_copy(update=dict(zip(tried, values, strict=True)))
        try:
            changed.check(name, recipe)
        except ValueError:
            continue
        yield changed


def best_of_stage(
    name: str, recipe: Recipe, clip: Clip, base: Layout, cluster: Cluster, fixed: Collection[str], roles: Mapping[str, str]
) -> Planned | str:
    """The fastest way for a stage to fit in, or where none does, the smallest; or why the stage cannot run there at all."""
    settings = recipe.stages[name]
    groups = base.gpus // base.sequence
    share, rest = divmod(settings.batch, groups)
    if rest or not share:
        each = f"{groups} groups of {base.sequence}" if base.sequence > 1 else f"{groups}"
        return f"gpus must share {name}.batch {settings.batch} equally, got {base.gpus}: {each} to give a clip each"
    candidates: list[Planned] = []
    for changed in variants(name, recipe, share, fixed):
        if share % changed.accumulate:
            continue
        layout = replace(
            base, clips=share // changed.accumulate, accumulate=changed.accumulate, checkpointing=changed.checkpointing
        )
        candidates.append(planned(name, changed, recipe, clip, layout, cluster.machine, roles))
    if not candidates:
        return f"{name}.accumulate must divide the {share} clips that each group of GPUs has, got {settings.accumulate}"
    return min(candidates, key=lambda one: (not one.fits, _about(one.total) if one.fits else 0, one.bytes))


def search(
    recipe: Recipe, stages: Collection[str], clip: Clip, cluster: Cluster, fixed: Collection[str], roles: Mapping[str, str]
) -> list[Planned]:
    """The stages under the layout that takes the least time in all, where each fits; where none does, under the smallest.

    Raises ValueError where no layout can be.
    """
    n = clip.layout.tokens_per_frame
    if cluster.sequence is not None and cluster.sequence > n:
        raise ValueError(f"sequence must be at most {n}, the tokens of a frame, got {cluster.sequence}")
    gathered = [recipe.models.keep_gathered] if "models.keep_gathered" in fixed else [False, True]
    reasons: list[str] = []
    candidates: list[list[Planned]] = []
    for sequence, replicated in cluster.meshes():
        if sequence > n:
            continue
        for kept in gathered:
            base = Layout(cluster.gpus, replicated, sequence, keep_gathered=kept, node=cluster.node, network=cluster.network)
            chosen = [best_of_stage(name, recipe, clip, base, cluster, fixed, roles) for name in stages]
            reasons += [one for one in chosen if isinstance(one, str)]
            whole = [one for one in chosen if isinstance(one, Planned)]
            candidates += [whole] if len(whole) == len(stages) else []
    if not candidates:
        raise ValueError(reasons[0])
    return min(candidates, key=_cost)


def _cost(whole: list[Planned]) -> tuple[bool, int, float]:
    """All fit before some do not; of those that fit the fastest, to a percent; then the least memory."""
    all_fit = all(one.fits for one in whole)
    return not all_fit, _about(sum(one.total for one in whole)) if all_fit else 0, max(one.bytes for one in whole)


def _about(seconds: float) -> int:
    """Equal for times within a percent or so, which no formula here tells apart."""
    return round(100 * math.log(max(seconds, 1e-12)))
