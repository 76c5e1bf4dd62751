"""Rows, and frames of keys and values, whose sizes lie far apart: what e4m3 must hold."""

from __future__ import annotations

import torch
from torch import nn

from aadkern.fp8.frames import quantise_frames

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def uneven_rows(dtype, channels=96):
    """Rows from 1e-4 to 100 in size, one of zeros, with outliers; all within float16."""
    x = torch.randn(2, 5, channels) * torch.logspace(-4, 2, 10).view(2, 5, 1)
    x[0, 2] = 0
    x[..., 3] *= 30
    return x.to(dtype)


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def strided(kind, x):
    if kind == "apart":
        return torch.stack((x, x), dim=-1)[..., 0]
    if kind == "exchanged":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def kind_of_rows(kind, channels, count=24):
    x = torch.randn(count, channels)
    if kind == "outlier channels":
        x[:, torch.randperm(channels)[:4]] *= 100
    if kind == "uneven tokens":
        x *= torch.randn(count, 1).exp()
    if kind == "after gelu":
        x = nn.functional.gelu(2 * x, approximate="tanh")
    return x.bfloat16()


def uneven_frames(frames, tokens, heads=2, channels=8, batch=2, dtype=torch.float32):
    """Frames and heads whose sizes differ by factors of up to 10^4."""
    sizes = 10 ** (4 * torch.rand(batch, frames, 1, heads, 1) - 2)
    return (torch.randn(batch, frames, tokens, heads, channels) * sizes).flatten(1, 2).to(dtype)


def quantised_frames(x, frames):
    values = torch.full(x.shape, 7.0, device=x.device).to(torch.float8_e4m3fn)
    scale = torch.full((x.shape[0], frames, x.shape[2]), 7.0, device=x.device)
    quantise_frames(x, values, scale)
    return values, scale
