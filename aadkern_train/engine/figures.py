"""How fast a step was, for the log: what it took is counted by formulas, from above, and its seconds are measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counted:
    """What a step of a stage takes. ``flops``: of all processes, without what recomputation adds; ``sent``: bytes that leave
    each process, by what they are; ``peak``: FLOP/s of the GPU's data sheet, None where it is not known."""

    flops: float
    sent: Mapping[str, float]
    peak: float | None


def speed(tokens: int, seconds: float, processes: int, counted: Counted | None) -> dict[str, Any]:
    """Of a step: tokens of clips a second over all processes, the share of the peak, and MB that each process sends."""
    figures: dict[str, Any] = {"tokens_per_second": round(tokens / seconds, 1)}
    if counted is not None and counted.peak is not None:
        figures["mfu"] = round(counted.flops / (seconds * processes * counted.peak), 4)
    if counted is not None:
        figures["sent_mb"] = {what: round(count / 1e6, 3) for what, count in counted.sent.items()}
    return figures
