"""The torch operators of "sm90" over the host model in the device's place."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from aadkern import runtime
from aadkern.range_attention import sm90
from tests.sm90 import hopper_host

TORCH = Path(torch.__file__).parent


def operators() -> Path:
    """The torch operators over the host model, and its kernels, as one loaded library."""
    kernels = [hopper_host.build(name)._name for name in ("forward", "backward")]
    source, launches = hopper_host.SOURCES / "bindings.cpp", hopper_host.SOURCES / "model_entries" / "launches.cpp"
    key = hopper_host.digest(source.read_text(), launches.read_text(), kernels, torch.__version__)
    flags = [*hopper_host.FLAGS, "-O1", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{hopper_host.SOURCES}"]
    torch_flags = ["-isystem", str(TORCH / "include"), *(str(TORCH / "lib" / name) for name in ("libtorch.so", "libtorch_cpu.so"))]
    command = [hopper_host.compiler(), *flags, "-shared", str(source), str(launches), *torch_flags, *kernels, "-Wl,-z,defs"]
    return hopper_host.compile_to(hopper_host.BUILD / f"operators-{key}.so", command)


@pytest.fixture(scope="module")
def schedule():
    """Host model instead of device; its Options, which say how launches are scheduled."""
    library = operators()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime.RECORDS, "sm90", replace(runtime.RECORDS["sm90"], reason_against=lambda device: None))
        patch.setattr(sm90, "check_device", lambda q: None)
        runtime.reason_against.cache_clear()
        torch.ops.load_library(str(library))
        yield hopper_host.Options.in_dll(ctypes.CDLL(str(library)), "schedule")
    runtime.reason_against.cache_clear()
