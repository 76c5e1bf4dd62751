"""CausalWan: diffusers' Wan transformer with per-frame timesteps, plans and a streaming cache. Imports diffusers."""

from __future__ import annotations

from aadkern.streaming.context import CausalContext
from aadkern.wan.attention import CachedChunk, WholeClip
from aadkern.wan.block import CausalWanBlock, TextCache, TimeCache
from aadkern.wan.model import CausalWan

__all__ = ["CachedChunk", "CausalContext", "CausalWan", "CausalWanBlock", "TextCache", "TimeCache", "WholeClip"]
