"""Streaming: Wan's rotary positions for endless video, what a chunk sees, the ring cache, the generator."""

from __future__ import annotations

from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.context import CausalContext
from aadkern.streaming.generator import StreamingGenerator
from aadkern.streaming.graphs import PassGraphs

__all__ = ["CausalContext", "PassGraphs", "StreamingCache", "StreamingGenerator"]
