"""The notebooks run from the first cell to the last."""

from __future__ import annotations

import json
from pathlib import Path

from aadkern_train.trainer import run_recipe
from tests.stages.tiny_runs import small_recipe

NOTEBOOKS = Path(__file__).resolve().parents[2] / "docs" / "notebooks"


def cells(name: str) -> list[str]:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"]), "clear the outputs before you commit"
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_attention():
    names: dict[str, object] = {}
    for number, code in enumerate(cells("attention")):
        exec(compile(code, f"attention.ipynb, cell {number}", "exec"), names)
    assert names["error"] < 1e-5  # type: ignore[operator]


def test_stream(tmp_path, monkeypatch):
    """On a run of a few steps in the demo's place."""
    monkeypatch.chdir(tmp_path)
    run_recipe(
        small_recipe("data.sprites=10", "evaluate.every=0", "dmd_continued.steps=0", "adversarial.steps=0"), Path("runs/demo")
    )
    names: dict[str, object] = {}
    for number, code in enumerate(cells("stream")):
        exec(compile(code, f"stream.ipynb, cell {number}", "exec"), names)
    assert names["frames"].shape[0] == 1 + 8 * 2  # type: ignore[attr-defined]
