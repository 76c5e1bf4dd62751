"""Checkpoints: bitwise resume, other numbers of processes, kills at any moment, and what must be refused.

This file is also a program: `python test_checkpoint.py save|load FOLDER` in two processes, `crash FOLDER ROUNDS` alone.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from aadkern_train.engine.checkpoint import CheckpointError, Checkpoints
from aadkern_train.engine.config import Config
from aadkern_train.engine.processes import Processes, reshard, shard, start, whole
from aadkern_train.engine.stops import SignalStop
from aadkern_train.learning.ema import Ema
from aadkern_train.learning.optim import Optimiser, build
from aadkern_train.stages.pretrain import Pretrain
from aadkern_train.trainer import run_recipe
from tests.engine.processes import BATCH, Net, environment, inputs, run_processes
from tests.stages.tiny_runs import small_recipe


class Inner(Config):
    lr: float = 1e-3
    levels: tuple[float, ...] = (1.0, 0.5)


class Settings(Config):
    steps: int = 10
    inner: Inner = Inner()


class Counters:
    """Plain values of a run."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {
            "best": float("-inf"),
            "third": 0.0,
            "seen": [],
            "note": None,
            "nested": {"n": 0},
        }

    def state_dict(self) -> dict[str, object]:
        return {"values": self.values, "table": torch.arange(3.0) * self.values["nested"]["n"]}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.values = state["values"]
        assert torch.equal(state["table"], torch.arange(3.0) * self.values["nested"]["n"])


def training(processes: Processes, seed: int = 0) -> dict[str, object]:
    torch.manual_seed(seed)
    net = Net()
    shard(net, processes, net.blocks, shard_blocks_above=0)
    optimiser = build(net.named_parameters(), kind="muon", lr=1e-2, muon_lr=0.02)
    return {"net": net, "optimiser": optimiser, "ema": Ema(net, 0.9, warmup=True), "counters": Counters()}


def train(parts: dict[str, object], processes: Processes, steps: range) -> None:
    net, counters = parts["net"], parts["counters"]
    for step in steps:
        x = inputs(step)[processes.local_slice(range(BATCH))]
        loss = (net(x[:, 0], x[:, 1]) - x[:, 2]).square().mean()
        loss.backward()
        parts["optimiser"].step()
        parts["optimiser"].zero_grad()
        parts["ema"].update()
        net.seen.add_(1)
        n = counters.values["nested"]["n"] + 1
        counters.values = {"best": float("inf"), "third": n / 3, "seen": [*range(n)], "note": "x", "nested": {"n": n}}


