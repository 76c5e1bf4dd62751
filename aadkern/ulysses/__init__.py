"""Ulysses: attention over a sequence that several ranks share, exact and balanced for any number of heads."""

from __future__ import annotations

from aadkern.ulysses.api import SequenceAttention, ulysses_attention
from aadkern.ulysses.group import SequenceGroup, enter, leave, merge_pooled
from aadkern.ulysses.shares import shares

__all__ = ["SequenceAttention", "SequenceGroup", "enter", "leave", "merge_pooled", "shares", "ulysses_attention"]
