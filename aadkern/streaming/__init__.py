"""Streaming: Wan's rotary positions for endless video, what a chunk sees, the ring cache, the generator."""

from __future__ import annotations

from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.context import CausalContext
from aadkern.streaming.generator import StreamingGenerator

__all__ = ["CausalContext", "StreamingCache", "StreamingGenerator"]
