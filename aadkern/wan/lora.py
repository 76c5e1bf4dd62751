"""LoRA on a CausalWan: added into its weights in place, changed and taken out again while it streams.

    W = W0 + sum over files of weight * alpha / rank * B A        W0 is kept, the sum is made in float32 and rounded once

A pass costs what it did, and reads its weights where they were: CUDA graphs, compiled blocks and ranks that share tokens go on as
they are. What was made of the weights before stays as it was made, but a ``StreamingGenerator`` makes its text anew by itself:
the model's ``weights_version`` counts changes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary, ref

import torch

from aadkern.checks import real, shown
from aadkern.fp8 import Fp8Linear
from aadkern.wan.lora_file import Term, read_lora
from aadkern.wan.model import CausalWan


class Lora:
    """One file's part in a model's weights: ``weight`` may be set at any time between passes; 0 is as if it were not there."""

    def __init__(self, stack: _Stack, name: str, terms: dict[str, list[Term]], weight: float) -> None:
        self.name, self.terms = name, terms
        self._stack: _Stack | None = stack
        self._weight, self._merged = weight, True

    @property
    def weight(self) -> float:
        return self._weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._held().change(self, real(value, "weight"), self._merged)

    @property
    def merged(self) -> bool:
        """Whether it is in the model's weights now."""
        return self._merged

    def merge(self) -> None:
        """Into the weights, again."""
        self._held().change(self, self._weight, True)

    def unmerge(self) -> None:
        """Out of the weights, which are then those of the other files alone; of none, the model's own to the bit."""
        self._held().change(self, self._weight, False)

    def remove(self) -> None:
        """Out of the weights for good; what was kept for it is freed."""
        stack = self._held()
        self.unmerge()
        self._stack = None
        stack.drop(self)

    def _held(self) -> _Stack:
        if self._stack is None:
            raise ValueError(f"lora must be held by its model, {self.name!r} was removed or settled")
        return self._stack

    def __repr__(self) -> str:
        return f"Lora({self.name!r}, weight={self._weight:g}, {len(self.terms)} parameters, merged={self._merged})"


class _Stack:
    """A model's files, and the parameters that they touch as these were before."""

    def __init__(self, model: CausalWan) -> None:
        self.model = ref(model)
        self.loras: dict[str, Lora] = {}
        self.originals: dict[str, torch.Tensor] = {}
        self.versions: dict[str, int] = {}

    def change(self, lora: Lora, weight: float, merged: bool) -> None:
        """Gives a file this weight, in the model's weights or out of them, or leaves all as it is and raises."""
        before = lora._weight, lora._merged
        if before == (weight, merged):
            return
        parameters = self._parameters(lora)
        lora._weight, lora._merged = weight, merged

        def back() -> None:
            lora._weight, lora._merged = before

        self.write(parameters, back)

    def add(self, lora: Lora) -> None:
        parameters = self._parameters(lora)
        self.originals |= {n: p.detach().clone() for n, p in parameters.items() if n not in self.originals}
        self.loras[lora.name] = lora
        self.write(parameters, lambda: self.loras.pop(lora.name))

    def drop(self, lora: Lora) -> None:
        del self.loras[lora.name]
        self._forget()

    def _forget(self) -> None:
        touched = {name for lora in self.loras.values() for name in lora.terms}
        for held in (self.originals, self.versions):
            for name in held.keys() - touched:
                del held[name]  # type: ignore[attr-defined]

    def _parameters(self, lora: Lora) -> dict[str, torch.nn.Parameter]:
        """What a file touches, checked to be as it was left."""
        model = self.model()
        if model is None:
            raise ValueError("lora must be held by its model, which is gone")
        _check_model(model)
        there = dict(model.named_parameters())
        parameters = {name: there[name] for name in lora.terms}
        for name, parameter in parameters.items():
            kept = self.originals.get(name)
            if kept is not None and (parameter._version != self.versions[name] or parameter.dtype != kept.dtype):
                raise ValueError(
                    f"model must hold the weights that LoRA left there, {name} was changed since: remove() comes before that"
                )
        return parameters

    @torch.no_grad()
    def write(self, parameters: dict[str, torch.nn.Parameter], back: Callable[[], object]) -> None:
        """Makes these parameters anew. On an error, calls ``back``, makes them as they were before and raises it on."""
        self.model().weights_version += 1  # type: ignore[union-attr]
        try:
            for name, parameter in parameters.items():
                self._write(name, parameter)
        except BaseException:
            back()
            for name, parameter in parameters.items():
                self._write(name, parameter)
            self._forget()
            raise

    def _write(self, name: str, parameter: torch.nn.Parameter) -> None:
        kept = self.originals[name] = self.originals[name].to(parameter.device)
        acting = [(x._weight, term) for x in self.loras.values() if x._merged and x._weight for term in x.terms.get(name, ())]
        value = kept
        if acting:
            wide = kept.to(torch.promote_types(kept.dtype, torch.float32), copy=True)
            for weight, term in acting:
                wide += weight * term.of(wide)
            value = wide.to(kept.dtype)
            if not bool(value.isfinite().all()):
                raise ValueError(f"weight must keep the model's weights within {kept.dtype}, {name} goes beyond it")
        parameter.copy_(value)
        self.versions[name] = parameter._version


