"""For tests of sharded training: a small network with blocks, its inputs, and running a file in several processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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


def run_processes(script: str, *arguments: str, count: int = 2, timeout: float = 120) -> None:
    """Runs a Python file in `count` processes that find one another as under torchrun; fails if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
