"""Which backend serves an operator on which device, and why the others do not: a record of each, and the one place that decides."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from aadkern import checks

AVAILABLE = "available"

# Best first; "flash" is never picked. Triton serves CPU tensors only under its interpreter, for tests, and is never picked there.
PREFERENCE = {"cpu": ("sdpa", "reference"), "cuda": ("sm90", "triton", "sdpa", "reference")}

# The other operators: their meaning in plain torch, the fast form of it in torch's own operations, fused kernels.
FUSED_BACKENDS = ("reference", "torch", "triton")
FUSED_PREFERENCE = {"cpu": ("torch",), "cuda": ("triton", "torch")}

TRITON_MAX_HEAD_DIM = 256
E4M3_CAPABILITY = (8, 9)  # the first whose conversions Triton can use; earlier GPUs, and AMD's, decode into a temporary tensor
SM90_CAPABILITY, SM90_HEAD_DIMS, SM90_DTYPES = (9, 0), (64, 128), ("bfloat16", "float16")

# Where the tests of each backend, and of each other room's kernels, have passed. A GPU entry is
# "<GPU>: benchmarks/results/<file>.json", written by benchmarks.verified from what benchmarks.gpu_check found on that GPU;
# tests/benchmarks/test_verified.py holds the entry to what the file says. "auto" takes sm90, which no CPU can run, only once it
# has an entry.
VERIFIED: dict[str, tuple[str, ...]] = {
    "reference": ("cpu",),
    "sdpa": ("cpu",),
    "triton": ("the CPU interpreter",),
    "sm90": (),
    "flash": (),
    "pooling": ("the CPU interpreter",),
    "noise": ("the CPU interpreter",),
    "blocks": ("the CPU interpreter",),
    "fp8": ("the CPU interpreter",),
}
# Where Triton's attention compiles without a GPU and, at head_dim 64 and 128, without spills
# (tests/attention/test_triton_compile*.py): compute capability or AMD's name -> GPUs of it, by the names in VERIFIED.
# docs/triton.md has the table.
COMPILED: dict[str, tuple[str, ...]] = {
    "8.0": ("A100",),
    "8.9": ("RTX 4090", "L40S"),
    "9.0": ("H100", "H200", "H20", "GH200"),
    "10.0": ("B200",),
    "12.0": ("RTX 5090",),
    "gfx942": ("MI300X", "MI325X"),
}


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton's launches go to the tensors' own device, whichever is current."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _reason_against_triton(device: str) -> str | None:
    device_type = device.partition(":")[0]
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cpu" and not interpreting():
        return "Triton kernels need a GPU; on the CPU only its interpreter runs them (TRITON_INTERPRET=1)"
    if device_type == "cuda" and interpreting():
        return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors only"
    if device_type not in ("cpu", "cuda"):
        return f"no Triton kernels for device type {device_type!r}"
    return None


def _reason_against_sm90(device: str) -> str | None:
    """Whether the kernels are there comes first: a machine without a GPU then tells it too."""
    from aadkern._build import load_cuda

    reason = load_cuda()
    if reason is not None:
        return reason
    if not device.startswith("cuda"):
        return "built for sm_90a, and serves GPUs of compute capability 9.0 (H100, H200, H20, GH200) only"
    if not torch.cuda.is_available():
        return "built for sm_90a, and torch sees no CUDA device here"
    if torch.version.hip is not None:
        return "built for sm_90a, and torch here is made for AMD's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability != SM90_CAPABILITY:
        return f"built for sm_90a, and this GPU has compute capability {capability[0]}.{capability[1]}, not 9.0"
    return None


def _reason_against_flash(device: str) -> str | None:
    from aadkern import flash_libraries

    return flash_libraries.reason_against(device)


@dataclass(frozen=True)
class Backend:
    """One way to compute ``aadkern.attention``. ``VERIFIED`` says where it was seen to be right."""

    name: str
    file: str  # of range_attention, which has its kernels by direction: "forward", "backward", "jvp"
    reason_against: Callable[[str], str | None] = lambda device: None  # why it cannot serve tensors on a device; None: it can
    dtypes: tuple[str, ...] = ("float32", "float64", "float16", "bfloat16")
    head_dims: Container[int] | None = None  # None: any
    forward_mode: bool = False  # whether it has a "jvp"
    ordered: bool = False  # whether its backward has an order of sums to choose, and takes ``deterministic``
    after_proof: bool = False  # whether "auto" takes it only once it has an entry in VERIFIED

    def kernel(self, direction: str) -> Callable[..., Any]:
        """Its "forward", "backward" or "jvp", of a file that is imported now."""
        file = importlib.import_module(f"aadkern.range_attention.{self.file.format(direction)}")
        kernel: Callable[..., Any] = getattr(file, direction)
        return kernel

    def is_for(self, dtype: str, head_dim: int) -> bool:
        """Whether "auto" may give it such tensors."""
        fits = dtype in self.dtypes and (self.head_dims is None or head_dim in self.head_dims)
        return fits and (not self.after_proof or bool(VERIFIED[self.name]))


TRITON_DTYPES = ("float32", "float16", "bfloat16")
RECORDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "reference", forward_mode=True),
        Backend("sdpa", "sdpa", forward_mode=True),
        Backend(
            "triton",
            "triton_{}",
            _reason_against_triton,
            dtypes=TRITON_DTYPES,
            head_dims=range(1, TRITON_MAX_HEAD_DIM + 1),
            forward_mode=True,
        ),
        Backend("sm90", "sm90", _reason_against_sm90, SM90_DTYPES, SM90_HEAD_DIMS, ordered=True, after_proof=True),
        Backend("flash", "flash", _reason_against_flash, ordered=True),
    )
}
BACKENDS = tuple(RECORDS)


@functools.cache
def reason_against(backend: str, device: str) -> str | None:
    """None if the backend serves tensors on that device ("cpu"; "cuda", the current one; "cuda:1"), else why not."""
    if backend == "torch":  # of the other operators
        return None
    if backend not in RECORDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    return RECORDS[backend].reason_against(device)


def choose_backend(requested: str, device: str, dtype: str = "float32", head_dim: int = 64, *, forward_mode: bool = False) -> str:
    """The backend that serves such tensors: the requested one or, for "auto", the first of ``PREFERENCE`` that can.

    Raises ValueError, with the reason, where the requested one cannot serve; a named backend never falls back. ``forward_mode``
    asks for one that has it.
    """
    if requested != "auto":
        if forward_mode and requested in RECORDS and not RECORDS[requested].forward_mode:
            served = ", ".join(name for name, backend in RECORDS.items() if backend.forward_mode)
            raise ValueError(f"attention: backend {requested!r} has no forward-mode derivative (torch.func.jvp); {served} have one")
        reason = reason_against(requested, device)
        if reason is not None:
            raise ValueError(f"attention: backend {requested!r} cannot serve tensors on {device!r}: {reason}")
        return requested
    for backend in PREFERENCE.get(device.partition(":")[0], ("reference",)):
        record = RECORDS[backend]
        if (record.forward_mode or not forward_mode) and record.is_for(dtype, head_dim) and reason_against(backend, device) is None:
            return backend
    return "reference"


def decodes_in_loads(requested: str, device: str, dtype: str, head_dim: int) -> bool:
    """Whether attention over keys and values in e4m3 is Triton's kernel that decodes them in its loads; otherwise they are decoded
    first, for what ``choose_backend`` then chooses.

    Raises ValueError, with the reason, where "triton" is asked for and cannot.
    """
    reason = reason_against("triton", device) or _reason_against_e4m3(device)
    if requested == "triton" and reason is not None:
        raise ValueError(f"attention_e4m3: backend 'triton' cannot serve tensors on {device!r}: {reason}")
    wanted = requested == "auto" and device.startswith("cuda") and RECORDS["triton"].is_for(dtype, head_dim)
    return requested == "triton" or (wanted and reason is None)


@functools.cache
def _reason_against_e4m3(device: str) -> str | None:
    if not device.startswith("cuda"):
        return None
    if torch.version.hip is not None:
        return "its conversions of e4m3 are those of NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < E4M3_CAPABILITY:
        return f"it needs compute capability 8.9 or later, and this GPU has {capability[0]}.{capability[1]}"
    return None


def choose_fused_backend(operator: str, requested: str, device_type: str, dtype: str = "float32") -> str:
    """``choose_backend`` for the operators that have ``FUSED_BACKENDS``; Triton's kernels take no float64.

    Raises ValueError, naming ``operator``, where the requested one cannot serve.
    """
    return _fused_backend(operator, requested, device_type, dtype)


@functools.cache  # asked several times in every block: 5 microseconds each of a pass that takes 4 ms
def _fused_backend(operator: str, requested: str, device_type: str, dtype: str) -> str:
    if requested == "auto":
        served = (b for b in FUSED_PREFERENCE.get(device_type, ("torch",)) if reason_against(b, device_type) is None)
        return next(b for b in served if b != "triton" or dtype in TRITON_DTYPES)
    if requested not in FUSED_BACKENDS:
        raise ValueError(f"{operator}: backend must be one of {', '.join(FUSED_BACKENDS)}, or None, got {requested!r}")
    reason = reason_against(requested, device_type)
    if reason is not None:
        raise ValueError(f"{operator}: backend {requested!r} cannot serve tensors on {device_type!r}: {reason}")
    return requested


def backends(device: str | None = None) -> dict[str, str]:
    """Each backend of ``aadkern.attention`` and "available", or the reason why not, on ``device`` (default: cuda if present, else
    cpu).

    "flash" is other people's kernels (FlashAttention 2, 3, 4, xformers), served by name only; FlexAttention is compared against in
    ``benchmarks/``. Raises TypeError for a device that is no name, ValueError for one that there is not.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = str(checks.device(device, "device"))
    return {name: reason_against(name, device) or AVAILABLE for name in BACKENDS}
