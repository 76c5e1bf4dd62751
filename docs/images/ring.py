"""Draws docs/images/ring.svg: which frames lie in which slot of a streaming cache, and what each pass sees; the cache says it."""

from __future__ import annotations

import torch
from drawing import BLUE, GREEN, GREY, PALE, RED, rect, text, write

from aadkern import StreamingCache, Window

CELL, ROW, LEFT, TOP = 38, 58, 150, 76
PASSES = 4


def row(cache: StreamingCache, held: dict[int, int], clean: int, noisy: int, y: float) -> str:
    """One merged pass: the clean and the noisy chunk that it writes, and what of the rest the noisy one sees."""
    ring = cache.begin(clean + noisy, clean)
    held |= {slot + n: frame + n for frame, slot, count in ring.own for n in range(count)}
    seen = {slot for a, b in ring.last_plan.runs[0][1] for slot in range(a, b)}
    cells = []
    for slot in range(cache.capacity_frames):
        x, frame = LEFT + slot * CELL + (8 if slot >= cache.window.sink else 0), held.get(slot)
        if frame is None:
            cells.append(rect(x, y, CELL - 3, 26, GREY, 'rx="3"'))
            continue
        written = RED if frame >= ring.chunks[1][0] else GREEN
        fill = written if frame >= cache.frame else BLUE if slot in seen else PALE
        cells.append(rect(x, y, CELL - 3, 26, fill, 'rx="3"'))
        cells.append(text(x + CELL / 2 - 1.5, y + 17, str(frame), f"middle {'light' if fill != PALE else ''}"))
    ring.finish()
    cache.commit()
    return "".join(cells)


def main() -> None:
    window = Window(9, sink=1)
    cache = StreamingCache(1, 1, 1, 8, 1, window, max_chunk_frames=4, merged=True)
    held: dict[int, int] = {}
    parts = [
        text(12, 22, "A ring of slots: Window(9, sink=1), chunks of four frames, merged passes", "title"),
        text(LEFT + CELL / 2 - 2, 66, "sink", "middle"),
        text(LEFT + 8 + 6.9 * CELL, 66, "ring of three chunks, written round and round", "middle"),
    ]
    for x, fill, words in (
        (12, GREEN, "clean, written now"),
        (150, RED, "noisy, being made"),
        (282, BLUE, "seen by the noisy chunk"),
        (444, PALE, "held, out of its window"),
    ):
        parts += [rect(x, 34, 11, 11, fill, 'rx="2"'), text(x + 17, 44, words)]
    with torch.no_grad():
        for number in range(PASSES + 1):
            y = TOP + number * ROW * 0.75
            clean = 1 if number == 0 else 4
            first = cache.frame
            drawn = row(cache, held, clean, 4, y)
            parts += [text(12, y + 17, f"pass {number}: {first}" + (f" to {first + 3}" if clean > 1 else "") + " clean"), drawn]
    write("ring", LEFT + 13 * CELL + 24, TOP + (PASSES + 1) * ROW * 0.75 + 4, *parts)


if __name__ == "__main__":
    main()
