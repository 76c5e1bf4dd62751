"""One video from several processes: torchrun starts them, each holds a slice of every frame's tokens, the main one writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import torch.distributed as dist

from aadkern import SequenceGroup
from aadkern_train.engine.processes import Processes


@contextmanager
def sequence_of(processes: Processes, tokens_per_frame: int) -> Iterator[SequenceGroup | None]:
    """The group of all processes, or None for one. Meanwhile what the others say on stderr is dropped, as the main one says it.

    Raises ValueError where a frame has fewer tokens than there are processes.
    """
    if processes.size == 1:
        yield None
        return
    with Path(os.devnull).open("w") as nowhere, nullcontext() if processes.is_main else redirect_stderr(nowhere):
        yield SequenceGroup(dist.group.WORLD, tokens_per_frame)
