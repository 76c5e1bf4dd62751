"""Saving while training goes on: the state is copied to host memory at its step, and a thread writes the copy.

torch's own ``dcp.async_save`` (2.13) copies and writes likewise, but what makes a checkpoint count, its name and `latest`, must
follow in the same thread, and its copies leave 0-dimensional DTensors as they are; so the thread is ours and what it calls is
``dcp.save``.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from aadkern_train.engine.processes import Processes, local

NOISE = ".*(single process|TypedStorage).*"
"""Of DCP's warnings, those that mean nothing here."""
Write = Callable[[dict[str, Tensor], dist.ProcessGroup | None], None]


class Background:
    """One save at a time. Several ranks write in a gloo group of their own, so that their collectives do not meet training's."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.group = dist.new_group(backend="gloo") if processes.size > 1 else None
        self._held: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        warnings.filterwarnings("ignore", message=NOISE)

    def begin(self, tensors: Mapping[str, Tensor], write: Write, commit: Callable[[], None]) -> None:
        """Copies the tensors, then lets the thread ``write`` the copy and, on the main rank, ``commit`` it: there DCP has written
        when all ranks have."""
        held = self._copied(tensors)

        def write_and_commit() -> None:
            try:
                write(held, self.group)
                if self.processes.is_main:
                    commit()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write_and_commit, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way, if any, has ended; every rank raises where it failed on one."""
        if self._thread is None:
            return
        self.settle()
        error, self._error = self._error, None

        def result() -> None:
            if error is not None:
                raise error

        self.processes.on_main(result)  # where one rank cannot write, DCP fails on all of them
        result()

    def settle(self) -> None:
        """The same, but asks no other rank and raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of each tensor this rank's part in host memory, pinned where it comes from a GPU, in the same memory every time."""
        for name, tensor in tensors.items():
            held = self._held.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                self._held[name] = _host(tensor)
            else:
                local(held).copy_(local(tensor), non_blocking=True)
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        return {name: self._held[name] for name in tensors}


def _host(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    part = local(copied)
    if local(tensor).device.type == "cuda" and part.numel():
        if part is copied:
            return part.pin_memory()
        copied._local_tensor = part.pin_memory()  # type: ignore[attr-defined]  # as torch's own staging does (2.13)
    return copied
