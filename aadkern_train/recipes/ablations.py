"""The grids that ``aad ablate`` knows: a recipe's settings cell by cell, and what was expected of them before any was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aadkern_train.recipes.asd import LEVELS

PAPER_ASD = """\
The paper (arXiv 2511.01419, table 2) has Total VBench in one step: none 78.1, ASD 80.7, FFE 83.0, both 83.9; in two: 82.6, 83.3,
83.8, 84.3. So of quality and obey, at 1 step and at 2, is expected: none < ASD < FFE < both, each gaining more in one step than in
two; at 4 steps, which FFE leaves as they are, the cells lie within a point or two. Not expected: that ASD costs motion."""

EXPECTED_AAD1 = """\
(1) Isolated frames give no force against a still picture (provable), so obey and dynamic fall most there; the paper's causal critic
with frame logits (dynamic degree 1.08, the other three 39 to 42) falls too (likely; not provable, as a causal critic's logit of a
frame has seen those before it). With video logits a causal critic leaves more drift than a bidirectional one (7.10 and 4.02).
(2) Without penalty the discriminator wins and quality falls; 2.5 times the penalty raises grid (paper: collapse; grid artefacts).
(3) Without stage II quality and drift are worse (paper: aesthetic quality 53.6 instead of 58.6). (4) Stage II five times as long
loses motion in the paper; here its teacher is nearly exact, so obedience rises and no motion is lost (open). (5) Two steps have
better quality than one, four steps of stage II alone too, for twice and four times the passes. (6) Ten times the trained length:
drift is least with the sink; 5 frames are no worse than 9; a window of all frames, at distances never trained, is worst."""

EXPECTED_AFD = """\
Written after single runs of seed 2 and before any cell of the grid. (1) AFD brings obey and contrast at three times the
length at least half of the way from stage II to 100, and quality loses at most 1 point, in 3 of 3 seeds. (2) A constant
reward changes nothing (provable: no gradient but the prior's, which is 0 at the start). (3) With a frozen discriminator the
student gains less, and grid or contrast leave what is real (paper; not seen in seed 2 after 60 steps). (4) The GAN loss in
Bradley-Terry's place lies within the spread of seeds: within a group both rank by the same logit. (5) Advantages centred over
the batch gain less, as they hold what differs from prompt to prompt; joint context is worse in drift, as its chunks never see
clean ones. (6) The GAN with real gradients (stage III) has more contrast and quality, and more grid or drift. (7) Supervision
is the best in quality where the teacher has one clip for a prompt; under a broad teacher it loses contrast and drifts
(provable for the optimum of a one-step student), AFD does not."""


TEN_TIMES = ("evaluate.long=10", "evaluate.lengths=[3]")


@dataclass(frozen=True)
class Grid:
    """``cells``: a name and the settings in which it differs from ``base``, settings of ``recipe``. The stages ``shared`` are
    trained once for each seed, as ``base`` has them; a cell trains anew the first of them that it sets otherwise, and what follows.

    ``apart``: settings of the whole recipe in which cells may differ all the same, and the first shared stage that they mean, None
    where they mean none of them. ``rows`` and ``measures`` are what the page shows of metrics.json; ``expected`` was written before
    the first run.
    """

    recipe: str
    cells: Mapping[str, tuple[str, ...]]
    shared: tuple[str, ...]
    rows: tuple[str, ...]
    measures: tuple[str, ...]
    expected: str
    base: tuple[str, ...] = ()
    apart: Mapping[str, str | None] = field(default_factory=dict)


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
        apart=dict.fromkeys(("levels", "first_levels", "spacing")),
    ),
    "aad1": Grid(
        recipe="digits",
        base=("dmd_continued.steps=0", "adversarial.versus=null"),
        cells={
            "as the recipe": (),
            "bidirectional, frame logits": ("adversarial.logits=frame",),
            "causal, video logit": ("adversarial.backbone=causal",),
            "causal, frame logits": ("adversarial.backbone=causal", "adversarial.logits=frame"),
            "isolated, frame logits": ("adversarial.backbone=isolated", "adversarial.logits=frame"),
            "no penalty": ("adversarial.penalty=0",),
            "penalty x 2.5": ("adversarial.penalty=20",),
            "III without II": ("adversarial.start=ode",),
            "II five times as long": ("dmd.steps=300", "dmd.stop_below_dynamic=0", "adversarial.steps=0"),
            "two steps": ("levels=[1.0,0.8333]",),
            "four steps, II alone": (f"levels={list(LEVELS)}", "adversarial.steps=0"),
            "window 9, sink 1, x 10": TEN_TIMES,
            "window 9, no sink, x 10": ("sink=0", *TEN_TIMES),
            "window 5, sink 1, x 10": ("window=5", *TEN_TIMES),
            "window of all, x 10": ("window=121", *TEN_TIMES),
        },
        shared=("pretrain", "ode", "dmd"),
        rows=("dmd", "adversarial"),
        measures=("quality", "obey", "legal", "drift", "contrast", "grid", "dynamic"),
        expected=EXPECTED_AAD1,
        apart={"levels": "ode", "window": "ode", "sink": "ode"},
    ),
    "afd": Grid(
        recipe="digits_afd",
        # Half of the recipe's steps: seed 2 had won all but 5 points of contrast by then.
        base=("afd.steps=60",),
        cells={
            "AFD": (),
            "reward constant": ("afd.advantage=none",),
            "discriminator frozen": ("afd.discriminator_learns=false",),
            "GAN loss": ("afd.objective=gan",),
            "advantage over the batch": ("afd.advantage=batch",),
            "joint context": ("afd.context=joint",),
            "stage III (GAN, real gradients)": ("afd.steps=0", "adversarial.steps=60"),
            "supervised": ("afd.learns=clips",),
            "broad teacher, AFD": ("data.curated_keep=0.9",),
            "broad teacher, supervised": ("data.curated_keep=0.9", "afd.learns=clips"),
        },
        shared=("pretrain", "ode", "dmd"),
        rows=("afd", "adversarial"),
        measures=("quality", "obey", "contrast", "drift", "grid"),
        expected=EXPECTED_AFD,
        apart={"data": None},  # the shared stages learn from web clips, and only the curated ones differ
    ),
}