def everything(parts: dict[str, object]) -> dict[str, torch.Tensor]:
    """All tensors of the parts, whole."""
    reshard(parts["net"])
    out = {f"net.{name}": tensor for name, tensor in parts["net"].state_dict().items()}
    for kind, states in parts["optimiser"].state_dict().items():
        for name, state in states.items():
            out.update({f"{kind}.{name}.{key}": torch.as_tensor(value) for key, value in state.items()})
    out.update({f"ema.{name}": shadow for name, shadow in parts["ema"].shadows.items()})
    out["ema count"] = torch.tensor(parts["ema"].count)
    return {name: whole(tensor.detach()).clone() for name, tensor in out.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def processes():
    with start("cpu") as one:
        yield one


def test_resumed_training_ends_bitwise_equal(processes, tmp_path):
    unbroken = training(processes)
    train(unbroken, processes, range(6))
    first = training(processes)
    train(first, processes, range(3))
    saved = everything(first)
    path = Checkpoints(tmp_path, processes).save("ode", 3, first, Settings())
    assert path == tmp_path / "ode" / "step-3" and (tmp_path / "latest").read_text() == "ode/step-3\n"
    train(first, processes, range(3, 6))
    assert_same(everything(first), everything(unbroken))
    resumed = training(processes, seed=1)
    train(resumed, processes, range(7, 9))
    with torch.no_grad():
        resumed["net"](torch.randn(1, 3), torch.randn(1, 3))  # leaves gathered copies of the old weights behind
    found = Checkpoints(tmp_path, processes).load(resumed, Settings())
    assert (found.stage, found.step, found.path) == ("ode", 3, path)
    assert_same(everything(resumed), saved)
    values = resumed["counters"].values
    assert values == {"best": float("inf"), "third": 1.0, "seen": [0, 1, 2], "note": "x", "nested": {"n": 3}}
    train(resumed, processes, range(3, 6))
    assert_same(everything(resumed), everything(unbroken))
    assert resumed["counters"].values["third"] == unbroken["counters"].values["third"] == 2.0


def written(folder: Path) -> dict[str, bytes]:
    """What a checkpoint holds, but for DCP's metadata, in which is a name of each save."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".metadata"}


def test_two_processes_and_one_exchange_checkpoints(processes, tmp_path):
    alone = training(processes)
    train(alone, processes, range(2))
    Checkpoints(tmp_path / "one", processes).save("ode", 2, alone)
    run_processes(__file__, "exchange", str(tmp_path))
    assert_same(torch.load(tmp_path / "loaded.pt"), everything(alone))
    resumed = training(processes, seed=1)
    assert Checkpoints(tmp_path / "two", processes).load(resumed).step == 2
    assert_same(everything(resumed), torch.load(tmp_path / "saved.pt"))
    assert written(tmp_path / "behind/ode/step-2") == written(tmp_path / "two/ode/step-2")
    for name, tensor in everything(alone).items():  # and two processes trained as one did
        torch.testing.assert_close(tensor, everything(resumed)[name], rtol=2e-5, atol=2e-6)


def exchange(folder: Path) -> None:
    """In two processes: loads what one saved, and saves what two trained."""
    with start("cpu") as two:
        parts = training(two, seed=3)
        Checkpoints(folder / "one", two).load(parts)
        loaded = everything(parts)
        fresh = training(two)
        train(fresh, two, range(2))
        Checkpoints(folder / "two", two).save("ode", 2, fresh)
        trained = everything(fresh)
        behind = Checkpoints(folder / "behind", two, background=True)
        behind.save("ode", 2, fresh)
        train(fresh, two, range(2, 4))  # whose collectives do not meet the saving's
        behind.wait()
        if two.is_main:
            torch.save(loaded, folder / "loaded.pt")
            torch.save(trained, folder / "saved.pt")


class Marked:
    """Tensors and a value that all say the same step."""

    def __init__(self, step: int = -1) -> None:
        self.step, self.tensors = step, {f"t{i}": torch.full((50, 40), float(step)) for i in range(6)}

    def state_dict(self) -> dict[str, object]:
        return {"step": self.step, **self.tensors}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.step = state["step"]


def in_child(work) -> int:
    """Runs work in a forked process; its process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()  # os._exit would end without a word
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def saving(folder: Path, saves: int, die_at: int | None = None, background: bool = False) -> None:
    """Goes on from the latest checkpoint and saves again and again; with die_at, ends without warning at that call
    into the file system's durable operations."""
    with start("cpu") as processes:
        checkpoints = Checkpoints(folder, processes, keep=2, background=background)
        latest = checkpoints.latest()
        begin = 0 if latest is None else latest.step + 1
        calls = 0

        def dying(operation):
            def call(*arguments, **keywords):
                nonlocal calls
                calls += 1
                if calls == die_at:
                    os._exit(9)
                return operation(*arguments, **keywords)

            return call

        if die_at is not None:
            for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "rmdir"), (os, "unlink")):
                setattr(module, name, dying(getattr(module, name)))
        for step in range(begin, begin + saves):
            marked = Marked(step)
            checkpoints.save("dmd" if step > 20 else "ode", step, {"marked": marked})
            for tensor in marked.tensors.values():
                tensor.fill_(-1)  # what training goes on to do with it
        checkpoints.wait()


