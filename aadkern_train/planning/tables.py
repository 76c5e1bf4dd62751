"""A plan as text for people and as plain values for programs."""

from __future__ import annotations

import itertools
from typing import Any

from aadkern_train.engine.config import differences
from aadkern_train.engine.recipe import Recipe
from aadkern_train.planning.formulas import RESERVE, Clip
from aadkern_train.planning.layouts import Cluster, Planned

GIB = 2**30


def values(one: Planned, clip: Clip, cluster: Cluster) -> dict[str, Any]:
    """One stage's plan as plain values."""
    memory = {part: _digits(count / GIB) for part, count in one.memory.items() if count}
    by_part: dict[str, float] = {}
    for parts in one.passes.values():
        for part, seconds in parts.items():
            by_part[part] = by_part.get(part, 0.0) + seconds
    petaflops = one.petaflops(clip)
    work = sum(petaflops.values()) * one.settings.batch
    return {
        "fits": one.fits,
        "memory_gib": {**memory, "total": _digits(one.bytes / GIB)},
        "memory_at": one.fullest,
        "memory_of_gpu_gib": cluster.machine.memory,
        "memory_allowed_gib": round((1 - RESERVE) * cluster.machine.memory, 3),
        "seconds_per_step": {**{part: _digits(s) for part, s in by_part.items() if s}, "total": _digits(one.step)},
        "passes": {
            name: {"petaflops_per_clip": _digits(count), "seconds_per_step": _digits(sum(one.passes[name].values()))}
            for name, count in petaflops.items()
        },
        "petaflops_per_clip": _digits(sum(petaflops.values())),
        "share_of_peak": round(work * 1e3 / (one.step * cluster.gpus * cluster.machine.peak), 4) if one.step else 0.0,
        "steps": one.settings.steps,
        "hours": _digits(one.total / 3600),
        "layout": layout_values(one),
    }


def words(one: Planned, recipe: Recipe) -> list[str]:
    """What the plan chose otherwise than the recipe, as words for ``aad train``."""
    changed = differences(recipe.stages[one.name].model_dump(mode="json"), one.settings.model_dump(mode="json"))
    overrides = [f"{one.name}.{key}={value}" for key, (_, value) in changed.items()]
    overrides += ["models.keep_gathered=true"] if one.layout.keep_gathered > recipe.models.keep_gathered else []
    shared = {"sequence": one.layout.sequence, "replicate": one.layout.replicate}
    return overrides + [f"parallel.{key}={value}" for key, value in shared.items() if value != getattr(recipe.parallel, key)]


def traced_values(trace: dict[str, float]) -> dict[str, float]:
    """A trace as plain values: GiB, and the seconds that it took."""
    return {f"{key}_gib": _digits(count / GIB) for key, count in trace.items() if key != "seconds"} | {
        "seconds": round(trace["seconds"], 1)
    }


def layout_values(one: Planned) -> dict[str, Any]:
    """How the stage lies on the GPUs, in the names of settings."""
    layout, settings = one.layout, one.settings
    layout_settings = {
        "gpus": layout.gpus,
        "replicate": layout.replicate,
        "shard": layout.ranks // layout.sequence,
        "sequence": layout.sequence,
        "batch": settings.batch,
        "accumulate": layout.accumulate,
        "clips_per_pass": layout.clips,
        "keep_gathered": layout.keep_gathered,
        "checkpointing": layout.checkpointing,
        "replay": settings.replay,
    }
    return layout_settings | ({"views": settings.views} if hasattr(settings, "views") else {})


def text(title: str, stages: dict[str, dict[str, Any]], disk: dict[str, Any], assumptions: list[str]) -> str:
    """All stages' plans for a terminal."""
    lines = [title]
    for name, stage in stages.items():
        lines += ["", *_stage(name, stage)]
    lines += ["", "On disk, GB"]
    lines += [f"  {what:<44}{gb:>10,.1f}" for what, gb in disk["gigabytes"].items()]
    if disk["pair_gpu_hours"]:
        lines.append(f"  `aad pairs` takes the teacher {disk['pair_gpu_hours']:,.0f} GPU hours")
    return "\n".join([*lines, "", "Assumed", *(f"  - {line}" for line in assumptions)])


def _stage(name: str, stage: dict[str, Any]) -> list[str]:
    memory, layout, step = stage["memory_gib"], stage["layout"], stage["seconds_per_step"]
    verdict = "fits" if stage["fits"] else "DOES NOT FIT"
    most = f"{_shown(memory['total'])} GiB a GPU at its peak, {stage['memory_at']}"
    lines = [
        f"{name}: {verdict}: {most}; {stage['memory_allowed_gib']:.1f} of {stage['memory_of_gpu_gib']:.1f} allowed",
        "  " + ", ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in layout.items()),
        *([f"  set by this plan: {' '.join(stage['words'])}"] if stage["words"] else []),
        f"  {'memory':<12}{'GiB':>10}    {'step':<20}{'seconds':>10}{'PFLOP a clip':>14}",
    ]
    passes = [(part, one["seconds_per_step"], _shown(one["petaflops_per_clip"])) for part, one in stage["passes"].items()]
    rest = step["total"] - sum(seconds for _, seconds, _ in passes)
    passes += [("optimiser", max(0.0, rest), ""), ("total", step["total"], _shown(stage["petaflops_per_clip"]))]
    for left, right in itertools.zip_longest(memory.items(), passes):
        cells = f"  {left[0]:<12}{_shown(left[1]):>10}" if left else " " * 24
        cells += f"    {right[0]:<20}{_shown(right[1]):>10}{right[2]:>14}" if right else ""
        lines.append(cells.rstrip())
    of = ", ".join(f"{part} {_shown(seconds)}" for part, seconds in step.items() if part != "total")
    hours = f"{stage['steps']} steps: {_shown(stage['hours'])} hours at {100 * stage['share_of_peak']:.0f} % of the peak"
    lines += [f"  seconds of a step: {of}", f"  {hours}"]
    if "trace" in stage:
        trace = {key: _shown(value) for key, value in stage["trace"].items()}
        lines.append(
            f"  traced, a step of at most two parts: {trace['peak_gib']} GiB ({trace['state_gib']} before it), by the formulas "
            f"{trace['formula_gib']}; {trace['seconds']} s"
        )
    return lines


def _digits(value: float) -> float:
    """Six digits."""
    return float(f"{value:.6g}")


def _shown(value: float) -> str:
    """Three digits or so, for people."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:.1e}"
