"""What the installation built, as ``setup.py`` wrote it into ``_built.json``, and the loading of its CUDA kernels; run as a script
it prints both."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

NOT_INSTALLED = "these are sources that were not installed (`pip install .` builds what the machine allows)"


def build_info() -> dict[str, Any] | None:
    """Facts fixed at build time, or None where the sources were never installed.

    Keys: version (of the sources that were built), cuda_architectures (tuple of str, empty where no CUDA kernel was built), no_cuda
    (why none was built, or None), cuda_compiler and compiler (the two that built them, or None: none found or not looked for).
    """
    try:
        facts: dict[str, str] = json.loads(Path(__file__).with_name("_built.json").read_text())
    except FileNotFoundError:
        return None
    architectures = tuple(filter(None, facts.get("cuda_architectures", "").split(";")))
    texts = {name: facts.get(name) or None for name in ("no_cuda", "cuda_compiler", "compiler")}
    return {"version": facts["version"], "cuda_architectures": architectures, **texts}


def cuda_library() -> Path | None:
    """The file of the CUDA kernels, if it was built."""
    return next(Path(__file__).parent.glob("_C.*so"), None)


@functools.cache
def load_cuda() -> str | None:
    """Load the CUDA kernels into torch, at the first call only. None: they are there; else why not.

    Loading needs no GPU, but runs none of the kernels either.
    """
    file, info = cuda_library(), build_info()
    if file is None:
        return f"not built: {_why_no_cuda(info)}"
    if info is not None and not info["cuda_architectures"]:
        return f"not built: {_why_no_cuda(info)} ({file} is left from another build and not loaded; delete it or install again)"
    import torch

    try:
        torch.ops.load_library(str(file))
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error.__cause__ or error).partition("\n")[0]  # the others are torch's stack
        return f"built for sm_90a, cannot load into torch {torch.__version__}: {first_line}"
    return None


def _why_no_cuda(info: dict[str, Any] | None) -> str:
    if info is None:
        return NOT_INSTALLED
    if info["cuda_architectures"]:
        return f"they were built, but {Path(__file__).parent} holds no _C library now; install it again"
    return info.get("no_cuda") or f"what is installed is of version {info['version']} before it had CUDA kernels; install it again"


def shadowing() -> str | None:
    """Where this package was imported from and where it is installed, in one line, if these are two places; else None.

    So it is where a folder named aadkern in the current directory, or on PYTHONPATH, stands before the installed one.
    """
    here = Path(__file__).resolve().parent
    installed = _installed()
    if installed is None or installed == here:
        return None
    return f"aadkern is imported from {here}, and what is installed is {installed}: the folder of that name found first is used"


def _installed() -> Path | None:
    """The folder of the installed package, a checkout's where it is installed as editable; None if it is not installed."""
    places = []
    for distribution in importlib.metadata.distributions(name="aadkern"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            places.append(Path(url2pathname(urlparse(origin["url"]).path)) / "aadkern")
        else:
            places.append(Path(str(distribution.locate_file("aadkern"))))
    folders = [place.resolve() for place in places if (place / "__init__.py").is_file()]
    here = Path(__file__).resolve().parent
    return here if here in folders else next(iter(folders), None)


def describe() -> str:
    """The same in one line, and a warning where another copy of the package is installed than this.

    Of the CUDA kernels it says what ``load_cuda`` says, and so what ``aadkern.backends`` does.
    """
    info, reason, elsewhere = build_info(), load_cuda(), shadowing()
    if info is None:
        line = f"WARNING: {NOT_INSTALLED}; CUDA kernels: {reason or 'loaded'}"
    else:
        by = " and ".join(filter(None, (info["cuda_compiler"], info["compiler"]))) or "none"
        kernels = ", ".join(f"sm_{architecture.replace('.', '')}" for architecture in info["cuda_architectures"])
        line = f"aadkern {info['version']}; CUDA compiler: {by}; CUDA kernels: " + (
            kernels if reason is None else f"WARNING: {reason}"
        )
    return line if elsewhere is None else f"{line}; WARNING: {elsewhere}"


if __name__ == "__main__":
    print(describe())
