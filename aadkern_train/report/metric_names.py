"""What each metric is called, which way is better, and how it is defined: the words of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """``better`` is "higher", "lower" or "near real"; ``digits`` are shown after the point."""

    name: str
    better: str
    digits: int
    meaning: str

    @property
    def arrow(self) -> str:
        """An arrow for the table's head."""
        return {"higher": "\u2191", "lower": "\u2193"}.get(self.better, "\u2192 real")


METRICS = {
    "quality": Metric(
        "Quality",
        "higher",
        1,
        "100 times the mean correlation of each frame with the nearest clean picture: blur and noise lower it.",
    ),
    "legal": Metric("Legal", "higher", 1, "Percentage of frame-to-frame displacements that the world's law allows."),
    "keep": Metric("Keep", "near real", 2, "Share of displacements that repeat the one before."),
    "velocity_tv": Metric(
        "Velocity TV",
        "lower",
        2,
        "Total variation between the distribution of the displacements and the law's: near 1 if one movement is all "
        "that is left (mode loss). Finite samples put real video a little above 0.",
    ),
    "dynamic": Metric("Dynamic", "higher", 1, "Percentage of videos that move at all, by VBench's rule."),
    "drift": Metric(
        "Drift",
        "lower",
        1,
        "100 times the standard deviation of the picture's quality (for real video: of its sharpness) over the parts "
        "of a video, mean over videos.",
    ),
    "nll_excess": Metric(
        "Excess NLL",
        "lower",
        2,
        "Nats per transition by which the decoded movement is less likely under the law than real movement is.",
    ),
    "velocity_tv_first": Metric("First TV", "lower", 2, "Velocity TV of each video's first displacement alone."),
    "velocity_tv_legal": Metric(
        "Legal TV", "lower", 2, "Velocity TV among the legal displacements alone: mode loss without illegal moves."
    ),
    "identity": Metric("Identity", "higher", 1, "Percentage of frames that show the same digit as the first frame."),
    "grid": Metric("Grid", "lower", 2, "Power of the error at the harmonics of the patch grid, in percent of a real frame's."),
    "motion": Metric("Motion", "near real", 1, "100 times the mean absolute frame difference over that of real video."),
    "sharpness": Metric("Sharpness", "near real", 1, "100 times the mean spatial gradient over that of real video."),
    "frechet": Metric("Frechet", "lower", 2, "Frechet distance of 8 plain features of a clip: colour, contrast, movement."),
}


def metric(key: str) -> Metric:
    """The metric of that key; an unknown one is shown under its own name and judged by its distance to real video."""
    return METRICS.get(key) or Metric(key.replace("_", " "), "near real", 2, "")


def in_order(keys: set[str]) -> list[str]:
    """Known metrics first, in the order of the table; then the others by name."""
    return [key for key in METRICS if key in keys] + sorted(keys - METRICS.keys())


def distance(key: str, value: float, real: float | None) -> float:
    """How far a value is from the best: from real video's where it is known, else by the metric's direction."""
    if real is not None:
        return abs(value - real)
    return {"higher": -value, "lower": value}.get(metric(key).better, 0.0)


def shown(key: str, value: float | None) -> str:
    """The value as the table shows it."""
    return "\u2013" if value is None else f"{value:.{metric(key).digits}f}"
