"""Videos at fixed prompts: of each stage those of its last step, one row for each prompt, as files of their own within the page."""

from __future__ import annotations

import base64
import re
from html import escape
from pathlib import Path

from aadkern_train.report.reading import RunRecord

WITHIN = 20_000_000  # bytes of all videos that a page holds itself; beyond, it links to the files beside it


def validation(run: RunRecord) -> str:
    """The videos under samples/<stage>/step-N; "" where there are none."""
    newest_files = {stage: newest for stage in run.stages if (newest := _newest(run.path / "samples" / stage))}
    names = sorted({file.name for files in newest_files.values() for file in files})
    if not names:
        return ""
    inside = sum(file.stat().st_size for files in newest_files.values() for file in files) <= WITHIN
    rows = []
    for name in names:
        cells = []
        for stage, files in newest_files.items():
            file = next((file for file in files if file.name == name), None)
            if file is not None:
                step = int(file.parent.name.removeprefix("step-"))
                caption = f"<figcaption>{escape(run.label(stage))}, step {step}</figcaption>"
                cells.append(f'<figure class="clip">{caption}{_video(run.path, file, inside)}</figure>')
        rows.append(f'<h3>{escape(_words(name))}</h3><div class="clips">{"".join(cells)}</div>')
    return "<p>The same noise for every stage and step.</p>" + "".join(rows)


def _newest(folder: Path) -> list[Path]:
    steps = sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
    return sorted(steps[-1].glob("*.mp4")) if steps else []


def _video(run: Path, file: Path, inside: bool) -> str:
    if inside:
        source = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    else:
        source = escape(file.relative_to(run).as_posix(), quote=True)
    return f'<video controls loop muted playsinline preload="metadata" style="width:100%" src="{source}"></video>'


def _words(name: str) -> str:
    """ "003-a-cat-runs-s0.mp4" as "a cat runs, seed 0"."""
    match = re.fullmatch(r"\d+-(.*)-s(\d+)\.mp4", name)
    return f"{match[1].replace('-', ' ')}, seed {match[2]}" if match else name