def checking(folder: Path, at_least: int) -> None:
    """Fails unless the folder loads a whole checkpoint that is no older than at_least."""
    with start("cpu") as processes:
        checkpoints, marked = Checkpoints(folder, processes), Marked()
        assert not list(folder.glob("*/*.tmp")), "unfinished saves are still there"
        if checkpoints.latest() is None:
            assert at_least < 0
            return
        saved = checkpoints.load({"marked": marked})
        assert saved.step >= at_least and marked.step == saved.step, (saved.step, marked.step, at_least)
        for name, tensor in marked.tensors.items():
            assert bool((tensor == saved.step).all()), (name, saved.step, tensor)
        (folder / "reached").write_text(str(saved.step))


def crash(folder: Path, rounds: int, background: bool = False) -> None:
    """Kills a saving process at random moments, then lets one die at each durable operation, checking after each."""
    chance = random.Random(rounds)

    def reached() -> int:
        return int((folder / "reached").read_text()) if (folder / "reached").exists() else -1  # killed before the first save

    def check() -> None:
        at_least = reached()
        status = os.waitstatus_to_exitcode(os.waitpid(in_child(lambda: checking(folder, at_least)), 0)[1])
        assert status == 0, f"the check ended with {status}"  # below 0: a signal

    for _ in range(rounds):
        child = in_child(lambda: saving(folder, 10**6, background=background))
        time.sleep(chance.uniform(0.02, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        check()
    begun, die_at = reached(), 0
    while True:
        die_at += 1
        child = in_child(lambda die_at=die_at: saving(folder, 1, die_at, background))
        status = os.waitpid(child, 0)[1]
        check()
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert die_at > 10 and reached() > begun
    # What a death before pruning left behind grows by at most one folder a death, and goes with the first save that ends.
    assert sum(path.is_dir() for path in folder.glob("*/step-*")) <= 3
    print(f"{rounds} kills, {die_at - 1} deaths at durable operations, step {reached()}")


SLOW = [pytest.param(60, how, marks=pytest.mark.slow) for how in ("", "background")]


@pytest.mark.parametrize(("rounds", "background"), [(8, ""), (3, "background"), *SLOW])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, rounds, background):
    command = [sys.executable, __file__, "crash", str(tmp_path), str(rounds), background]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr


def test_in_the_background_the_same_bytes_are_saved_while_training_goes_on(processes, tmp_path):
    parts = training(processes)
    plain, behind = (Checkpoints(tmp_path / name, processes, background=name == "behind") for name in ("plain", "behind"))
    for step in (1, 2):  # the second time into the memory of the first
        train(parts, processes, range(step, step + 1))
        plain.save("ode", step, parts)
        behind.save("ode", step, parts)
        train(parts, processes, range(5, 7))
    behind.wait()
    assert (tmp_path / "behind/latest").read_text() == "ode/step-2\n"
    for step in (1, 2):
        ours, theirs = written(tmp_path / f"behind/ode/step-{step}"), written(tmp_path / f"plain/ode/step-{step}")
        assert ours == theirs and len(ours) == 2, step


def test_latest_moves_when_all_is_written_and_an_error_is_told_at_the_next_save(processes, tmp_path, monkeypatch):
    checkpoints, go_on = Checkpoints(tmp_path, processes, background=True), threading.Event()
    checkpoints.save("ode", 1, linear(processes, 1.0))
    checkpoints.wait()
    whole_save = dcp.save

    def slow(*arguments, **options):
        assert go_on.wait(600)
        whole_save(*arguments, **options)
        if failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dcp, "save", slow)
    for step, failing in ((2, False), (3, True)):
        go_on.clear()
        parts = linear(processes, float(step))
        checkpoints.save("ode", step, parts)
        nn.init.constant_(parts["net"].weight, -1.0)  # as training goes on
        assert (tmp_path / "latest").read_text() == f"ode/step-{step - 1}\n"
        go_on.set()
        if failing:
            with pytest.raises(OSError, match="No space left on device") as told:
                checkpoints.save("ode", step + 1, linear(processes, 0.0))
            assert told.value.filename == str(tmp_path / "ode/step-3.tmp")
        checkpoints.wait()
    found = linear(processes, 0.0)
    assert checkpoints.load(found).step == 2 and first_weight(found) == 2


