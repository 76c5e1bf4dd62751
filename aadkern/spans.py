"""Named spans of time for Nsight Systems (NVTX ranges) around operators and training phases; off unless asked for.

``AADKERN_NVTX=1`` in the environment, or ``spans.enable()``, turns them on: through the ``nvtx`` package, in a domain of its own
("aadkern"), or, where that is not installed, through torch's CUDA build. While off, ``span`` hands out one shared empty context:
0.2 microseconds per operator call (2-core x86, Python 3.11).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_OFF: AbstractContextManager[Any] = nullcontext()
_open: Callable[[str], AbstractContextManager[Any]] | None = None


def span(name: str) -> AbstractContextManager[Any]:
    """A context that marks what runs inside it as ``name``, if spans are enabled."""
    return _OFF if _open is None else _open(name)


def spanned(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: every call runs inside ``span(name)``."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def inside(*args: P.args, **kwargs: P.kwargs) -> T:
            with span(name):
                return function(*args, **kwargs)

        return inside

    return decorate


def enable(on: bool = True) -> None:
    """Turn spans on or off for this process. RuntimeError where neither the nvtx package nor a CUDA build of torch is there."""
    global _open
    _open = _opener() if on else None


@contextmanager
def opened_by(opener: Callable[[str], AbstractContextManager[Any]]) -> Iterator[None]:
    """Within, ``opener(name)`` is every span's context: to count by spans what happens in them."""
    global _open
    before, _open = _open, opener
    try:
        yield
    finally:
        _open = before


def _opener() -> Callable[[str], AbstractContextManager[Any]]:
    if importlib.util.find_spec("nvtx") is not None:
        import nvtx

        return lambda name: nvtx.annotate(name, domain="aadkern")
    import torch

    if torch.version.cuda is None:
        raise RuntimeError("NVTX spans need the nvtx package (pip install nvtx) or a CUDA build of torch; neither is installed")
    return torch.cuda.nvtx.range


if os.environ.get("AADKERN_NVTX", "0") == "1":
    enable()
