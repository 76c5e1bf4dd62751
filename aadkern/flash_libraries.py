"""Which of other people's attention kernels are here: FlashAttention 3, 4 and 2, and xformers, for ``backend="flash"``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DEVICES = ("cuda",)


class Library(NamedTuple):
    """Where a library's forward, with lse, and backward, from out and lse, are, and the major compute capabilities it serves.

    ``in_place``: its backward writes into the dq, dk and dv that it is given, and does not return them.
    """

    name: str
    module: str
    forward: str
    backward: str
    capabilities: tuple[int, ...]
    in_place: bool = False


# Best first, by published rates. xformers serves what the others leave.
LIBRARIES = (
    Library("FlashAttention 3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward", (9,), in_place=True),
    Library("FlashAttention 4", "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd", (9, 10, 11)),
    Library(
        "FlashAttention 2",
        "flash_attn.flash_attn_interface",
        "_flash_attn_forward",
        "_flash_attn_backward",
        (8, 9, 10, 12),
        in_place=True,
    ),
    Library(
        "xformers",
        "xformers.ops",
        "memory_efficient_attention_forward_requires_grad",
        "memory_efficient_attention_backward",
        (7, 8, 9, 10, 11, 12),
    ),
)


class Served(NamedTuple):
    """A library that is here: its two functions."""

    library: Library
    forward: Callable[..., Any]
    backward: Callable[..., Any]


def reason_against(device: str) -> str | None:
    """None if a library is here that serves ``device``, else what became of each. Imports them, since only that tells."""
    answer = served(device)
    return answer if isinstance(answer, str) else None


@functools.cache
def served(device: str) -> Served | str:
    """The first of ``LIBRARIES`` that serves ``device`` ("cuda", "cuda:1"), or the reasons why none does."""
    if device.partition(":")[0] not in DEVICES:
        return "flash-attn and xformers serve CUDA devices"
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        return "flash-attn and xformers serve CUDA devices, and torch sees none here"
    major = torch.cuda.get_device_capability(device)[0] if cuda else None
    reasons = []
    for library in LIBRARIES:
        if major is not None and major not in library.capabilities:
            reasons.append(f"{library.name}: not for compute capability {major}.x")
            continue
        try:
            module = importlib.import_module(library.module)
            return Served(library, getattr(module, library.forward), getattr(module, library.backward))
        except Exception as error:  # one built for another torch can raise anything
            first_line = (str(error).splitlines() or [""])[0]
            reasons.append(f"{library.name}: {type(error).__name__}: {first_line}")
    return "; ".join(reasons)