def test_a_run_that_saves_in_the_background_leaves_and_ends_as_one_that_does_not(tmp_path, monkeypatch):
    alone = [*(f"{name}.steps=0" for name in ("ode", "dmd", "dmd_continued", "adversarial")), "evaluate={every: 0, final_clips: 0}"]
    run_recipe(small_recipe(*alone), tmp_path / "plain")
    behind, plain_step = small_recipe(*alone, "checkpoint_async=true"), Pretrain.train_step

    def asked(self, step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain_step(self, step)

    monkeypatch.setattr(Pretrain, "train_step", asked)
    with pytest.raises(SignalStop, match="saved at pretrain, step 2"):
        run_recipe(behind, tmp_path / "behind")
    monkeypatch.undo()
    assert (tmp_path / "behind/checkpoints/latest").read_text() == "pretrain/step-2\n"
    assert not list((tmp_path / "behind").glob("checkpoints/*/*.tmp"))
    run_recipe(behind, tmp_path / "behind", resume=True)
    for part in ("checkpoints/pretrain/step-3/__0_0.distcp", "weights/pretrain/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "behind" / part).read_bytes() == (tmp_path / "plain" / part).read_bytes(), part


def linear(processes: Processes, value: float, size: int = 2) -> dict[str, nn.Module]:
    net = nn.Linear(size, size)
    nn.init.constant_(net.weight, value)
    return {"net": shard(net, processes)}


def first_weight(parts: dict[str, nn.Module]) -> float:
    return whole(parts["net"].weight)[0, 0].item()


def test_keeps_the_newest_and_the_end_of_earlier_stages(processes, tmp_path):
    checkpoints = Checkpoints(tmp_path, processes, keep=2)
    for stage, step in [("ode", 9), ("ode", 10), ("ode", 11), ("dmd", 5), ("dmd", 10), ("dmd", 100)]:
        checkpoints.save(stage, step, linear(processes, step))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")) == [
        "dmd/step-10",
        "dmd/step-100",
        "ode/step-11",
    ]
    found = linear(processes, 0.0)
    assert checkpoints.load(found).step == 100 and first_weight(found) == 100
    with pytest.raises(ValueError, match="saved already"):
        checkpoints.save("dmd", 100, linear(processes, 1))
    assert checkpoints.latest().step == 100


def test_nothing_but_latest_is_believed(processes, tmp_path):
    checkpoints = Checkpoints(tmp_path, processes)
    assert checkpoints.latest() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoints.load(linear(processes, 0.0))
    checkpoints.save("ode", 1, linear(processes, 1.0))
    shutil.copytree(tmp_path / "ode" / "step-1", tmp_path / "ode" / "step-2")  # whole, but `latest` never moved to it
    (tmp_path / "ode" / "step-3.tmp").mkdir()
    again = Checkpoints(tmp_path, processes)
    assert again.latest().step == 1 and not (tmp_path / "ode" / "step-3.tmp").exists()
    again.save("ode", 2, linear(processes, 2.0))
    found = linear(processes, 0.0)
    assert again.load(found).step == 2 and first_weight(found) == 2


def test_other_settings_are_named(processes, tmp_path):
    checkpoints = Checkpoints(tmp_path, processes)
    checkpoints.save("ode", 1, linear(processes, 1.0), Settings())
    assert checkpoints.load(linear(processes, 0.0), Settings()).config["steps"] == 10
    other = Settings(steps=20, inner=Inner(lr=2e-3))
    found = linear(processes, 0.0)
    with pytest.raises(CheckpointError, match=r"other settings: steps \(10 then, 20 now\), inner.lr \(0.001 then, 0.002"):
        checkpoints.load(found, other)
    with pytest.raises(CheckpointError, match=r"other settings: inner.lr"):
        checkpoints.load(found, other, ignore=("steps",))
    assert first_weight(found) == 0
    checkpoints.load(found, other, ignore=("steps", "inner"))
    checkpoints.load(found, other, allow_changes=True)
    assert first_weight(found) == 1


def test_other_parts_and_shapes_are_refused_before_anything_changes(processes, tmp_path):
    checkpoints = Checkpoints(tmp_path, processes)
    checkpoints.save("ode", 1, {**linear(processes, 1.0), "counters": Counters()})
    found = linear(processes, 0.0)
    with pytest.raises(CheckpointError, match=r"tensors differ from this run's: counters/table"):
        checkpoints.load(found)
    with pytest.raises(CheckpointError, match=r"net/weight has shape \(2, 2\), expected \(3, 3\)|net/bias has shape"):
        checkpoints.load({**linear(processes, 0.0, size=3), "counters": Counters()})
    odd = Counters()
    odd.values["more"] = 1
    with pytest.raises(CheckpointError, match=r"values differ from this run's: counters/values/more"):
        checkpoints.load({**found, "counters": odd})
    assert first_weight(found) == 0


def test_untrusted_folders_are_refused(processes, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "run", processes)
    checkpoints.save("ode", 1, linear(processes, 1.0))
    shutil.copytree(tmp_path / "run" / "ode", tmp_path / "foreign")
    pointer = tmp_path / "run" / "latest"
    for line in ("../foreign/step-1", "/etc/step-1", "ode/../../foreign/step-1", "ode/step-x", "", "ode"):
        pointer.write_text(line)
        with pytest.raises(CheckpointError, match=r"latest says .*; expected <stage>/step-<number>"):
            checkpoints.load(linear(processes, 0.0))
    (tmp_path / "run" / "away").symlink_to(tmp_path / "foreign")
    pointer.write_text("away/step-1\n")
    with pytest.raises(CheckpointError, match="outside of the run folder"):
        checkpoints.load(linear(processes, 0.0))
    pointer.write_text("ode/step-7\n")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoints.latest()
    pointer.write_text("ode/step-1\n")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="belongs to user"):
        checkpoints.load(linear(processes, 0.0))
    assert checkpoints.load(linear(processes, 0.0), trust=True).step == 1


