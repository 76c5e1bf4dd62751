"""`aad generate` under torchrun streams the video that one process streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from aadkern_train.networks.folders import write_folder
from aadkern_train.run import Run
from tests.engine.processes import run_processes
from tests.stages.tiny_runs import small_recipe

PROGRAM = str(Path(__file__).with_name("ulysses_generate.py"))


def videos(folder: Path, *words: object) -> list[np.ndarray]:
    """The frames from one process and from four."""
    for count in (1, 4):
        run_processes(PROGRAM, *map(str, words), "--out", str(folder / f"{count}.mp4"), count=count)
    return [np.load(folder / f"{count}.npy").astype(int) for count in (1, 4)]


@pytest.mark.slow
def test_a_wan_model(tmp_path):
    pytest.importorskip("transformers")
    from tests.wan.tiny_wan import save_tiny_wan

    save_tiny_wan(tmp_path / "wan")
    words = ["--checkpoint", tmp_path / "wan", "--device", "cpu", "--size", "32x48", "--prompt", "a cat", "--chunks", 4]
    one, four = videos(tmp_path, *words, "--window", 5, "--then", "3:a dog runs", "--turn", "recached")
    assert one.shape == four.shape and one.std() > 5
    assert abs(one - four).max() <= 2 and (one != four).mean() < 0.01


@pytest.mark.slow
def test_a_run(tmp_path):
    run = Run.alone(small_recipe("chunks=[1,4,4]", "window=6"), tmp_path / "run")
    weights = tmp_path / "run" / "weights" / "dmd"
    weights.parent.mkdir(parents=True)
    denoiser = run.networks.plain(None)
    told = {"recipe": run.recipe.model_dump(mode="json"), "predicts": "x0", "streams": True}
    write_folder(weights, denoiser.net, denoiser.net.state_dict().items(), told)
    one, four = videos(tmp_path, "--checkpoint", weights, "--chunks", 6)
    assert one.shape == four.shape and one.std() > 5
    assert abs(one - four).max() <= 2 and (one != four).mean() < 0.01
