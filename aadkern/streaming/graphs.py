"""Passes of a stream replayed from CUDA graphs: one for each kind of pass, such as each phase of the ring, captured once.

What a pass does to the ring repeats with a short period, at the same addresses. What does not repeat are numbers: latents, noise
levels, text, rotary tables, the turns of the sink. They are copied into tensors that stay, and the graph reads them there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadkern.streaming.passes import RingPass

# A stream of equal chunks has a few kinds. One of ever new lengths would not end: what comes after so many runs without a graph.
MOST_GRAPHS, MOST_KINDS = 64, 4096

Recorded = tuple[Any, Callable[[], None]]
"""What the run returned, and what runs it again: with the same tensors, into the same result."""


class PassInputs(NamedTuple):
    """The arguments of one pass: tensors, or tuples and dataclasses of tensors."""

    x: Tensor
    timestep: Any
    text: Any
    turns: Any
    ring: RingPass


@dataclass
class _Held:
    """Tensors that stay for one argument, what was copied into them last, and its shapes."""

    static: Any
    source: Any
    signature: Hashable


class CudaRecorder:
    """Records into CUDA graphs, which share one pool of memory: they run one after another."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        self._pool = graph.pool()
        return result, graph.replay


class PassGraphs:
    """The graphs of one model and one cache: ``model(..., cache=cache, graphs=graphs)``; ``StreamingGenerator`` makes them.

    The first pass of a kind runs as it is, which compiles kernels and fills tables; the second is captured; from then on it is
    replayed. Graphs read weights at their addresses: after changing the model (its dtype, its layers) make new ones.
    """

    def __init__(self, record: Callable[[Callable[[], Any]], Recorded] | None = None) -> None:
        self._record = record or CudaRecorder()
        self._seen: set[Hashable] = set()
        self._recorded: dict[Hashable, Recorded] = {}
        self._held: dict[tuple[str, Hashable], _Held] = {}
        self._last: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, kind: Hashable, inputs: PassInputs, function: Callable[..., Any]) -> Any:
        """``function(*inputs)``: ``kind`` and the pass's own kind tell all that it depends on, but for the numbers in tensors.

        Raises ValueError for tensors that are not on a GPU.
        """
        if inputs.x.device.type != "cuda" and isinstance(self._record, CudaRecorder):
            raise ValueError(f"graphs must be None for tensors on {inputs.x.device}: CUDA graphs need a GPU")
        fields = {"x": inputs.x, "timestep": inputs.timestep, "text": inputs.text, "turns": inputs.turns, "sink": inputs.ring.turns}
        key = (kind, inputs.ring.kind, tuple(self._signature(name, value) for name, value in fields.items()))
        recorded = self._recorded.get(key)
        if recorded is None and (key not in self._seen or len(self._recorded) >= MOST_GRAPHS):
            if len(self._seen) < MOST_KINDS:
                self._seen.add(key)
            return function(*inputs)
        static = {name: self._filled(name, value) for name, value in fields.items()}
        if recorded is None:
            ring = dataclasses.replace(inputs.ring, turns=static.pop("sink"))
            captured = PassInputs(**static, ring=ring)
            recorded = self._recorded[key] = self._record(lambda: function(*captured))
        result, replay = recorded
        replay()
        inputs.ring.finish()
        return None if result is None else result.clone()

    def _signature(self, name: str, value: Any) -> Hashable:
        last = self._last.get(name)
        if last is not None and value is last.source:
            return last.signature
        return tuple((tensor.shape, tensor.dtype) for tensor in _tensors(value))

    def _filled(self, name: str, value: Any) -> Any:
        """The tensors that stay, with the numbers of ``value``. A text or time cache that was copied last is not copied again."""
        signature = self._signature(name, value)
        held = self._held.get((name, signature))
        if held is None:
            held = self._held[name, signature] = _Held(_each(value, torch.clone), value, signature)
        elif value is not held.source or isinstance(value, Tensor):
            for place, tensor in zip(_tensors(held.static), _tensors(value), strict=True):
                place.copy_(tensor)
            held.source = value
        self._last[name] = held
        return held.static


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _each(value, keep)
    return found


def _each(value: Any, place: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``place(tensor)`` for each of its tensors, in a fixed order."""
    if isinstance(value, Tensor):
        return place(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_each(part, place) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_each(part, place) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _each(getattr(value, field.name), place) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value
