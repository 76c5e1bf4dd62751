"""What stands between a Wan block's matrix products: QK-norm with rotary positions, modulated norm, gated residual."""

from __future__ import annotations

from aadkern.blocks.api import gated_residual, modulated_norm, qk_norm_rope
from aadkern.rotary.grid import RotaryGrid, Turns

__all__ = ["RotaryGrid", "Turns", "gated_residual", "modulated_norm", "qk_norm_rope"]