def test_states_that_cannot_be_saved_exactly_are_refused(processes, tmp_path):
    class Holds:
        def __init__(self, value: object) -> None:
            self.value = value

        def state_dict(self) -> dict[str, object]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, object]) -> None:
            pass

    checkpoints = Checkpoints(tmp_path, processes)
    for value, message in [(Path("x"), "got PosixPath"), ({1: 2}, "keys of a state must be strings, got 1")]:
        with pytest.raises(TypeError, match=f"odd/value: .*{message}"):
            checkpoints.save("ode", 1, {"odd": Holds(value)})
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"optim\.Optimiser"):
        net(torch.ones(1, 2)).sum().backward()
        adam = torch.optim.Adam(net.parameters())
        adam.step()
        checkpoints.save("ode", 1, {"adam": adam})
    with pytest.raises(ValueError, match="stage must be a plain name"):
        checkpoints.save("../ode", 1, linear(processes, 0.0))
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, processes, keep=0)
    assert checkpoints.latest() is None


def test_state_json_is_readable_and_exact(processes, tmp_path):
    counters = Counters()
    counters.values["third"] = 0.1 + 0.2
    path = Checkpoints(tmp_path, processes).save("ode", 1, {"counters": counters}, Settings())
    header = json.loads((path / "state.json").read_text())
    assert header["values"]["counters/values/third"] == 0.1 + 0.2 and header["stage"] == "ode"
    assert isinstance(build(nn.Linear(2, 2).named_parameters()), Optimiser)


if __name__ == "__main__":
    if sys.argv[1] == "exchange":
        exchange(Path(sys.argv[2]))
    else:
        crash(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "background")
