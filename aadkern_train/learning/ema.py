"""Exponential moving average of a module's weights, kept in fp32 on each rank's own shards.

shadow <- d * shadow + (1 - d) * weight,   d = decay, or min(decay, (1 + n) / (10 + n)) after n updates with warmup
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from aadkern_train.engine.processes import local, reshard


class Ema:
    """The average of the trainable parameters of a module; build it after `shard`, so that it is sharded alike.

    `state_dict` holds DTensors for a sharded module, so a checkpoint of it resumes on any number of processes.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = False) -> None:
        """decay in [0, 1); raises ValueError otherwise."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        reshard(module)
        self.decay = decay
        self.warmup = warmup
        self.count = 0
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.shadows: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights as they are now; call it after the optimiser's step."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.warmup else self.decay
        weights = [local(p).float() for p in self._weights.values()]
        torch._foreach_lerp_([local(shadow) for shadow in self.shadows.values()], weights, 1 - decay)
        self.count += 1

    @contextlib.contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """The module computes with the average inside the block and has its own weights back, bit for bit, afterwards.

        module: the one averaged, or one of the same parameter names, shapes and sharding (else ValueError).
        """
        reshard(module)
        weights = {name: p for name, p in module.named_parameters() if name in self.shadows}
        unlike = [n for n, s in self.shadows.items() if n not in weights or local(weights[n]).shape != local(s).shape]
        if unlike:
            raise ValueError(f"module does not have the averaged parameters, or has them in other shapes: {unlike[:4]}")
        own = {name: local(p).detach().clone() for name, p in weights.items()}
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    local(weight).copy_(local(self.shadows[name]))
            yield
        finally:
            reshard(module)
            with torch.no_grad():
                for name, weight in weights.items():
                    local(weight).copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        return {"shadows": dict(self.shadows), "count": self.count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state["shadows"]) != set(self.shadows):
            odd = sorted(set(state["shadows"]) ^ set(self.shadows))
            raise ValueError(f"the saved average and the module differ in parameters: {odd[:4]}")
        for name, shadow in self.shadows.items():
            shadow.copy_(state["shadows"][name])
        self.count = int(state["count"])
