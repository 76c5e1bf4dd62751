"""Bytes of the tensors that are alive, by their storages: what a step holds at its fullest, whether or not they have memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REST = "outside of spans"
READ = torch.ops.aten._local_scalar_dense.default


class Live(TorchDispatchMode):
    """Counts the storages that operators return, ``now`` and in ``peaks`` at their peak in each outermost span of
    ``aadkern.spans``, until nothing holds them.

    Enter it within FakeTensorMode. A number that is read off a tensor (``item``) is 0 or 1.0, since such tensors have none: nothing
    may depend on it. FSDP2 frees what it gathered by ``UntypedStorage.resize_(0)``, of which no operator tells, so that is watched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self._span: str | None = None
        self._sizes: dict[int, int] = {}

    def see(self, tensor: Tensor) -> None:
        """Counts a tensor that was there before."""
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = 0
            weakref.finalize(storage, self._gone, key)
        self._sized(key, storage.nbytes())

    def _sized(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        place = self._span or REST
        self.peaks[place] = max(self.peaks.get(place, 0), self.now)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """What ``aadkern.spans.opened_by`` takes."""
        outermost = self._span is None
        self._span = name if outermost else self._span
        try:
            yield
        finally:
            self._span = None if outermost else self._span

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is READ:
            return 1.0 if args[0].is_floating_point() else 0
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def __enter__(self) -> Live:
        self._resize: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            out = self._resize(storage, size)
            if storage._cdata in self._sizes:
                self._sized(storage._cdata, int(size))
            return out

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *raised: Any) -> Any:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        return super().__exit__(*raised)
