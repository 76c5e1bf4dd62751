"""Changes of a prompt on the way, as the command line gives them."""

from __future__ import annotations

from collections.abc import Sequence


def changes(then: Sequence[str], chunks: int) -> dict[int, str]:
    """``["6:a seven moving up"]`` -> {6: "a seven moving up"}: the prompts by the chunk, counted from 1, that is the first to obey.

    Raises ValueError, naming ``then``, for what is not so written, and for chunks that are not generated or not in order.
    """
    prompts: dict[int, str] = {}
    for word in then:
        number, colon, prompt = word.partition(":")
        if not colon or not number.strip().isdecimal():
            raise ValueError(f'then must be CHUNK:PROMPT, say 6:"a seven moving up", got {word!r}')
        chunk = int(number)
        if not 1 < chunk <= chunks:
            raise ValueError(f"then must name a chunk from 2 to {chunks}, the last, got {chunk}")
        if prompts and chunk <= max(prompts):
            raise ValueError(f"then must name later and later chunks, got {chunk} after {max(prompts)}")
        prompts[chunk] = prompt.strip()
    return prompts
