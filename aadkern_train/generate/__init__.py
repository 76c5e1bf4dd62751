"""Streaming a finished model: a run's, or Wan's from its folders, into a video file or through ``CausalWanPipeline``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aadkern_train.generate.pipeline import CausalWanPipeline

__all__ = ["CausalWanPipeline"]


def __getattr__(name: str) -> Any:
    if name == "CausalWanPipeline":  # brings diffusers and transformers
        from aadkern_train.generate.pipeline import CausalWanPipeline

        return CausalWanPipeline
    raise AttributeError(f"module 'aadkern_train.generate' has no attribute {name!r}")
