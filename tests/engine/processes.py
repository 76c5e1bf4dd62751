"""How tests start processes and how much these may write; and for sharded training a small network with blocks, and its inputs."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

BATCH, CHUNKS = 4, 3


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.table = nn.Parameter(torch.randn(1, 2, width) / 4)  # one row: a shard of two is empty

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) * (1 + self.table[:, 0])) + 0)) + self.table[:, 1]


class Net(nn.Module):
    """A chunk [B, 3] and what it remembers of earlier ones [B, 3] -> the next chunk [B, 3]."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.enter = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.leave = nn.Linear(width, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        h = self.enter(torch.cat([x, memory], -1))
        for block in self.blocks:
            h = block(h)
        return self.leave(h) * 1.0


def inputs(step: int) -> torch.Tensor:
    return torch.randn(BATCH, CHUNKS, 3, generator=torch.Generator().manual_seed(step))


def environment(**more: str) -> dict[str, str]:
    """This process's variables for one that it starts: it imports this repository, and takes one core."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", **more}


def run_processes(script: str, *arguments: str, count: int = 2, timeout: float = 300) -> None:
    """Runs a Python file in `count` processes that find one another as under torchrun.

    When one fails or the time is over, all end, and the AssertionError holds what they printed and where they were.
    """
    shared = environment(PYTHONFAULTHANDLER="1", WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as files:
        processes, outputs = [], [Path(folder) / f"rank{rank}" for rank in range(count)]
        for rank, output in enumerate(outputs):
            own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command, out = [sys.executable, script, *arguments], files.enter_context(output.open("w"))
            processes.append(subprocess.Popen(command, env=own, stdout=out, stderr=subprocess.STDOUT))
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):
                time.sleep(2)  # the others may fail for the same reason
                break
            time.sleep(0.05)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # the fault handler then prints where it was
        codes = [process.wait() for process in processes]
        assert not any(codes), "\n".join(f"exit {code}:\n{out.read_text()}" for code, out in zip(codes, outputs, strict=True))


def free_port() -> int:
    """A port below those that outgoing connections are given, so that none takes it before the processes do."""
    while True:
        port = random.SystemRandom().randrange(15000, 30000)
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def files_up_to(limit: int) -> Iterator[None]:
    """What a full disk does, by the kernel: a file cannot grow beyond ``limit`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
