"""Random numbers without a state: a draw is a function of (seed, scope, name, sample) and of nothing else.

    key = blake2b-128(seed, scope, kind, name, sample);   values = Philox4x64(key, counter 0, 1, 2, ...)

Any process, any world size and any resumed run therefore draws the same numbers, and no random state is ever saved.
Philox takes the whole 128-bit key; torch's CPU generator keeps only the low 32 bits of its seed (torch 2.13), so that a
run of a million draws would meet about a hundred repeated streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Stateless random numbers for one scope, for example `Draws(seed, "dmd", step)`.

    Drawing the same name for the same sample twice gives the same numbers: give each use its own name.
    Shapes larger or smaller share their first values.
    """

    def __init__(self, seed: int, *scope: str | int) -> None:
        """seed: any integer. scope: names and numbers, for example stage and step. Raises TypeError for others."""
        self._scope = tuple(_part("scope", part) for part in scope)
        self._seed = _integer("seed", seed)

    def at(self, *more_scope: str | int) -> Draws:
        """The draws of a narrower scope: `draws.at("step", 3)`."""
        return Draws(self._seed, *self._scope, *more_scope)

    def normal(self, name: str, samples: Sequence[int], shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
        """Standard normal values, fp32 [len(samples), *shape]."""
        out = np.empty((len(samples), *_shape(shape)), np.float32)
        for row, generator in enumerate(self._generators("normal", name, samples)):
            out[row] = generator.standard_normal(out.shape[1:], dtype=np.float32)
        return torch.from_numpy(out).to(device or "cpu")

    def uniform(
        self,
        name: str,
        samples: Sequence[int],
        shape: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Uniform values in [0, 1), fp32 [len(samples), *shape]."""
        out = np.empty((len(samples), *_shape(shape)), np.float32)
        for row, generator in enumerate(self._generators("uniform", name, samples)):
            out[row] = generator.random(out.shape[1:], dtype=np.float32)
        return torch.from_numpy(out).to(device or "cpu")

    def integers(
        self,
        name: str,
        samples: Sequence[int],
        high: int,
        shape: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Integers 0 <= n < high, equally likely, int64 [len(samples), *shape]; high >= 1."""
        if _integer("high", high) < 1:
            raise ValueError(f"high must be at least 1, got {high}")
        out = np.empty((len(samples), *_shape(shape)), np.int64)
        for row, generator in enumerate(self._generators("integers", name, samples)):
            out[row] = generator.integers(0, high, out.shape[1:])
        return torch.from_numpy(out).to(device or "cpu")

    def _generators(self, kind: str, name: str, samples: Sequence[int]) -> Iterable[np.random.Generator]:
        for sample in samples:
            words = repr((self._seed, self._scope, kind, _part("name", name), _integer("samples", sample)))
            digest = hashlib.blake2b(words.encode(), digest_size=16).digest()
            yield np.random.Generator(np.random.Philox(key=np.frombuffer(digest, "<u8")))


def _integer(argument: str, value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be an integer, got {value!r}")
    return int(value)  # numpy and torch integers too: their repr differs from an int's


def _part(argument: str, value: object) -> str | int:
    return value if type(value) is str else _integer(f"{argument} (a string or integer)", value)


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(_integer("shape", size) for size in shape)
