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
    from aadkern import blocks, fp8
    from aadkern.streaming.cache import StreamingCache
    from aadkern.streaming.generator import StreamingGenerator

__version__ = "0.1.0"

__all__ = [
    "AttentionPlan",
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
]


def __getattr__(name: str) -> Any:
    if name in ("blocks", "fp8", "ops"):
        from importlib import import_module

        return import_module(f"aadkern.{name}")
    if name == "StreamingCache":
        from aadkern.streaming.cache import StreamingCache

        return StreamingCache
    if name == "StreamingGenerator":
        from aadkern.streaming.generator import StreamingGenerator

        return StreamingGenerator
    raise AttributeError(f"module 'aadkern' has no attribute {name!r}")
