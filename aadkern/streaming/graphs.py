"""Passes of a stream replayed from CUDA graphs: one for each kind of pass, such as each phase of the ring, captured once.

What a pass does to the ring repeats with a short period, at the same addresses. What does not repeat are numbers: latents, noise
levels, text, rotary tables, the turns of the sink. They are copied into tensors that stay, and the graph reads them there.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadkern.streaming.passes import RingPass

# A stream of equal chunks under one prompt has 3 to 11 kinds of passes; each new length of a prompt brings as many. Beyond so many
# graphs a new one takes the place of one that was not used for so many passes, or the pass runs without.
MOST_GRAPHS, UNUSED_PASSES = 64, 1000
MOST_SEEN = 4096  # kinds that ran once; then all are forgotten

Recorded = tuple[Any, Callable[[], None]]
"""What the run returned, and what runs it again: with the same tensors, into the same result."""


class PassInputs(NamedTuple):
    """The arguments of one pass: tensors, or tuples and dataclasses of tensors."""

    x: Tensor
    timestep: Any
    text: Any
    turns: Any
    ring: RingPass


@dataclasses.dataclass
class _Held:
    """Tensors that stay for one argument, and what was copied into them last."""

    static: Any
    source: Any = None


class CudaRecorder:
    """Records into CUDA graphs, which share one pool of memory: they run one after another."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, run: Callable[[], Any], device: torch.device) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):  # torch.cuda.graph's own stream is on whichever device was current first
            self._stream = self._stream or torch.cuda.Stream(device)
            # In the default mode an allocation in another thread, such as one that decodes, would break the capture.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                result = run()
        self._pool = graph.pool()
        return result, graph.replay


class PassGraphs:
    """Graphs for passes through ring caches: ``model(..., cache=cache, graphs=graphs)``; ``StreamingGenerator`` makes them.

    The first pass of a kind runs as it is, which compiles kernels and fills tables; the second is captured; from then on it is
    replayed. ``len`` counts the graphs. They read weights at their addresses, and torch's switches (TF32, determinism, the
    choice of SDPA) as they were when captured: after changing either make new ones. Use them from one thread.
    """

    def __init__(self, record: Callable[[Callable[[], Any], torch.device], Recorded] | None = None) -> None:
        self._record = record or CudaRecorder()
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._recorded: dict[tuple[Hashable, ...], Recorded] = {}  # the least recently used first
        self._used: dict[Hashable, int] = {}  # the pass that used each graph last
        self._passes = 0
        self._held: dict[Hashable, _Held] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def run(self, kind: Hashable, inputs: PassInputs, function: Callable[..., Any]) -> Any:
        """``function(*inputs)``: ``kind`` and the pass's own kind tell all that it depends on, but for the numbers in tensors.

        Raises ValueError for tensors that are not on a GPU, and under autocast. A pass that cannot be captured is warned of, and
        runs without a graph.
        """
        device = inputs.x.device
        if device.type != "cuda" and isinstance(self._record, CudaRecorder):
            raise ValueError(f"graphs must be None for tensors on {device}: CUDA graphs need a GPU")
        if torch.is_autocast_enabled(device.type):
            raise ValueError("graphs must be None under autocast, whose casts of weights would be gone at the replay")
        arguments = {
            "x": inputs.x,
            "timestep": inputs.timestep,
            "text": inputs.text,
            "turns": inputs.turns,
            "sink": inputs.ring.turns,
        }
        places = tuple((name, tuple((t.shape, t.dtype) for t in _tensors(value))) for name, value in arguments.items())
        key = (kind, inputs.ring.kind, *places)
        self._passes += 1
        if key in self._refused or (key not in self._recorded and not self._room()):
            return function(*inputs)
        # Out of inference mode, and the first pass on the tensors that stay: warm-up, capture and replay see the same ones.
        with torch.inference_mode(False), torch.no_grad():
            static = {place[0]: self._filled(place, value) for place, value in zip(places, arguments.values(), strict=True)}
            ring = dataclasses.replace(inputs.ring, turns=static.pop("sink"))
            passed = PassInputs(**static, ring=ring)
            if key not in self._recorded:
                if key not in self._seen:
                    result = function(*passed)
                    self._note(key)
                    return result
                try:
                    recorded = self._record(lambda: function(*passed), device)
                except RuntimeError as error:
                    self._refused.add(key)
                    warnings.warn(f"a pass runs without a CUDA graph, as capturing it failed: {error}", stacklevel=2)
                    return function(*passed)
                self._recorded[key] = recorded
            result, replay = self._recorded[key] = self._recorded.pop(key)
            self._used[key] = self._passes
            replay()
            inputs.ring.finish()
            return None if result is None else result.clone()

    def _note(self, key: tuple[Hashable, ...]) -> None:
        """The kind has run once; the next time it is captured."""
        if len(self._seen) >= MOST_SEEN:
            self._seen.clear()
        self._seen.add(key)

    def _room(self) -> bool:
        """Whether another graph may be held; lets go of one that was long unused, and of the tensors that it alone reads."""
        if len(self._recorded) < MOST_GRAPHS:
            return True
        oldest = next(iter(self._recorded))
        if self._passes - self._used[oldest] <= UNUSED_PASSES:
            return False
        del self._recorded[oldest], self._used[oldest]
        read = {place for key in self._recorded for place in key[2:]}
        self._held = {place: held for place, held in self._held.items() if place in read}
        return True

    def _filled(self, place: Hashable, value: Any) -> Any:
        """The tensors that stay, with the numbers of ``value``. A text or time cache that was copied last is not copied again."""
        held = self._held.get(place)
        if held is None:
            held = self._held[place] = _Held(_each(value, torch.clone))
        elif value is not held.source or isinstance(value, Tensor):
            for static, tensor in zip(_tensors(held.static), _tensors(value), strict=True):
                static.copy_(tensor)
        held.source = value
        return held.static


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _each(value, keep)
    return tensors


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
