"""Streaming from a run: whatever ends it, the file that grew plays and holds what was made, and it is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aadkern_train.cli import main
from aadkern_train.engine import video
from aadkern_train.engine.video import GrowingVideo, read_video
from aadkern_train.networks.folders import write_folder
from aadkern_train.run import Run
from tests.engine.processes import environment, files_up_to
from tests.house.command import answer
from tests.stages.tiny_runs import small_recipe

FOREVER = "1000000"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose generator is the network that training would begin with."""
    path = tmp_path_factory.mktemp("runs") / "run"
    run = Run.alone(small_recipe("chunks=[1,4,4]", "window=9"), path)
    (path / "weights").mkdir(parents=True)
    denoiser = run.networks.plain(None)
    told = {"recipe": run.recipe.model_dump(mode="json"), "predicts": "x0", "streams": True}
    write_folder(path / "weights" / "dmd", denoiser.net, denoiser.net.state_dict().items(), told)
    return path / "weights" / "dmd"


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_a_kill_leave_what_was_made(run, tmp_path, end):
    out = tmp_path / "a.mp4"
    words = ["generate", "--checkpoint", str(run), "--chunks", FOREVER, "--out", str(out)]
    command = [sys.executable, "-m", "aadkern_train.cli", *words]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline, seen = time.monotonic() + 600, 0
            while seen < 20:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
                if out.exists() and out.stat().st_size > 4000:
                    seen = len(read_video(out)[0])
            process.send_signal(end)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    frames = len(read_video(out)[0])
    assert frames >= seen and "Traceback" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    if end == signal.SIGINT:
        assert process.returncode == 130 and f"stopped; {out} holds {frames} frames" in said, said
        assert b"moof" not in out.read_bytes(), "an ordinary file"


@pytest.mark.parametrize("limit", [30_000, 101_234])
def test_a_full_disk_leaves_what_was_made(run, tmp_path, limit, capsys):
    out = tmp_path / "a.mp4"
    with files_up_to(limit):
        status = main(["generate", "--checkpoint", str(run), "--chunks", FOREVER, "--out", str(out)])
    said = capsys.readouterr().err.splitlines()
    frames = len(read_video(out)[0])
    assert status == 2 and frames > 5, said
    assert said[-2] == f"stopped; {out} holds {frames} frames"
    assert said[-1] == f"aad generate: {out}: File too large; make room there, or name another place"
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_without_room_for_a_second_file_the_growing_one_stays(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    from tests.engine.frames import smooth_frames

    monkeypatch.setattr(video, "_remux", full)
    with GrowingVideo(tmp_path / "a.mp4", 8) as growing:
        growing.write(smooth_frames(12, 16, 16))
    assert growing.count == len(read_video(tmp_path / "a.mp4")[0]) == 12
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    "words, says",
    [
        ("--fps 0", "fps must lie in (0, 240], got 0.0"),
        ("--fps nan", "fps must lie in (0, 240], got nan"),
        ("--fps inf", "fps must lie in (0, 240], got inf"),
        ("--index -1", "index must be at least 0, got -1"),
        ("--chunks 0", "chunks must be at least 1, got 0"),
        ("--device gpu", "--device must be left out"),
        ("--turn round", "--turn: invalid choice: 'round'"),
        ("--then 3", "then must be CHUNK:PROMPT"),
        ("--prompt nonsense", "nonsense"),
        ("--image /dev/null", "image must be a file"),
        ("--image {run}/run.json", "prompt must be given with an image"),
        ("--out {run}", "out must end in"),
        ("--out /proc/none/a.gif", "path must lie in a folder"),
        ("--out {run}/run.json/a.mp4", "path must lie in a folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(run, words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, line = answer(["generate", "--checkpoint", str(run), *words.format(run=run).split()], capsys)
    assert status == 2 and says in line and not list(tmp_path.iterdir()), line


def resident() -> float:
    """Megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_memory_stays_flat_over_many_chunks(run, tmp_path, monkeypatch, capsys):
    chunks = int(os.environ.get("AADKERN_MANY_CHUNKS", "10000"))
    seen: list[float] = []
    write = GrowingVideo.write

    def watched(self: GrowingVideo, frames: object) -> None:
        write(self, frames)
        seen.append(resident())

    monkeypatch.setattr(GrowingVideo, "write", watched)
    out = tmp_path / "a.mp4"
    assert main(["generate", "--checkpoint", str(run), "--chunks", str(chunks), "--out", str(out)]) == 0
    assert len(seen) == chunks + 1
    assert re.search(rf"holds {1 + 4 * chunks} frames", capsys.readouterr().err)
    growth = max(seen[len(seen) // 2 :]) - seen[len(seen) // 2]
    assert growth < 10, f"{growth:.1f} MB more in the second half of {chunks} chunks: {seen[:: len(seen) // 10]}"


def test_a_run_without_captions_takes_no_prompt(tmp_path, capsys):
    run = Run.alone(small_recipe("data.captions=false"), tmp_path)
    denoiser = run.networks.plain(None)
    told = {"recipe": run.recipe.model_dump(mode="json"), "predicts": "x0", "streams": True}
    write_folder(run.folder.weights("dmd"), denoiser.net, denoiser.net.state_dict().items(), told)
    words = ["generate", "--checkpoint", str(run.folder.weights("dmd")), "--chunks", "2", "--out", str(tmp_path / "a.mp4")]
    assert main([*words, "--prompt", "a two moving left"]) == 2
    assert "prompt must be left out: this run's clips have no captions" in capsys.readouterr().err
    assert main([*words, "--then", "2:moving left"]) == 2
    assert main(words) == 0
