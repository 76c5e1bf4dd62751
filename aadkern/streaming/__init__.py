"""Streaming: Wan's rotary positions for endless video, what a chunk sees, the ring cache of keys and values."""

from __future__ import annotations

from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.context import CausalContext

__all__ = ["CausalContext", "StreamingCache"]
