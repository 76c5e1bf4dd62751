"""``aadkern.noised_views``: clips at their noise levels and the same clips a little moved, from a seed; checks its input."""

from __future__ import annotations

import torch
from torch import Tensor

from aadkern.checks import choice, real, shown, tensor, whole
from aadkern.noise import ops
from aadkern.runtime import FUSED_BACKENDS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_ELEMENTS = 2**31 - 2**16  # of one sample: its positions are 32-bit


def noised_views(
    x0: Tensor,  # [B, F, C, H, W]
    sigma: Tensor,  # [B] or [B, F]
    *,
    delta_std: float | Tensor,
    seed: int | Tensor,
    first_sample: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two views of each clip for the approximated R1 and R2 penalties (AAD-1 equation 9), in one pass from a seed.

        x_sigma = (1 - sigma) x0 + sigma eps,   x_perturbed = x_sigma + delta_std delta,   eps, delta ~ N(0, 1)

    ``x0`` [B, F, C, H, W] clean latents, floating point, frames before channels (``CausalWan``'s are [B, C, F, H, W]: transpose
    them, or the numbers of other elements are drawn); ``sigma`` [B] or [B, F] noise levels in [0, 1]; ``delta_std`` the standard
    deviation of the perturbation: a number, or [B] or [B, F] (0 where a frame must stay, an image-to-video clip's first, say).
    What tensors hold is not checked: on a GPU the host would have to wait for it.
    ``seed``: an integer of 64 bits, or an int64 tensor: one number for the call, or [B] one per sample. The same seed gives the
    same noise on every device and backend (``aadkern.noise.layout``: integers to the bit, normals to 2 ulp; so far, to the bit).
    To share out a batch under one seed, give each part the index of its first sample in the whole as ``first_sample``; seeds per
    sample need no such care.

    Returns (x_sigma, x_perturbed) in x0's shape and dtype; computed in float32, in bf16 rounded at the end: there, a
    ``delta_std`` under 1/256 of a value is lost, so keep latents in float32. Gradients flow to ``x0`` alone. ``seed`` as a tensor
    keeps one compiled graph or CUDA graph for all seeds. ``backend``: "reference" or "torch" (the same here), "triton", or None for
    the device's best.

    Raises TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value, before any work.
    """
    _check_clips(x0)
    wide = torch.promote_types(x0.dtype, torch.float32)
    levels = _per_frame("sigma", sigma, x0).to(wide)
    if isinstance(delta_std, Tensor):
        stds = _per_frame("delta_std", delta_std, x0).to(wide)
    else:
        number = real(delta_std, "noised_views: delta_std", 0.0, torch.finfo(wide).max)
        stds = x0.new_full((1, 1), number, dtype=wide).expand(x0.shape[:2])
    seeds = _seeds(seed, x0)
    first_sample = whole(first_sample, "noised_views: first_sample", 0, 2**32)
    if not 0 <= first_sample < 2**32 - x0.shape[0] or (first_sample and len(seeds) > 1):
        raise ValueError(
            f"noised_views: first_sample must be in [0, 2^32 - batch), and 0 with a seed per sample, got {first_sample}"
        )
    choice(backend, "noised_views: backend", FUSED_BACKENDS, none=True)
    return ops.noised_views(x0.contiguous(), levels, stds, seeds, first_sample, backend or "auto")


def _check_clips(x0: Tensor) -> None:
    tensor(x0, "noised_views: x0")
    if x0.dtype not in DTYPES:
        raise TypeError(f"noised_views: x0 must be float32, float64, float16 or bfloat16, got {x0.dtype}")
    if x0.dim() != 5:
        raise ValueError(f"noised_views: x0 must be [batch, frames, channels, height, width], got shape {tuple(x0.shape)}")
    if x0.shape[1:].numel() > MAX_ELEMENTS:
        raise ValueError(f"noised_views: x0 must have at most {MAX_ELEMENTS} elements per sample, got {x0.shape[1:].numel()}")


def _per_frame(name: str, value: Tensor, x0: Tensor) -> Tensor:
    """A [B] or [B, F] argument as [B, F]."""
    batch, frames = x0.shape[:2]
    if not tensor(value, f"noised_views: {name}").is_floating_point():
        raise TypeError(f"noised_views: {name} must be a floating-point tensor, got {value.dtype}")
    if value.device != x0.device:
        raise ValueError(f"noised_views: {name} must be on x0's device {x0.device}, got {value.device}")
    if tuple(value.shape) not in ((batch,), (batch, frames)):
        raise ValueError(f"noised_views: {name} must be [{batch}] or [{batch}, {frames}], got {list(value.shape)}")
    value = value.detach()
    return (value[:, None] if value.dim() == 1 else value).expand(batch, frames)


def _seeds(seed: int | Tensor, x0: Tensor) -> Tensor:
    """int64 [1] or [B] on x0's device."""
    batch = x0.shape[0]
    if isinstance(seed, Tensor):
        if tensor(seed, "noised_views: seed").dtype != torch.int64:
            raise TypeError(f"noised_views: seed must be an int or an int64 tensor, got {seed.dtype}")
        if seed.device != x0.device:
            raise ValueError(f"noised_views: seed must be on x0's device {x0.device}, got {seed.device}")
        if tuple(seed.shape) not in ((), (1,), (batch,)):
            raise ValueError(f"noised_views: seed must be one number or [{batch}], got {list(seed.shape)}")
        return seed.reshape(-1)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"noised_views: seed must be an int or an int64 tensor, got {shown(seed)}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"noised_views: seed must fit in 64 signed bits, got {shown(seed)}")
    return torch.full((1,), seed, dtype=torch.int64, device=x0.device)
