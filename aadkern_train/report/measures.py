"""The measures of a run as its world describes them in metrics.json: names, order, digits, and which of two values is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from aadkern_train.worlds.base import Metric

ARROWS = {"higher": "\u2191", "lower": "\u2193", "near real": "\u2192 real"}
NOT_MEASURES = ("seconds", "frames")  # numbers that an evaluation may note beside its measures
DASH = "\u2013"


class Measures:
    """Measures by key. One that the run does not describe has its key as name and is judged by its distance to real video."""

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self.known = {str(key): _metric(str(key), values) for key, values in metrics.items() if isinstance(values, dict)}

    def __getitem__(self, key: str) -> Metric:
        return self.known.get(key) or Metric(_words(key), "near real", 2, "")

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """Those that the run describes first, in its order; then the others by name."""
        keys = {*keys} - {*NOT_MEASURES}
        return [key for key in self.known if key in keys] + sorted(keys - self.known.keys())

    def arrow(self, key: str) -> str:
        """An arrow for a table's head."""
        return ARROWS[self[key].better]

    def group(self, key: str) -> str:
        """The name of a measure that is a number for each of several things: "Obey by direction" for "obey_by_direction"."""
        base, by, word = key.rpartition("_by_")
        return f"{self[base].name} by {_words(word)}" if by and key not in self.known else self[key].name

    def like(self, key: str) -> str:
        """The key of the measure that a group's numbers are of."""
        return key if key in self.known else key.rpartition("_by_")[0] or key

    def shown(self, key: str, value: float | None) -> str:
        """The value as a table shows it."""
        if value is None:
            return DASH
        return f"{self.rounded(key, value):.{self[key].digits}f}"

    def cost(self, key: str, value: float, real: float | None) -> float | None:
        """How bad a value is, as shown: less is better. None where only real video could tell, and is not known."""
        better, value = self[key].better, self.rounded(key, value)
        if better == "near real":
            return None if real is None else abs(value - self.rounded(key, real))
        return value if better == "lower" else -value

    def verdict(self, key: str, value: float, other: float, real: float | None) -> str:
        """What ``value`` is beside ``other``: "better", "worse" or "equal" as shown, "" where it cannot be said."""
        costs = self.cost(key, value, real), self.cost(key, other, real)
        if costs[0] is None or costs[1] is None:
            return ""
        if abs(costs[0] - costs[1]) < 1e-9:
            return "equal"
        return "better" if costs[0] < costs[1] else "worse"

    def rounded(self, key: str, value: float) -> float:
        """The value at the digits that are shown."""
        return round(value, self[key].digits) + 0.0  # + 0.0: no minus before a zero


def _words(key: str) -> str:
    return key.replace("_", " ")


def _metric(key: str, values: Mapping[str, Any]) -> Metric:
    name, better, digits, meaning = (values.get(field) for field in ("name", "better", "digits", "meaning"))
    return Metric(
        name if isinstance(name, str) and name else _words(key),
        better if isinstance(better, str) and better in ARROWS else "near real",
        min(max(digits, 0), 6) if isinstance(digits, int) else 2,
        meaning if isinstance(meaning, str) else "",
    )
