"""The report's moving and still pictures: clips that play together, contact sheets, and the attention plan."""

from __future__ import annotations

from html import escape
from itertools import groupby

import numpy as np

from aadkern.plans import VideoLayout, Window
from aadkern_train.report.charts import legend
from aadkern_train.report.images import data_uri, reduced, sprite_sheet, strip
from aadkern_train.report.plan_picture import plan_picture
from aadkern_train.report.reading import RunRecord

FRAMES_PER_SECOND = 4  # slow enough to follow a single step
CLIPS, COLUMNS, SHEETS = 8, 4, 3  # clips in a player, side by side in it, clips that get a contact sheet
PIXELS = 400_000  # of one player's sprite sheet: fewer clips, then fewer frames, are shown beyond
SMOOTH = 48  # frames of so many pixels or more are enlarged smoothly


def players(run: RunRecord) -> str:
    """All samples playing, those of equal length in step with each other, clip i of each in the same place."""
    groups = []
    by_length = sorted(run.samples.items(), key=lambda item: item[1].shape[1])
    for length, members in groupby(by_length, key=lambda item: item[1].shape[1]):
        panels, shown = [], length
        members = sorted(members, key=lambda item: list(run.samples).index(item[0]))
        columns = min(COLUMNS, max(len(clips) for _, clips in members))
        for name, clips in members:
            panel, shown = _panel(run, name, clips, columns)
            panels.append(panel)
        slider = f'<input type="range" min="0" max="{shown - 1}" value="0" aria-label="Frame">'
        controls = f'<div class="controls"><button type="button">Play</button>{slider}</div>'
        groups.append(
            f'<h3>{length} frames</h3><div data-frames="{shown}" data-fps="{FRAMES_PER_SECOND}">{controls}'
            f'<div class="clips{" captioned" if run.captions else ""}">{"".join(panels)}</div></div>'
        )
    return "".join(groups)


def _panel(run: RunRecord, name: str, clips: np.ndarray, columns: int) -> tuple[str, int]:
    clips = reduced(clips)
    pixels = clips.shape[2] * clips.shape[3]
    frames = max(1, min(clips.shape[1], PIXELS // pixels))
    count = max(1, min(CLIPS, len(clips), PIXELS // (pixels * frames)))
    rows = []
    for first in range(0, count, columns):
        row = clips[first : min(first + columns, count), :frames]
        captions = [run.caption(name, first + i) for i in range(len(row))]
        rows.append(_player_row(run.label(name), row, captions))
    other = "" if run.streamed_alike(name) else " <small>(other clips than the stages')</small>"
    title = f"<figcaption>{escape(run.label(name))}{other}</figcaption>"
    return f'<figure class="clip">{title}<div class="row" style="--columns:{columns}">{"".join(rows)}</div></figure>', frames


def _player_row(title: str, clips: np.ndarray, captions: list[str]) -> str:
    """A canvas of clips side by side, and under each its caption."""
    sheet, (height, width) = sprite_sheet(clips, columns=len(clips))
    words = f"{title}: {len(clips)} clips of {clips.shape[1]} frames, playing"
    words += ": " + "; ".join(captions) if any(captions) else ""
    canvas = (
        f'<canvas width="{width}" height="{height}" class="{_rendering(clips)}" role="img" style="grid-column:span {len(clips)}" '
        f'aria-label="{escape(words)}" data-sheet="{data_uri(sheet)}"></canvas>'
    )
    under = "".join(f"<span>{escape(caption)}</span>" for caption in captions) if any(captions) else ""
    return canvas + under


def _rendering(clips: np.ndarray) -> str:
    return "pixels" if min(clips.shape[2:4]) < SMOOTH else "smooth"


def contact_sheets(run: RunRecord) -> str:
    """For each of the first clips, the frames of every sample in a row, chunks set apart; longer samples below."""
    if not run.samples:
        return ""
    layout = _layout(run)
    starts = frozenset(layout.chunk_frames(chunk)[0] for chunk in range(1, len(layout.chunks))) if layout else frozenset()
    alike = {name: clips for name, clips in run.samples.items() if run.streamed_alike(name)}
    lengths = sorted({clips.shape[1] for clips in alike.values()})
    short = {name: clips for name, clips in alike.items() if clips.shape[1] == min(lengths)}
    parts = []
    for clip in range(min(SHEETS, max((len(clips) for clips in short.values()), default=0))):
        parts.append(
            _sheet(run, f"Clip {clip + 1}", {name: clips for name, clips in short.items() if clip < len(clips)}, clip, starts)
        )
    for length in lengths[1:]:
        longer = {name: clips for name, clips in alike.items() if clips.shape[1] == length}
        parts.append(_sheet(run, f"Clip 1, {length} frames", longer, 0, frozenset()))
    for name in run.samples.keys() - alike.keys():
        parts.append(_sheet(run, "Other clips than the stages'", {name: run.samples[name]}, 0, frozenset()))
    return "".join(parts)


def _sheet(run: RunRecord, heading: str, samples: dict[str, np.ndarray], clip: int, starts: frozenset[int]) -> str:
    caption = next((words for name in samples if (words := run.caption(name, clip))), "")
    heading += f": {caption}" if caption else ""
    rows = "".join(_strip_row(run, name, clips[clip], clip, starts) for name, clips in samples.items())
    return f'<h3>{escape(heading)}</h3><div class="strips">{rows}</div>'


def _strip_row(run: RunRecord, name: str, frames: np.ndarray, clip: int, starts: frozenset[int]) -> str:
    picture = strip(reduced(frames[:64]), starts)
    words = f"{run.label(name)}: {len(frames)} frames in order"
    words += f": {caption}" if (caption := run.caption(name, clip)) else ""
    size = f'width="{picture.shape[1]}" height="{picture.shape[0]}"'
    image = f'<img {size} class="{_rendering(frames[None])}" alt="{escape(words)}" src="{data_uri(picture)}">'
    return f"<span>{escape(run.label(name))}</span>{image}"


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
