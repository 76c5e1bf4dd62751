"""Drop-ins for the Wan family: patched FlexAttention models, a diffusers processor, checkpoints in both spellings of names."""

from __future__ import annotations

from aadkern.compat.block_mask import plan_of_block_mask
from aadkern.compat.handle import Handle
from aadkern.compat.models import load_model
from aadkern.compat.patching import PROJECTS, patch
from aadkern.compat.processor import AadWanProcessor, set_processor
from aadkern.weights.checkpoints import from_wan_names, infer_config, load_checkpoint, save_checkpoint, to_wan_names

__all__ = [
    "PROJECTS",
    "AadWanProcessor",
    "Handle",
    "from_wan_names",
    "infer_config",
    "load_checkpoint",
    "load_model",
    "patch",
    "plan_of_block_mask",
    "save_checkpoint",
    "set_processor",
    "to_wan_names",
]
