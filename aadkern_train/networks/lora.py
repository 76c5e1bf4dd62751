"""LoRA: several networks that learn as small adapters on one frozen one (Hu et al. 2021, arXiv:2106.09685).

    y = W x + b + alpha / r B A x,    A [r, in] at random, B [out, r] zero at first, for each role its own;  no role: W x + b

The generator and the fake score are roles on one base, the teacher is the base alone. Which role computes is said by whoever calls
the base, for that call: ``Acting``, and its recomputation of a block in a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils.checkpoint import checkpoint

from aadkern.wan import CausalWan
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.processes import local, local_part, reshard, whole
from aadkern_train.engine.recipe import LoraSettings
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.folders import ADAPTER

PREFIX = "transformer."  # of diffusers' names for an adapter of a pipeline's transformer


class LoraLinear(nn.Linear):
    """A linear layer with adapters by role, in float32, whatever the layer is kept in. It is made out of an ``nn.Linear``, whose
    names and weights it keeps."""

    base: LoraBase

    def forward(self, x: Tensor) -> Tensor:
        y, role = super().forward(x), self.base.role
        if role is None:
            return y
        down, up = self.lora_A[role].weight, self.lora_B[role].weight
        return y + (self.base.scale * F.linear(F.linear(x.to(down.dtype), down), up)).to(y.dtype)


class LoraBase:
    """A frozen network and its adapters; ``role`` is whose adapters compute now, None for none."""

    def __init__(self, denoiser: Denoiser, settings: LoraSettings, roles: Sequence[str], draws: Draws) -> None:
        """Turns the linear layers that ``settings.targets`` name into ``LoraLinear``. What is frozen already, as no pass runs it,
        gets no adapter. Raises ValueError as ``targets_of`` does."""
        self.denoiser, self.roles, self.scale = denoiser, tuple(roles), settings.alpha / settings.rank
        self.role: str | None = None
        self.layers: dict[str, LoraLinear] = {}
        named = targets_of(denoiser.net, settings.targets)
        denoiser.requires_grad_(False)
        for name, layer in named.items():
            layer.__class__ = LoraLinear
            layer.base = self
            layer.lora_A, layer.lora_B = nn.ModuleDict(), nn.ModuleDict()
            for role in self.roles:
                down = nn.Linear(layer.in_features, settings.rank, bias=False, device="cpu")
                up = nn.Linear(settings.rank, layer.out_features, bias=False, device="cpu")
                with torch.no_grad():  # the bound of nn.Linear's own weights, as in peft
                    drawn = draws.uniform(f"{role} {name}", [0], down.weight.shape)[0]
                    down.weight.copy_((2 * drawn - 1) * layer.in_features**-0.5)
                    up.weight.zero_()
                layer.lora_A[role], layer.lora_B[role] = down, up
            self.layers[name] = layer

    @contextmanager
    def acting(self, role: str | None) -> Iterator[None]:
        """Within, the base computes as this role."""
        before, self.role = self.role, role
        try:
            yield
        finally:
            self.role = before

    def view(self, role: str | None) -> AdaptedDenoiser:
        """The base as one role, whose parameters are that role's adapters; None: the base alone, with none."""
        return AdaptedDenoiser(self, role)

    def recomputed(self, block: nn.Module, *arguments: Any) -> Any:
        """A block whose backward computes it anew, as the role that computes now: then another's turn may have come."""
        return checkpoint(partial(self._as, self.role, block), *arguments, use_reentrant=False)

    def _as(self, role: str | None, block: Callable[..., Any], *arguments: Any) -> Any:
        with self.acting(role):
            return block(*arguments)


class Acting(nn.Module):
    """The base's network under one role: called as it is, and with what else it has."""

    def __init__(self, base: LoraBase, role: str | None) -> None:
        super().__init__()
        self.base, self.role, self.whole = base, role, base.denoiser.net

    def forward(self, *arguments: Any, **options: Any) -> Any:
        with self.base.acting(self.role):
            return self.whole(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("whole"), name)


class AdaptedDenoiser(Denoiser):
    """A denoiser of one role. Its parameters are that role's adapters by their layers: "blocks.0.attn1.to_q.lora_A.weight"."""

    def __init__(self, base: LoraBase, role: str | None) -> None:
        super().__init__(Acting(base, role), base.denoiser.predicts)  # type: ignore[arg-type]
        self.base, self.role = base, role

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        if self.role is None or not recurse:
            return
        for name, layer in self.base.layers.items():
            yield f"{prefix}{name}.lora_A.weight", layer.lora_A[self.role].weight
            yield f"{prefix}{name}.lora_B.weight", layer.lora_B[self.role].weight

    @property
    def saved(self) -> Adapter:
        """What a checkpoint keeps of it."""
        return Adapter(self)

    def tensors(self) -> dict[str, Tensor]:
        """The adapters, whole, on the CPU, in diffusers' names: the B times alpha / r, so that readers who know of no alpha read
        them right. Every rank calls it."""
        reshard(self)
        scale = {"lora_A": 1.0, "lora_B": self.base.scale}
        scaled = ((name, whole(p.detach()) * scale[name.split(".")[-2]]) for name, p in self.named_parameters())
        return {PREFIX + name: tensor.cpu() for name, tensor in scaled}

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of an ordinary network that computes the same, W + alpha / r B A in float32, one after another."""
        reshard(self)
        own = {name: parameter.detach() for name, parameter in self.named_parameters()}
        for name, tensor in get_model_state_dict(self.net.whole).items():
            if ".lora_A." in name or ".lora_B." in name:
                continue
            weight, layer = whole(tensor.detach()).float(), name.removesuffix(".weight")
            if layer != name and layer in self.base.layers:
                weight = weight + self.base.scale * whole(own[f"{layer}.lora_B.weight"]) @ whole(own[f"{layer}.lora_A.weight"])
            yield name, weight

    @torch.no_grad()
    def fill(self, path: Path, setting: str) -> None:
        """Reads the adapters of an earlier stage's weights. Raises ValueError, naming ``setting``, where they are none of this
        shape."""
        reshard(self)
        try:
            stored = load_file(path / ADAPTER)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{setting} must be a stage that trained adapters, {path / ADAPTER} cannot be read: {error}") from None
        parameters = {PREFIX + name: parameter for name, parameter in self.named_parameters()}
        shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        if shapes != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
            raise ValueError(f"{setting} must be a stage with adapters of this rank and these targets, {path / ADAPTER} has others")
        for name, parameter in parameters.items():
            full = stored[name] / self.base.scale if ".lora_B." in name else stored[name]
            local(parameter).copy_(local_part(full.to(parameter.device), parameter))


class Adapter:
    """The adapters of a view, as checkpoints take what is no module."""

    def __init__(self, view: AdaptedDenoiser) -> None:
        self.view = view

    def state_dict(self) -> dict[str, Any]:
        reshard(self.view)
        return {name: parameter.detach() for name, parameter in self.view.named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def targets_of(net: CausalWan, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers of the blocks whose name is, or ends in a dot and, one of ``targets``, and which a pass runs.

    Raises ValueError for a target that names none.
    """
    layers = {n: m for n, m in net.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)}
    named = {target: [n for n in layers if n.endswith(f".{target}")] for target in targets}
    none = [target for target, names in named.items() if not names]
    if none:
        there = sorted({".".join(name.split(".")[2:]) for name in layers})
        raise ValueError(f"models.lora.targets must name linear layers of a block ({', '.join(there)}), got {none[0]!r}")
    chosen = {name for names in named.values() for name in names}
    return {name: layer for name, layer in layers.items() if name in chosen and layer.weight.requires_grad}
