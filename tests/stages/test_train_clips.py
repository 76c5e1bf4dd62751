"""The same stages on a folder of videos, from files to a streamed mp4."""

from __future__ import annotations

import json

import pytest

from aadkern_train.cli import main
from aadkern_train.engine.video import read_video
from aadkern_train.worlds.clips import make_example_videos

SMALL = [
    "data={height: 16, width: 16}",
    "network={heads: 2, head_dim: 8, layers: 2, ffn: 24}",
    "chunks=[1,2,2,2]",
    "window=5",
    "pretrain={steps: 2, batch: 2}",
    "ode={steps: 2, batch: 2, pairs: 4, solver_steps: 2}",
    "dmd={steps: 2, batch: 2, fake_per_generator: 1}",
    "adversarial={steps: 1, batch: 2, discriminator_first: 1, layers: [0, 1]}",
    "evaluate={every: 0, final_clips: 4, show: 2, batch: 4, teacher_steps: 2}",
]


def test_a_folder_of_videos_through_all_stages(tmp_path, capsys):
    folder = tmp_path / "videos"
    make_example_videos(folder, 3, 24, (20, 28))
    (folder / "broken.mp4").write_bytes(b"not a video")
    run = tmp_path / "run"
    with pytest.warns(UserWarning, match=r"skipped .*broken\.mp4"):
        assert main(["train", "clips", f"data.path={folder}", f"out={run}", *SMALL]) == 0, capsys.readouterr().err
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["ode", "dmd", "adversarial"] and set(metrics["reference"]) == {"real", "static", "teacher"}
    assert (run / "report.html").stat().st_size > 10_000
    assert main(["generate", "--checkpoint", str(run), "--chunks", "5", "--out", str(tmp_path / "a.mp4")]) == 0
    make_example_videos(tmp_path / "other", 1, 2, (40, 30))
    image = next((tmp_path / "other").iterdir())
    for file in folder.iterdir():
        file.unlink()  # a first frame of one's own needs no training videos
    assert (
        main(["generate", "--checkpoint", str(run), "--chunks", "3", "--image", str(image), "--out", str(tmp_path / "b.gif")]) == 0
    )
    frames, _ = read_video(tmp_path / "b.gif")
    assert frames.shape == (7, 256, 256, 3)


@pytest.mark.parametrize("words, says", [([], "data.path must name a folder"), (["data.path=/nowhere"], "/nowhere")])
def test_a_folder_without_videos_is_explained(words, says, tmp_path, capsys):
    assert main(["train", "clips", f"out={tmp_path / 'run'}", *words, *SMALL]) == 2
    assert says in capsys.readouterr().err
