"""The drawings in docs/images are what their programs draw today, and the tables of ablations what their data say."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


def test_drawings_are_what_the_code_draws(tmp_path):
    copy = shutil.copytree(IMAGES, tmp_path / "images", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(IMAGES.parent / "data", tmp_path / "data")
    drawn = [path for path in copy.glob("*.svg") if path.with_suffix(".py").exists()]
    assert len(drawn) >= 6
    for path in drawn:
        path.unlink()
    subprocess.run([sys.executable, "draw_all.py"], cwd=copy, check=True, timeout=300)
    for path in drawn:
        assert path.read_text() == (IMAGES / path.name).read_text(), f"python docs/images/draw_all.py draws {path.name} otherwise"


def test_the_tables_of_ablations_are_those_of_their_data():
    page = (IMAGES.parent / "ablations.md").read_text()
    written = runpy.run_path(str(IMAGES.parent / "data" / "write_tables.py"))["written"]
    assert written(page) == page, "python docs/data/write_tables.py writes other tables"
    spoiled = page.replace("| 1 | both | 3 | 8", "| 1 | both | 3 | 9")
    assert spoiled != page == written(spoiled)
