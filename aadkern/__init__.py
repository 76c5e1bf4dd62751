"""aadkern: attention and streaming for causal video diffusion on Wan. The public names, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aadkern import plans
from aadkern.noise.api import noised_views
from aadkern.plans import AttentionPlan, VideoLayout, Window
from aadkern.pooling.api import attention_pool
from aadkern.range_attention.api import attention
from aadkern.runtime import backends

if TYPE_CHECKING:
    from aadkern import blocks, fp8, ulysses
    from aadkern.streaming.cache import StreamingCache
    from aadkern.streaming.generator import StreamingGenerator
    from aadkern.ulysses.api import ulysses_attention
    from aadkern.ulysses.group import SequenceGroup

__version__ = "0.2.0"

__all__ = [
    "AttentionPlan",
    "SequenceGroup",
    "StreamingCache",
    "StreamingGenerator",
    "VideoLayout",
    "Window",
    "__version__",
    "attention",
    "attention_pool",
    "backends",
    "blocks",
    "fp8",
    "noised_views",
    "plans",
    "ulysses",
    "ulysses_attention",
]


_LATE = {  # what `import aadkern` alone does not bring: the name, and the file that has it
    "SequenceGroup": "ulysses.group",
    "StreamingCache": "streaming.cache",
    "StreamingGenerator": "streaming.generator",
    "ulysses_attention": "ulysses.api",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("blocks", "fp8", "ops", "ulysses"):
        return import_module(f"aadkern.{name}")
    if name in _LATE:
        return getattr(import_module(f"aadkern.{_LATE[name]}"), name)
    raise AttributeError(f"module 'aadkern' has no attribute {name!r}")
