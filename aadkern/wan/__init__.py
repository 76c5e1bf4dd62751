"""CausalWan: diffusers' Wan transformer with per-frame timesteps, plans and a streaming cache. Imports diffusers."""

from __future__ import annotations

from aadkern.streaming.context import CausalContext
from aadkern.wan.model import CausalWan, CausalWanBlock

__all__ = ["CausalContext", "CausalWan", "CausalWanBlock"]
