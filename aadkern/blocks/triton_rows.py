"""What the block operators' Triton kernels share: how a row of channels lies over the threads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Loops over rows copy the next row to shared memory meanwhile: at 5120 channels a backward's registers leave room for one program
# on a multiprocessor, whose loads would otherwise wait for its sums over the row. No speed measured yet.
STAGES = tl.constexpr(2)


def warps_for(channels: int) -> int:
    """16 channels a thread: two vectors of 16 bytes in bf16, and few enough registers to keep a row's sums there too."""
    return min(max(triton.next_power_of_2(channels) // 512, 1), 32)


def dense_channels(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only if its last dimension is not contiguous (a gradient expanded from a sum, say)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """[B, ..., C] -> [B, tokens, C] with dense channels."""
    return dense_channels(x.flatten(1, -2))
