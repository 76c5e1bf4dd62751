"""``load_model``: a ``CausalWan`` out of a single file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from aadkern.weights.checkpoints import read_model

if TYPE_CHECKING:
    from aadkern.wan.model import CausalWan


def load_model(
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    head_dim: int = 128,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> CausalWan:
    """A ``CausalWan`` from a ``.pt`` or ``.safetensors`` file, as ``weights.checkpoints.read_model`` makes it. Needs diffusers."""
    from aadkern.wan.model import CausalWan

    return read_model(CausalWan, path, weights=weights, head_dim=head_dim, dtype=dtype, **config)
