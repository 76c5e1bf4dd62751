"""Run folders: nothing a user made is lost, the log after a resume, progress on a terminal and off it."""

from __future__ import annotations

import io
import json

import pytest

from aadkern_train.engine.config import Config
from aadkern_train.engine.run_folder import Progress, RunFolder

PARTS = ["checkpoints", "config.yaml", "lock", "samples", "weights"]


class Settings(Config):
    steps: int = 3


def test_a_new_run_has_its_parts(tmp_path):
    run = RunFolder.create(tmp_path / "a" / "run", Settings(steps=5))
    assert run.config(Settings) == Settings(steps=5)
    assert run.checkpoints.is_dir() and run.samples.is_dir() and run.weights("ode").parent.is_dir()
    assert run.weights("ode").name == "ode" and RunFolder.open(run.path).config(Settings).steps == 5
    assert RunFolder.create(tmp_path / "other", Settings(), active=False).path.exists() is False


def test_an_existing_run_is_not_overwritten_unasked(tmp_path):
    run = RunFolder.create(tmp_path / "run", Settings(steps=5))
    run.log("ode", 1, loss=0.5)
    run.close()
    (run.path / "notes.txt").write_text("mine")
    (run.samples / "clip.gif").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds a run; go on with resume=.*run, or start anew with overwrite=true"):
        RunFolder.create(run.path, Settings())
    assert RunFolder.open(run.path).read_log() == [{"stage": "ode", "step": 1, "loss": 0.5}]
    assert (run.path / "notes.txt").read_text() == "mine" and not list(tmp_path.glob("*.old*"))


def test_an_overwritten_run_is_moved_aside_whole_and_named(tmp_path, capsys):
    (tmp_path / "run.old-1").write_text("a file of that name")
    for number in (2, 3):
        run = RunFolder.create(tmp_path / "run", Settings(steps=number), overwrite=True, hold=True)
        run.log("ode", 1, loss=0.5)
        (run.path / "notes.txt").write_text("mine")
        run.close()
    fresh = RunFolder.create(tmp_path / "run", Settings(), overwrite=True, hold=True)
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{tmp_path}/run: the run that was here is kept as {tmp_path}/run.old-{number}" for number in (2, 3)]
    assert fresh.config(Settings).steps == 3 and sorted(p.name for p in fresh.path.iterdir()) == PARTS
    fresh.log("ode", 1, loss=0.1)
    assert [line.get("kind") for line in fresh.read_log()] == ["note", None]
    fresh.close()
    for number in (2, 3):
        kept = tmp_path / f"run.old-{number}"
        assert RunFolder.open(kept).config(Settings).steps == number and (kept / "notes.txt").read_text() == "mine"
        assert RunFolder.open(kept).read_log()[-1]["loss"] == 0.5 and not (kept / "lock").exists()


def test_a_linked_run_moves_where_it_lies_and_ones_own_folder_stays(tmp_path, monkeypatch):
    RunFolder.create(tmp_path / "large disk" / "run", Settings(steps=9))
    (tmp_path / "run").symlink_to(tmp_path / "large disk" / "run")
    assert RunFolder.create(tmp_path / "run", Settings(), overwrite=True).config(Settings).steps == 3
    assert (tmp_path / "run").is_symlink() and RunFolder.open(tmp_path / "large disk" / "run.old-1").config(Settings).steps == 9
    monkeypatch.chdir(tmp_path / "run")
    for path in (".", tmp_path / "run"):
        with pytest.raises(ValueError, match="is the folder that you are in"):
            RunFolder.create(path, Settings(), overwrite=True)


def test_a_run_that_was_killed_while_it_began_can_begin_again(tmp_path):
    (tmp_path / "run").mkdir()
    for left in ("lock", "lock.3f.tmp", "config.yaml.tmp"):
        (tmp_path / "run" / left).touch()
    RunFolder.create(tmp_path / "run", Settings(steps=5))
    (tmp_path / "run" / "lock").unlink()
    (tmp_path / "run" / "samples").rmdir()
    again = RunFolder.open(tmp_path / "run", hold=True)
    assert again.samples.is_dir() and again.config(Settings).steps == 5
    again.close()


def test_folders_that_are_no_runs(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds other files and is no run"):
            RunFolder.create(tmp_path, Settings(), overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.tex", Settings())
    with pytest.raises(ValueError, match="holds no run"):
        RunFolder.open(tmp_path / "absent")
    assert (tmp_path / "thesis.tex").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "position, kept",
    [(("ode", 2), 2), (("ode", 3), 3), (("ode", 0), 0), (("dmd", 1), 4), (("dmd", 9), 5), (("adversarial", 3), 5)],
)
def test_the_log_after_a_resume_has_each_step_once(tmp_path, position, kept):
    run = RunFolder.create(tmp_path / "run", Settings())
    lines = [("ode", 1), ("ode", 2), ("ode", 3), ("dmd", 1), ("dmd", 2)]
    for stage, step in lines:
        run.log(stage, step, loss=0.1 * step)
    with run.log_file.open("a") as file:
        file.write('{"stage": "dmd", "st')  # a kill in the middle of a line
    assert [(line["stage"], line["step"]) for line in run.read_log()] == lines
    run.resume_log(*position)
    run.log(position[0], 100, loss=float("nan"))
    assert [(line["stage"], line["step"]) for line in run.read_log()] == [*lines[:kept], (position[0], 100)]


def test_log_lines_are_on_disk_at_once_and_only_from_the_main_process(tmp_path):
    run = RunFolder.create(tmp_path / "run", Settings())
    run.log("ode", 1, loss=1 / 3, seconds=2.5)
    assert json.loads(run.log_file.read_text()) == {"stage": "ode", "step": 1, "loss": 1 / 3, "seconds": 2.5}
    other = RunFolder.open(run.path, active=False)
    other.log("ode", 2, loss=1.0)
    other.write_json(other.metrics_file, {})
    other.resume_log("ode", 0)
    assert len(run.read_log()) == 1 and not run.metrics_file.exists()
    run.write_json(run.metrics_file, {"legal": 90.5})
    assert json.loads(run.metrics_file.read_text()) == {"legal": 90.5}


def test_plain_progress_lines(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 6.0, 11.0])
    monkeypatch.setattr("aadkern_train.engine.run_folder.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with Progress("ode", total=100, start=90, out=out, every=4.0) as progress:
        progress.update(91, loss=0.5)
        progress.update(94, loss=0.123456)
        progress.update(95, loss=0.1)
        progress.update(100)
    assert out.getvalue().splitlines() == ["ode: 94/100, 0:07 left  loss 0.1235", "ode: 100/100, 0:00 left"]


def test_a_bar_on_a_terminal_and_silence_elsewhere():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("dmd", total=4, out=out) as progress:
        for step in range(1, 5):
            progress.update(step, loss=0.25)
    assert "dmd" in out.getvalue() and "4/4" in out.getvalue() and "loss 0.25" in out.getvalue()
    quiet = io.StringIO()
    with Progress("dmd", total=4, out=quiet, active=False) as progress:
        progress.update(4)
    assert quiet.getvalue() == ""
