"""What does not fit a run on prepared data is told by its setting's name, with what to do, before any weight is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("av")

from aadkern_train import cli
from aadkern_train.prepared.format import Prepared
from aadkern_train.prepared.shards import TensorFile, write_tensors
from aadkern_train.stages.dmd import DmdWarmUp
from aadkern_train.worlds.latents import LatentsWorld
from tests.engine.processes import environment
from tests.prepared.prepared_data import CHANNELS, TEXT_DIM, write_prepared
from tests.stages.wan_runs import save_transformer, save_vae, words, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    vae = Prepared(folder / "data").header["vae"]
    write_prepared(folder / "two levels", "pairs", count=2, levels=[1.0, 0.8333, 0.0], vae=vae)
    write_prepared(folder / "longer", "pairs", count=2, levels=[1.0, 0.0], frames=4, vae=vae)
    write_prepared(folder / "foreign", "pairs", count=2, levels=[1.0, 0.0], vae="another")
    write_prepared(folder / "foreign texts", "prompts", count=2, vae=None, text_encoder="another")
    write_prepared(folder / "told", count=10, vae=vae, text_encoder="one")
    save_vae(folder / "other" / "vae", seed=1)
    save_transformer(folder / "wide", text_dim=TEXT_DIM + 1)
    save_transformer(folder / "many", in_channels=CHANNELS + 1)
    save_transformer(folder / "coarse", patch_size=(1, 1, 1))
    for name, lacks in (("no null", None), ("no negative", "negative")):
        shutil.copytree(folder / "data", folder / name)
        file = folder / name / "null.safetensors"
        kept = {key: TensorFile(file).read(key) for key in TensorFile(file).header if lacks is not None and key != lacks}
        file.unlink() if lacks is None else write_tensors(file, kept)
    return folder


def refused(command: list[str], capsys) -> str:
    """The one line of a run that ends with status 2."""
    assert cli.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aad train: ")
    return line


RIGHT = r"`aad pairs --wan TEACHER --prompts \S+/data --out NEW --levels 1 --frames 9 --size 32x48` makes those"
PROMPTS = ["data.path={parts}/prompts", "data.curated={parts}/data"]
CASES = [
    (["models.teacher="], r"models.teacher must name a network's folder in diffusers' format, say WAN/transformer"),
    (["models.generator="], r"models.generator must name a network's folder"),
    (["ode.pairs_from="], rf"ode.pairs_from must name a folder of `aad pairs`, got '': {RIGHT}"),
    (["data.path="], r"data.path must name a folder that `aad prepare` made"),
    (["data.path=nowhere"], r"data.path: nowhere must be a folder of prepared data, it has no dataset.json"),
    (["data.curated="], r"data.curated: a folder of prepared data must be named, got ''"),
    (["validation.path="], r"validation.path: a folder of prepared data must be named, got ''"),
    (["data.parts="], r"data.parts must name a Wan folder"),
    (["data.parts={parts}/data"], r"data.parts must be a Wan folder with a vae, \S+/data has no vae/config.json"),
    (["data.parts={parts}/other"], r"data.parts must have the vae that data.path was made with, \w{32}, \S+ has \w{32}"),
    (["ode.pairs_from={parts}/data"], rf"ode.pairs_from must be a folder of `aad pairs`, \S+ holds clips: {RIGHT}"),
    (["ode.pairs_from={parts}/two levels"], rf"ode.pairs_from must hold levels \[1.0, 0.0\], got \[1.0, 0.8333, 0.0\]: {RIGHT}"),
    (["ode.pairs_from={parts}/longer"], rf"ode.pairs_from must hold clips \(3, 16, 4, 6\), got \(4, 16, 4, 6\): {RIGHT}"),
    (["ode.pairs_from={parts}/foreign"], rf"ode.pairs_from must be made with the vae of data.path, \w+, got another: {RIGHT}"),
    ([*PROMPTS[:1], "evaluate.final_clips=0"], r"task must be t2v where data.path holds prompts alone, as \S+ does; `aad prepare`"),
    ([*PROMPTS[:1], "task=t2v", "evaluate.final_clips=0"], r"adversarial must have real clips, data.path holds prompts alone"),
    (["data.path={parts}/no null"], r"no null/null.safetensors is missing"),
    (["data.path={parts}/no negative"], r"null must be one of empty, as \S+ \S+ holds, got 'negative'"),
    (["models.teacher={parts}/wide"], r"models.teacher must be a network with text_dim 16, the captions', got 17"),
    (["models.discriminator={parts}/many"], r"models.discriminator must be a network with in_channels 16, the latents', got 17"),
    (
        ["models.fake={parts}/coarse"],
        r"models.fake must be a network with patch_size \[1, 2, 2\], network.patch's, got",
    ),
    (["adversarial.layers=[0,5]"], r"adversarial.layers must be blocks below 3, got \[0, 5\]"),
    (["validation.path={parts}/prompts"], r"validation.path must have first frames of .* for i2v, it has prompts without images"),
    (
        ["data.path={parts}/told", "validation.path={parts}/foreign texts"],
        r"validation.path must be made with the text_encoder of data.path, one, got another",
    ),
]


@pytest.mark.parametrize(("change", "says"), CASES)
def test_what_does_not_fit_is_told_before_weights_are_read(parts, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.setattr("aadkern_train.networks.networks.fill", lambda *_: pytest.fail("weights were read"))
    given = words(parts, "data.frame=[16,4,6]", *(word.format(parts=parts) for word in change))
    line = refused(["train", "wan_smoke", f"out={tmp_path / 'run'}", *given], capsys)

    assert re.search(says, line), line


def run_words(parts: Path, *more: str) -> list[str]:
    """One stage alone, unless ``more`` says otherwise, unmeasured."""
    return words(parts, "evaluate.final_clips=0", "dmd.steps=0", "adversarial.steps=0", *more)


def damaged(file: Path, byte: int = -5) -> None:
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(("data", "stages"), [("pairs", []), ("data", ["ode.steps=0", "dmd={steps: 3, start: null}"])])
def test_a_damaged_shard_is_named_with_what_makes_it_again(parts, tmp_path, capsys, data, stages):
    shutil.copytree(parts / data, tmp_path / "damaged")
    damaged(tmp_path / "damaged" / "shard-00000.text.safetensors")
    where = f"ode.pairs_from={tmp_path}/damaged" if data == "pairs" else f"data.path={tmp_path}/damaged"
    assert cli.main(["train", "wan_smoke", f"out={tmp_path / 'run'}", *run_words(parts, "ode.steps=9", where, *stages)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    maker = "aad pairs" if data == "pairs" else "aad prepare"
    assert re.search(rf"item 'item-0\d' of shard 0 is damaged: the crc32 of its text is .*then `{maker}` as before", line), line


def test_a_resumed_run_wants_the_data_and_pairs_that_it_began_with(parts, tmp_path, capsys):
    for name in ("data", "pairs"):
        shutil.copytree(parts / name, tmp_path / name)
    run, own = tmp_path / "run", [f"data.path={tmp_path}/data", f"ode.pairs_from={tmp_path}/pairs"]

    def stopped(self, step):
        raise ValueError("stopped here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aadkern_train.stages.ode.OdeInitialisation.train_step", stopped)
        assert "stopped here" in refused(["train", "wan_smoke", f"out={run}", *run_words(parts, *own)], capsys)
    for name, setting in (("data", "data"), ("pairs", "ode.pairs_from")):
        lines = tmp_path / name / "shard-00000.jsonl"
        before = lines.read_text()
        lines.write_text(before.replace("caption 1", "caption one"))
        line = refused(["train", f"resume={run}"], capsys)
        assert f"{setting} must be what the run began with, it has changed since" in line, line
        lines.write_text(before)
    assert cli.main(["train", f"resume={run}"]) == 0


def test_what_is_not_finite_names_the_step_and_its_samples(parts, tmp_path, capsys):
    pairs = tmp_path / "pairs"
    shutil.copytree(parts / "pairs", pairs)
    for file in pairs.glob("*.latents.safetensors"):
        held = TensorFile(file)
        sums = write_tensors(file, {name: held.read(name).fill_(float("nan")) for name in held.header})
        lines = file.with_name(file.name.replace("latents.safetensors", "jsonl"))
        records = [json.loads(line) for line in lines.read_text().splitlines()]
        for record in records:
            record["crc32"]["latents"] = sums[record["id"]]
        lines.write_text("".join(json.dumps(record) + "\n" for record in records))
    run = tmp_path / "run"
    given = run_words(parts, f"ode.pairs_from={pairs}", "ode.batch=3")
    assert cli.main(["train", "wan_smoke", f"out={run}", *given]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    named = re.search(r"ode, step 0: loss, grad_norm is not finite \(samples: (.*)\); the last checkpoint is untouched", line)
    assert named is not None, line
    told = [
        record["text"] for record in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if record.get("kind") == "note"
    ]
    assert told == [f"loss, grad_norm is not finite; the samples: {named[1]}"]
    assert all(re.fullmatch(r"pair item-0\d", name) for name in named[1].split(", "))


def test_the_samples_of_a_step_are_the_clips_that_it_read(parts, tmp_path, monkeypatch, capsys):
    step = DmdWarmUp.train_step
    monkeypatch.setattr(DmdWarmUp, "train_step", lambda self, i: {**step(self, i), "loss": float("nan")})
    read: list[str] = []

    plain = LatentsWorld.condition

    def noted(self, samples, split="train"):
        made = plain(self, samples, split)
        read.extend(f"{split} {caption.replace('caption ', 'item-0')}" for caption in self.describe(made))
        return made

    monkeypatch.setattr(LatentsWorld, "condition", noted)
    given = run_words(parts, "ode.steps=0", "dmd={steps: 1, batch: 3, fake_rollouts: fresh}")
    assert cli.main(["train", "wan_smoke", f"out={tmp_path / 'run'}", *given]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    train = list(dict.fromkeys(name for name in read if name.startswith("train")))
    assert f"dmd, step 0: loss is not finite (samples: {', '.join(train)[:60]}" in line, line


class Sends:
    """``train_step`` of a stage, that sends this process signals in its second step."""

    def __init__(self, stage: type, *numbers: int) -> None:
        self.plain, self.numbers = stage.train_step, numbers

    def __get__(self, stage, kind=None):
        def train_step(step: int) -> dict[str, float]:
            if step == 1:
                for number in self.numbers:
                    os.kill(os.getpid(), number)
                    time.sleep(0.05)
            return self.plain(stage, step)

        return train_step


def bytes_of(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in (run / "weights").rglob("*") if file.is_file()}


TWO = ["ode.steps=0", "dmd.steps=3", "checkpoint_every=9"]


def test_a_run_that_is_asked_to_leave_saves_and_goes_on_bitwise(parts, tmp_path, monkeypatch, capsys):
    assert cli.main(["train", "wan_smoke", f"out={tmp_path / 'whole'}", *run_words(parts, *TWO)]) == 0
    capsys.readouterr()
    for number, status in ((signal.SIGTERM, 143), (signal.SIGUSR1, 138)):
        run = tmp_path / number.name
        before = signal.getsignal(number)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DmdWarmUp, "train_step", Sends(DmdWarmUp, number))
            assert cli.main(["train", "wan_smoke", f"out={run}", *run_words(parts, *TWO)]) == status
        assert signal.getsignal(number) is before and not (run / "lock").exists()
        told = [line for line in capsys.readouterr().err.splitlines() if line]
        assert told[-1] == f"aad train: saved at dmd, step 2, as {number.name} asked; resume=RUN goes on from it"
        assert told[-2] == f"{number.name}: saves after this step and leaves; once more leaves at once"
        assert (run / "checkpoints" / "latest").read_text() == "dmd/step-2\n" and not list((run / "weights").glob("dmd*"))
        assert cli.main(["train", f"resume={run}"]) == 0
        assert bytes_of(run) == bytes_of(tmp_path / "whole") and len(bytes_of(run)) >= 6


def test_a_second_signal_ends_it_at_once(parts, tmp_path):
    """In an interpreter of its own: a fork of one whose libraries have threads may crash before any signal comes."""
    words = [f"out={tmp_path / 'run'}", *run_words(parts, *TWO)]
    done = subprocess.run([sys.executable, __file__, *words], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


if __name__ == "__main__":
    DmdWarmUp.train_step = Sends(DmdWarmUp, signal.SIGUSR1, signal.SIGTERM)
    sys.exit(cli.main(["train", "wan_smoke", *sys.argv[1:]]))
