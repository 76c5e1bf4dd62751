"""A stream's chunks with what meets it on the way: another prompt, the video that it is made from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from torch import Tensor

from aadkern import StreamingGenerator
from aadkern.streaming.generator import After
from aadkern_train.networks.rollout import Noise, turn_to


def stream_chunks(
    stream: StreamingGenerator,
    noise: Noise,
    chunks: int | None,
    first: Tensor | None,
    later: Mapping[int, Tensor],
    turn: str,
    source: Iterator[Tensor] | None = None,
    after: After | None = None,
) -> Iterator[Tensor]:
    """The latents [B, C, f, H, W] of each of so many chunks (None: without end). ``later``: texts that take over, by the chunk,
    counted from 1, that is the first to obey, in the way ``turn``. ``source``: clean latents that chunk after chunk is made from,
    with whose end this one ends. The rest is ``StreamingGenerator.chunks``'s."""
    for number in itertools.count(1) if chunks is None else range(1, chunks + 1):
        clean = None if source is None else next(source, None)
        if source is not None and clean is None:
            return
        if number in later:
            turn_to(stream, later[number], turn)
        chunk_source = None if clean is None else lambda _, clean=clean: clean
        yield from stream.chunks(noise, 1, first_frame=first if number == 1 else None, source=chunk_source, after=after)
