"""Which backend serves an operator on which device, and why the others do not. The one place that decides."""

from __future__ import annotations

import functools
import importlib.util
import os

BACKENDS = ("reference", "sdpa", "triton", "sm90")
AVAILABLE = "available"

# Best first. Triton serves CPU tensors only under its interpreter, which is for tests, so it is never picked there.
PREFERENCE = {"cpu": ("sdpa", "reference"), "cuda": ("triton", "sdpa", "reference")}

# The other operators: their meaning in plain torch, the fast form of it in torch's own operations, fused kernels.
FUSED_BACKENDS = ("reference", "torch", "triton")
FUSED_PREFERENCE = {"cpu": ("torch",), "cuda": ("triton", "torch")}

TRITON_MAX_HEAD_DIM = 256

# Where each backend's tests have passed; a GPU entry names its file under benchmarks/results.
VERIFIED = {"reference": ("cpu",), "sdpa": ("cpu",), "triton": ("the CPU interpreter",), "sm90": ()}


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1, set before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def reason_against(backend: str, device_type: str) -> str | None:
    """None if the backend serves tensors on that kind of device, else why not."""
    if backend in ("reference", "sdpa", "torch"):
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device_type == "cpu" and not interpreting():
            return "Triton kernels need a GPU; on the CPU only its interpreter runs them (TRITON_INTERPRET=1)"
        if device_type == "cuda" and interpreting():
            return "TRITON_INTERPRET=1 is set, and the interpreter takes CPU tensors only"
        if device_type not in ("cpu", "cuda"):
            return f"no Triton kernels for device type {device_type!r}"
        return None
    if backend == "sm90":
        return "this version has no sm_90a kernels yet"
    raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def choose_backend(requested: str, device_type: str, dtype: str = "float32", head_dim: int = 64) -> str:
    """The backend that serves such tensors: the requested one or, for "auto", the first of ``PREFERENCE`` that can.

    Raises ValueError, with the reason, where the requested one cannot serve; a named backend never falls back.
    """
    beyond_triton = dtype == "float64" or head_dim > TRITON_MAX_HEAD_DIM
    if requested != "auto":
        reason = reason_against(requested, device_type)
        if reason is not None:
            raise ValueError(f"attention: backend {requested!r} cannot serve tensors on {device_type!r}: {reason}")
        return requested
    for backend in PREFERENCE.get(device_type, ("reference",)):
        if reason_against(backend, device_type) is None and not (backend == "triton" and beyond_triton):
            return backend
    return "reference"


def choose_fused_backend(operator: str, requested: str, device_type: str, dtype: str = "float32") -> str:
    """``choose_backend`` for the operators that have ``FUSED_BACKENDS``; Triton's kernels take no float64.

    Raises ValueError, naming ``operator``, where the requested one cannot serve.
    """
    if requested == "auto":
        served = (b for b in FUSED_PREFERENCE.get(device_type, ("torch",)) if reason_against(b, device_type) is None)
        return next(b for b in served if not (b == "triton" and dtype == "float64"))
    if requested not in FUSED_BACKENDS:
        raise ValueError(f"{operator}: backend must be one of {', '.join(FUSED_BACKENDS)}, or None, got {requested!r}")
    reason = reason_against(requested, device_type)
    if reason is not None:
        raise ValueError(f"{operator}: backend {requested!r} cannot serve tensors on {device_type!r}: {reason}")
    return requested


def backends(device: str | None = None) -> dict[str, str]:
    """Each backend of ``aadkern.attention`` and "available", or the reason why not, on ``device`` (default: cuda if present, else
    cpu).

    FlexAttention and FlashAttention are compared against in ``benchmarks/``; they are not backends.
    """
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    return {name: reason_against(name, kind) or AVAILABLE for name in BACKENDS}
