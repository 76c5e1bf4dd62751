"""The attention plan as a picture: which latent frames each chunk sees, from the plan that trains and serves the
model."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from aadkern.plans import VideoLayout, Window, block_causal

SIDE = 300  # the matrix, in the picture's units
LEFT, TOP, BELOW = 62, 34, 46

Cell = tuple[int, int, int, int, str]  # query frames [q0, q1), key frames [k0, k1), what they are


def cells(layout: VideoLayout, window: Window) -> Iterator[Cell]:
    """The visible rectangles of ``block_causal``, one token per frame: the "sink", the "window", the chunk "itself"."""
    plan, sink = block_causal(VideoLayout(layout.chunks, 1), window), window.sink
    for (run_start, run_end), ranges in plan.runs:
        start = run_start  # neighbouring chunks that see the same frames are one run
        while start < run_end:
            first, end = layout.chunk_frames(layout.chunk_of(start))
            for k0, k1 in ranges:
                for a, b, kind in ((0, sink, "sink"), (sink, first, "window"), (max(first, sink), end, "itself")):
                    if max(k0, a) < min(k1, b):
                        yield first, end, max(k0, a), min(k1, b), kind
            start = end


def plan_picture(layout: VideoLayout, window: Window, title: str) -> str:
    """An SVG figure: queries down, keys across, chunk borders drawn, sink and window labelled."""
    unit = SIDE / layout.frames
    parts = [f'<rect class="unseen" x="{LEFT}" y="{TOP}" width="{SIDE}" height="{SIDE}"/>']
    for q0, q1, k0, k1, kind in cells(layout, window):
        x, y, width, height = (round(v * unit, 2) for v in (k0, q0, k1 - k0, q1 - q0))
        seen = f"frames {q0} to {q1 - 1} see frames {k0} to {k1 - 1} ({kind})"
        place = f'x="{LEFT + x:g}" y="{TOP + y:g}" width="{width:g}" height="{height:g}"'
        parts.append(f'<rect class="{kind}" {place}><title>{seen}</title></rect>')
    parts += _grid(layout, unit) + _labels(layout, window, unit)
    box = f'viewBox="0 0 {LEFT + SIDE + 12} {TOP + SIDE + BELOW}"'
    drawn = f'<svg {box} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure class="chart plan"><figcaption>{escape(title)}</figcaption>{drawn}</figure>'


def _grid(layout: VideoLayout, unit: float) -> list[str]:
    parts = []
    borders = {layout.chunk_frames(chunk)[0] for chunk in range(len(layout.chunks))} | {layout.frames}
    for frame in range(layout.frames + 1):
        if frame not in borders and unit < 12:
            continue
        style, at = ("chunk-border" if frame in borders else "frame-border"), frame * unit
        parts.append(f'<line class="{style}" x1="{LEFT + at:.2f}" x2="{LEFT + at:.2f}" y1="{TOP}" y2="{TOP + SIDE}"/>')
        parts.append(f'<line class="{style}" x1="{LEFT}" x2="{LEFT + SIDE}" y1="{TOP + at:.2f}" y2="{TOP + at:.2f}"/>')
    return parts


def _labels(layout: VideoLayout, window: Window, unit: float) -> list[str]:
    parts = [f'<text x="{LEFT + SIDE / 2}" y="12" text-anchor="middle">seen frame (key)</text>']
    labelled = -float(SIDE)
    for chunk, size in enumerate(layout.chunks):
        first, _ = layout.chunk_frames(chunk)
        middle = (first + size / 2) * unit
        if unit * size >= 12:
            parts.append(f'<text x="{LEFT - 6}" y="{TOP + middle + 4:.1f}" text-anchor="end">chunk {chunk}</text>')
        at = LEFT + (first + 0.5) * unit
        if at - labelled >= 16:
            labelled = at
            parts.append(f'<text x="{at:.1f}" y="{TOP - 6}" text-anchor="middle">{first}</text>')
    return parts + _brackets(layout, window, unit)


def _brackets(layout: VideoLayout, window: Window, unit: float) -> list[str]:
    """What the last chunk sees, named below the matrix."""
    seen = window.visible_frames(*layout.chunk_frames(len(layout.chunks) - 1))
    recent = max(seen[-1][0], window.sink if seen[-1][0] == 0 else 0)
    parts = _bracket(recent, layout.frames, unit, f"window: the newest {layout.frames - recent}", "end")
    return parts + (_bracket(0, window.sink, unit, f"sink: {window.sink}", "start") if window.sink else [])


def _bracket(first: int, end: int, unit: float, text: str, side: str) -> list[str]:
    x0, x1, top = LEFT + first * unit, LEFT + end * unit, TOP + SIDE + 5
    return [
        f'<path class="bracket" d="M{x0 + 1:.1f} {top} v5 H{x1 - 1:.1f} v-5"/>',
        f'<text x="{x0 if side == "start" else x1:.1f}" y="{top + 21}" text-anchor="{side}">{escape(text)}</text>',
    ]
