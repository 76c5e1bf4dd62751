"""What the installation built, as told by the optional module ``aadkern._host``, and the loading of its CUDA kernels; run as a
script it prints both."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

NOT_BUILT = (
    "aadkern._host is not built: there was no working C++ compiler when aadkern was installed. Only these build facts "
    "need it. To build it: install a C++17 compiler, then `pip install -v .`"
)


def build_info() -> dict[str, Any] | None:
    """Facts fixed at build time, or None where the host module was not built (``NOT_BUILT`` says what that means).

    Keys: version (of the sources that were built), compiler, cxx_standard (int), build_type, cuda_compiler (str, or
    None: none found or not looked for), cuda_architectures (tuple of str, empty where no CUDA kernel was built), no_cuda
    (why none was built, or None).
    """
    try:
        host = importlib.import_module("aadkern._host")
    except ImportError:
        return None
    info: dict[str, Any] = host.build_info()
    return info


def cuda_library() -> Path | None:
    """The file of the CUDA kernels, if it was built."""
    return next(Path(__file__).parent.glob("_C.*so"), None)


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA kernels into torch, at the first call only. None: they are there; else why not.

    Loading needs no GPU, but runs none of the kernels either.
    """
    file = cuda_library()
    if file is None:
        return f"not built: {_why_no_cuda(build_info())}"
    import torch

    from aadkern import ops  # noqa: F401  the schemas that the library implements

    try:
        torch.ops.load_library(str(file))
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error.__cause__ or error).partition("\n")[0]  # the others are torch's stack
        return f"built for sm_90a, cannot load into torch {torch.__version__}: {first_line}"
    return None


def _why_no_cuda(info: dict[str, Any] | None) -> str:
    if info is None:
        return "there was no working C++ compiler when aadkern was installed"
    return info.get("no_cuda") or f"what is installed is of version {info['version']} before it had CUDA kernels; install it again"


def describe() -> str:
    """The same in one line."""
    info = build_info()
    if info is None:
        return f"WARNING: {NOT_BUILT}"
    kernels = ", ".join(f"sm_{architecture.replace('.', '')}" for architecture in info["cuda_architectures"])
    return (
        f"aadkern {info['version']}: host module by {info['compiler']}, C++{info['cxx_standard']}, "
        f"{info['build_type']}; CUDA compiler: {info['cuda_compiler'] or 'none'}; CUDA kernels: "
        + (kernels or f"WARNING: not built: {_why_no_cuda(info)}")
    )


if __name__ == "__main__":
    print(describe())
