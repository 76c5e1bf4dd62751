"""What attends to what in one forward of ``CausalWan``: a whole clip under a plan, or a stream's next chunk through its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aadkern.checks import MOST, boolean, shown, whole
from aadkern.plans import AttentionPlan
from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.context import CausalContext
from aadkern.streaming.graphs import PassGraphs
from aadkern.ulysses.api import plan_word


@dataclass(frozen=True, eq=False)
class WholeClip:
    """All frames of a clip, the first of them at frame index ``first_frame``.

    ``plan``: an ``AttentionPlan`` over the clip's tokens, a ``CausalContext`` (block-causal, in the model's own kind of positions),
    or None for bidirectional. Under an ``AttentionPlan`` positions are absolute in either mode. Under a teacher-forcing plan
    (``plan.is_teacher_forcing``) both halves are that clip, so each starts at ``first_frame``. A sequence of indices is for equal
    segments that each start at their own.
    """

    plan: AttentionPlan | CausalContext | None = None
    first_frame: int | Sequence[int] = 0


@dataclass(frozen=True, eq=False)
class CachedChunk:
    """A chunk that sees the frames in view of ``cache``, and itself; ``StreamingCache`` tells the protocol.

    ``clean_frames``, under ``torch.no_grad``: the first frames are the last chunk, clean, whose keys and values are to be
    committed, the others the next chunk, whose flow alone is returned; timesteps are then per frame. ``cache_only``: only write the
    cache, without gradient, and stop after the last layer's keys and values; the forward returns None. ``graphs``, on a GPU under
    ``torch.no_grad``: the pass is replayed from a CUDA graph once it has been seen.
    """

    cache: StreamingCache
    clean_frames: int = 0
    cache_only: bool = False
    graphs: PassGraphs | None = None


Attention = WholeClip | CachedChunk

# The older arguments of CausalWan.forward, which say the same as ``attention``, and what each is where it is not given.
OLDER = {"plan": None, "cache": None, "first_frame": 0, "cache_only": False, "clean_frames": 0, "graphs": None}


def attention_spec(attention: Any, older: dict[str, Any]) -> Attention:
    """What the argument ``attention`` says, or without it the ``older`` ones; not checked yet.

    A plan or context stands for the clip under it, a cache for a chunk that goes through it.
    """
    if attention is None and older["cache"] is None:
        return WholeClip(older["plan"], older["first_frame"])
    if attention is None:
        return CachedChunk(older["cache"], older["clean_frames"], older["cache_only"], older["graphs"])
    if isinstance(attention, (WholeClip, CachedChunk)):
        return attention
    return CachedChunk(attention) if _is_cache(attention) else WholeClip(attention)


def check_attention(attention: Any, older: dict[str, Any], spec: Attention) -> None:
    """Raise ValueError for arguments that exclude one another, TypeError for one of another type than is taken."""
    types = (AttentionPlan, CausalContext, WholeClip, CachedChunk)
    if attention is not None and not isinstance(attention, types) and not _is_cache(attention):
        wanted = "a WholeClip, a CachedChunk, an AttentionPlan, a CausalContext, a StreamingCache or None"
        raise TypeError(f"attention must be {wanted}, got {shown(attention)}")
    names = [name for name, value in older.items() if not (isinstance(value, type(OLDER[name])) and value == OLDER[name])]
    if attention is not None and names:
        raise ValueError(f"{names[0]} must not be given with attention, which says it all")
    if isinstance(spec, WholeClip):
        _check_clip(spec)
        _check_types(older["cache_only"], older["clean_frames"], older["graphs"])
        missing = next((name for name in ("cache_only", "clean_frames", "graphs") if name in names), None)
        if missing is not None:
            raise ValueError(f"{missing} must be {OLDER[missing]} without a cache, got {shown(older[missing])}")
        return
    if not _is_cache(spec.cache):
        raise TypeError(f"cache must be a StreamingCache or None, got {shown(spec.cache)}")
    _check_clip(WholeClip(older["plan"], older["first_frame"]))
    _check_types(spec.cache_only, spec.clean_frames, spec.graphs)
    if "plan" in names or "first_frame" in names:
        raise ValueError("plan and first_frame must not be given with a cache, which knows both")


def _is_cache(value: Any) -> bool:
    """Another that keeps its protocol serves too: benchmarks stream Self-Forcing's cache through the same model."""
    return isinstance(value, StreamingCache) or (not isinstance(value, type) and callable(getattr(value, "begin", None)))


def _check_clip(clip: WholeClip) -> None:
    if clip.plan is not None and not isinstance(clip.plan, (AttentionPlan, CausalContext)):
        raise TypeError(f"plan must be an AttentionPlan, a CausalContext or None, got {type(clip.plan).__name__}")
    if not isinstance(clip.first_frame, Sequence) or isinstance(clip.first_frame, (str, bytes)):
        whole(clip.first_frame, "first_frame", -MOST)


def _check_types(cache_only: Any, clean_frames: Any, graphs: Any) -> None:
    if graphs is not None and not isinstance(graphs, PassGraphs):
        raise TypeError(f"graphs must be PassGraphs or None, got {shown(graphs)}")
    boolean(cache_only, "cache_only")
    whole(clean_frames, "clean_frames")


def attention_word(spec: Attention) -> str:
    """It in a few letters, for ranks to compare; of any types."""
    if isinstance(spec, WholeClip):
        return f"{plan_word(spec.plan) if isinstance(spec.plan, AttentionPlan) else spec.plan}, {spec.first_frame}"
    return f"{getattr(spec.cache, 'frame', None)}, {spec.clean_frames}, {spec.cache_only}, {spec.graphs is not None}"