_STACKS: WeakKeyDictionary[CausalWan, _Stack] = WeakKeyDictionary()


def load(model: CausalWan, path: str | os.PathLike[str], weight: float = 1.0, name: str | None = None) -> Lora:
    """Add a LoRA file to a model's weights, in place, and return its handle; several act together.

    ``path`` is ``read_lora``'s; ``name`` tells files apart, None is the file's. Each touched parameter is kept as it was, on its
    device, until ``remove`` or ``settle``: the whole of a model's linear layers again, for most files. The file may go.

    Raises ValueError, FileNotFoundError or TypeError, having changed nothing, for what ``read_lora`` refuses, a name that is taken,
    a weight that is not finite or takes the sum beyond the dtype, and a model that is quantised (load first, then
    ``aadkern.wan.fp8.quantise``), sharded by FSDP or on "meta".
    """
    _check_model(model)
    weight = real(weight, "weight")
    if name is not None and (not isinstance(name, str) or not name):
        raise TypeError(f"name must be a word or None, got {shown(name)}")
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    device = next(model.parameters()).device
    terms = {n: [term.copied(device) for term in added] for n, added in read_lora(path, shapes).items()}
    stack = _STACKS.get(model) or _Stack(model)
    name = name or Path(path).stem
    if name in stack.loras:
        raise ValueError(f"name must be new, {name!r} is on the model already: remove() it, or give this one another")
    lora = Lora(stack, name, terms, weight)
    stack.add(lora)
    _STACKS[model] = stack
    return lora


def loaded(model: CausalWan) -> dict[str, Lora]:
    """The handles of a model's files by name, in the order of loading."""
    return dict(_STACKS[model].loras) if model in _STACKS else {}


def settle(model: CausalWan) -> None:
    """Leave the weights as they are for good, and free what was kept: the handles end, and the model can be quantised."""
    for lora in loaded(model).values():
        lora._stack = None
    _STACKS.pop(model, None)


def _check_model(model: CausalWan) -> None:
    if not isinstance(model, CausalWan):
        raise TypeError(f"model must be a CausalWan, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            raise ValueError(f"model must not be quantised, {name} is in FP8: load LoRA first, settle(model), then quantise")
    if model._is_sharded():
        raise ValueError("model must be whole to take LoRA, and FSDP holds it")
    odd = next((n for n, p in model.named_parameters() if p.is_meta or p.is_inference() or not p.is_floating_point()), None)
    if odd is not None:
        raise ValueError(f"model must hold ordinary weights, {odd} is on meta, an inference tensor or no floating point")
