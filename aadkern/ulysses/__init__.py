"""Ulysses: attention over a sequence that several ranks share, exact and balanced for any number of heads.

``aadkern.SequenceGroup`` and ``aadkern.ulysses_attention`` are its two main names.
"""

from __future__ import annotations

from aadkern.ulysses.group import enter, leave, merge_pooled
from aadkern.ulysses.shares import shares

__all__ = ["enter", "leave", "merge_pooled", "shares"]
