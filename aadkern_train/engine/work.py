"""What a step of a stage computes and keeps, in the words that ``aad plan`` counts by: each stage's settings give a ``Work``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sees = Literal["bidirectional", "causal", "isolated", "rollout", "clean", "exits"]
"""The clip under a plan; or chunk by chunk through the cache: a whole rollout, its clean passes alone, or the pass of each
generated chunk that carries the gradient."""


@dataclass(frozen=True)
class Sizes:
    """A latent frame (C, H, W), and a text (tokens, width), None without words."""

    frame: tuple[int, int, int]
    text: tuple[int, int] | None


@dataclass(frozen=True)
class Member:
    """A network of a stage. ``source`` is what ``Networks.make`` takes; one that does not learn is kept in bf16 unless ``fp32``.

    ``taps``: the blocks that a discriminator reads, beyond the deepest of which none runs, by ``queries`` tokens each. ``reads``
    above 0: it is the heads alone, which read another role's taps into so many logits.
    """

    role: str
    source: str | None
    learns: bool = True
    ema: bool = False
    muon: bool = False
    taps: tuple[int, ...] = ()
    queries: int = 1
    reads: int = 0
    fp32: bool = False
    offloaded: bool = False


@dataclass(frozen=True)
class Pass:
    """Passes of the network ``role`` over each clip of a batch.

    ``times`` per clip and step, of ``rows`` rows at once (views, or the text and the null text). ``depth``: how many passes a
    rollout's first generated chunk runs and how many each other one, in the mean; None: up to an exit drawn among all.
    ``gradient``: of nothing, of the ``inputs`` alone, or of the ``weights``. ``replay``: chunks are differentiated one at a time,
    after a forward of their own; otherwise the graph of exits lives from the rollout on. ``updates``: the learner whose gradients
    add up meanwhile. ``cache``: whether a rollout's keys and values are in memory.
    """

    name: str
    role: str
    sees: Sees
    updates: str
    gradient: Literal["none", "inputs", "weights"] = "none"
    times: float = 1.0
    rows: float = 1.0
    depth: tuple[float, float] | None = None
    replay: bool = True
    cache: bool = False


@dataclass(frozen=True)
class PairsWork:
    """Trajectories that a stage learns from: ``steps`` passes of the teacher over ``rows`` rows for each of ``count`` (None: those
    of ``aad pairs``), of which ``levels`` clips are kept."""

    count: int | None
    steps: int
    rows: int
    levels: int


@dataclass(frozen=True)
class Work:
    """A stage's networks, the passes of a step in their order, and what it learns from. ``clips`` and ``texts``: how many of each
    stay on the GPU for every clip of a batch. ``first``: the passes of a step before the stage's own, of which there are
    ``first_steps``."""

    members: tuple[Member, ...]
    passes: tuple[Pass, ...]
    pairs: PairsWork | None = None
    clips: int = 0
    texts: int = 0
    first: tuple[Pass, ...] = ()
    first_steps: int = 0
