"""What a CUDA graph does, on any device: the operations of a run, recorded with their tensors and run again on the same ones.

Everything that was a Python number while recording stays as it was, as in a CUDA graph; only what lies in tensors can change.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# A number read back, or a tensor made from Python's numbers: a CUDA graph cannot capture the one and the other needs a copy.
UNCAPTURABLE = ("_local_scalar_dense", "lift_fresh")


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in UNCAPTURABLE), f"{func} in a graph"
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.calls.append((func, args, kwargs or {}, out))
        return out


class OpRecorder:
    """``record(run, device) -> (result, replay)``, as ``aadkern.streaming.graphs.CudaRecorder``; counts what it did."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run, device):
        with _Recording() as recording:
            result = run()
        self.recorded += 1
        # A CUDA graph is not run while it is captured: only a replay may give the result.
        for _, args, kwargs, outs in recording.calls:
            for out in _fresh(args, kwargs, outs):
                out.fill_(float("nan") if out.is_floating_point() or out.is_complex() else 99)
        return result, lambda: self._replay(recording.calls)

    @torch.no_grad()
    def _replay(self, calls) -> None:
        self.replayed += 1
        for func, args, kwargs, outs in calls:
            again = tree_leaves(func(*args, **kwargs))
            if "_c10d_functional" in str(func):  # what is still on its way cannot be copied
                again = [torch.ops._c10d_functional.wait_tensor(new) for new in again]
            fresh = {id(out) for out in _fresh(args, kwargs, outs)}
            for old, new in zip(tree_leaves(outs), again, strict=True):
                if id(old) in fresh:
                    old.copy_(new)


def _fresh(args, kwargs, outs) -> list[Tensor]:
    """The results that lie in memory of their own."""
    given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    return [out for out in tree_leaves(outs) if out.untyped_storage().data_ptr() not in given]
