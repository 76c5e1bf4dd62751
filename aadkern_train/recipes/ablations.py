"""The grids that ``aad ablate`` knows: a recipe's settings cell by cell, and what was expected of them before any was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PAPER_ASD = """\
The paper (arXiv 2511.01419, table 2) has Total VBench in one step: none 78.1, ASD 80.7, FFE 83.0, both 83.9; in two: 82.6, 83.3,
83.8, 84.3. So of quality and obey, at 1 step and at 2, is expected: none < ASD < FFE < both, each gaining more in one step than in
two; at 4 steps, which FFE leaves as they are, the cells lie within a point or two. Not expected: that ASD costs motion."""


@dataclass(frozen=True)
class Grid:
    """``cells``: a name and the settings in which it differs from ``base``, settings of ``recipe``. The stages ``shared`` are
    trained once for each seed, as ``base`` has them; a cell trains anew the first of them that it sets otherwise, and what follows.

    ``apart``: settings of the whole recipe in which cells may differ all the same. ``rows`` and ``measures`` are what the page
    shows of metrics.json; ``expected`` was written before the first run.
    """

    recipe: str
    cells: Mapping[str, tuple[str, ...]]
    shared: tuple[str, ...]
    rows: tuple[str, ...]
    measures: tuple[str, ...]
    expected: str
    base: tuple[str, ...] = ()
    apart: tuple[str, ...] = ("levels", "first_levels", "spacing")


GRIDS = {
    "asd": Grid(
        recipe="digits_asd",
        cells={
            "none": ("first_levels=null", "asd.alpha=0"),
            "ASD": ("first_levels=null",),
            "FFE": ("asd.alpha=0",),
            "both": (),
        },
        shared=("pretrain", "ode"),
        rows=("asd.1", "asd.2", "asd"),
        measures=("quality", "obey", "keep", "drift", "dynamic"),
        expected=PAPER_ASD,
    ),
}
