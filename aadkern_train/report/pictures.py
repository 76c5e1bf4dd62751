"""The report's moving and still pictures: clips that play together, contact sheets, and the attention plan."""

from __future__ import annotations

from html import escape
from itertools import groupby

import numpy as np

from aadkern.plans import VideoLayout, Window
from aadkern_train.report.charts import legend
from aadkern_train.report.images import data_uri, reduced, sprite_sheet, strip
from aadkern_train.report.plan_picture import plan_picture
from aadkern_train.report.reading import RunRecord, label

FRAMES_PER_SECOND = 4  # slow enough to follow a single step
CLIPS, SHEETS = 8, 3  # clips in a player, clips that get a contact sheet
PIXELS = 400_000  # of one player's sprite sheet: fewer clips, then fewer frames, are shown beyond
SMOOTH = 48  # frames of so many pixels or more are enlarged smoothly


def players(run: RunRecord) -> str:
    """All samples playing, those of equal length in step with each other."""
    groups = []
    by_length = sorted(run.samples.items(), key=lambda item: item[1].shape[1])
    for length, members in groupby(by_length, key=lambda item: item[1].shape[1]):
        panels, shown = [], length
        for name, clips in sorted(members, key=lambda item: list(run.samples).index(item[0])):
            panel, shown = _panel(name, clips)
            panels.append(panel)
        slider = f'<input type="range" min="0" max="{shown - 1}" value="0" aria-label="Frame">'
        controls = f'<div class="controls"><button type="button">Play</button>{slider}</div>'
        groups.append(
            f'<h3>{length} frames</h3><div data-frames="{shown}" data-fps="{FRAMES_PER_SECOND}">{controls}'
            f'<div class="clips">{"".join(panels)}</div></div>'
        )
    return "".join(groups)


def _panel(name: str, clips: np.ndarray) -> tuple[str, int]:
    clips = reduced(clips)
    pixels = clips.shape[2] * clips.shape[3]
    frames = max(1, min(clips.shape[1], PIXELS // pixels))
    count = max(1, min(CLIPS, len(clips), PIXELS // (pixels * frames)))
    count -= count % 4 if count > 4 else 0
    sheet, (height, width) = sprite_sheet(clips[:count, :frames], columns=min(count, 4))
    words = f"{label(name)}: {count} clips of {frames} frames, playing"
    canvas = (
        f'<canvas width="{width}" height="{height}" class="{_rendering(clips)}" role="img" '
        f'aria-label="{escape(words)}" data-sheet="{data_uri(sheet)}"></canvas>'
    )
    return f'<figure class="clip"><figcaption>{escape(label(name))}</figcaption>{canvas}</figure>', frames


def _rendering(clips: np.ndarray) -> str:
    return "pixels" if min(clips.shape[2:4]) < SMOOTH else "smooth"


def contact_sheets(run: RunRecord) -> str:
    """For each of the first clips, the frames of every sample in a row, chunks set apart; longer samples below."""
    if not run.samples:
        return ""
    layout = _layout(run)
    starts = frozenset(layout.chunk_frames(chunk)[0] for chunk in range(1, len(layout.chunks))) if layout else frozenset()
    usual = min(clips.shape[1] for clips in run.samples.values())
    short = {name: clips for name, clips in run.samples.items() if clips.shape[1] == usual}
    parts = []
    for clip in range(min(SHEETS, max(len(clips) for clips in short.values()))):
        rows = "".join(_strip_row(name, clips[clip], starts) for name, clips in short.items() if clip < len(clips))
        parts.append(f'<h3>Clip {clip + 1}</h3><div class="strips">{rows}</div>')
    for length in sorted({clips.shape[1] for clips in run.samples.values()} - {usual}):
        longer = {name: clips[0] for name, clips in run.samples.items() if clips.shape[1] == length}
        rows = "".join(_strip_row(name, frames, frozenset()) for name, frames in longer.items())
        parts.append(f'<h3>Clip 1, {length} frames</h3><div class="strips">{rows}</div>')
    return "".join(parts)


def _strip_row(name: str, frames: np.ndarray, starts: frozenset[int]) -> str:
    picture = strip(reduced(frames[:64]), starts)
    words = f"{label(name)}: {len(frames)} frames in order"
    size = f'width="{picture.shape[1]}" height="{picture.shape[0]}"'
    image = f'<img {size} class="{_rendering(frames[None])}" alt="{escape(words)}" src="{data_uri(picture)}">'
    return f"<span>{escape(label(name))}</span>{image}"


def _layout(run: RunRecord) -> VideoLayout | None:
    try:
        return VideoLayout(tuple(run.config["chunks"]), 1)
    except (KeyError, TypeError, ValueError):
        return None


def plans(run: RunRecord) -> str:
    """The plan at the trained length and at that of the long measurement; "" where the config names no chunks."""
    layout = _layout(run)
    if layout is None:
        return ""
    try:
        window = Window(run.config.get("window"), run.config.get("sink", 0))
    except (TypeError, ValueError):
        return ""
    drawn = plan_picture(layout, window, f"Trained length: {layout.frames} frames")
    if run.long_times > 1 and len(layout.chunks) > 1:
        longer = VideoLayout(layout.chunks + layout.chunks[1:] * (run.long_times - 1), 1)
        drawn += plan_picture(longer, window, f"Streaming: {longer.frames} frames")
    kinds = [
        ("the chunk itself", "green", False),
        ("earlier frames in the window", "blue", False),
        ("sink: first frames, always seen", "amber", False),
    ]
    return f'{legend(kinds)}<div class="grid wide">{drawn}</div>'
