"""The same run shared by processes in other ways: their clips, their tokens, or whole networks in groups."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from aadkern_train.engine.processes import start
from aadkern_train.trainer import run_recipe
from tests.engine.processes import run_processes
from tests.stages.tiny_runs import small_recipe

# AdamW at a small rate: Muon's orthogonal updates blow rounding up in so small a network (test_optim compares those).
GENTLE = "{kind: adamw, lr: 1.0e-4, warmup_steps: 0}"
RATES = [f"{name}.lr=1e-4" for name in ("dmd.generator", "dmd.fake", "adversarial.generator", "adversarial.discriminator")]
SHORT = [f"{stage}={{steps: 2, optimiser: {GENTLE}}}" for stage in ("pretrain", "ode")]
SHORT += ["dmd.steps=2", "adversarial={steps: 2, discriminator_first: 1, heads_lr: 1.0e-4}", "dmd_continued.steps=0", *RATES]
SHORT += ["evaluate={every: 0, clips: 4, final_clips: 4}"]


def losses(path: Path) -> dict[tuple[str, int], dict[str, float]]:
    lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    kept = {(line["stage"], line["step"]): line for line in lines if "kind" not in line}
    others = ("stage", "step", "seconds", "speed")
    return {key: {name: line[name] for name in line if name not in others} for key, line in kept.items()}


def close(one: Path, other: Path) -> None:
    ours, theirs = losses(one), losses(other)
    assert ours.keys() == theirs.keys() and len(ours) == 8
    for key, values in theirs.items():
        assert values == pytest.approx(ours[key], rel=1e-4, abs=1e-6), key  # measured: 3e-6
    for stage in ("pretrain", "ode", "dmd", "adversarial"):
        single, shared = (load_file(path / "weights" / stage / "diffusion_pytorch_model.safetensors") for path in (one, other))
        worst = max(float((single[name] - shared[name]).abs().max()) for name in single)
        assert worst < 1e-6, stage  # measured: 6e-8; a step moves a weight by 1e-4


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    path = tmp_path_factory.mktemp("one") / "run"
    run_recipe(small_recipe(*SHORT), path)
    return path


LAYOUTS = [
    (2, ["parallel.sequence=2"]),
    pytest.param(4, ["parallel.sequence=2"], marks=pytest.mark.slow),
    pytest.param(4, ["parallel={sequence: 2, replicate: 2}"], marks=pytest.mark.slow),
    pytest.param(4, ["parallel.sequence=4"], marks=pytest.mark.slow),
    pytest.param(2, ["parallel.replicate=2"], marks=pytest.mark.slow),
    pytest.param(3, ["parallel.sequence=3"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("count, words", LAYOUTS)
def test_every_layout_trains_alike_and_one_process_resumes_it(one, tmp_path, count, words):
    path = tmp_path / "run"
    run_processes(__file__, str(path), *words, count=count, timeout=400)
    close(one, path)
    shutil.rmtree(path / "weights" / "adversarial")  # as if killed within stage III, and gone on with alone
    (path / "checkpoints" / "latest").write_text("adversarial/step-1\n")
    run_recipe(small_recipe(*SHORT), path, resume=True)
    close(one, path)


@pytest.mark.parametrize("parallel", ["{sequence: 2}", "{replicate: 3}"])
def test_parts_that_do_not_divide_the_processes_are_refused(tmp_path, parallel):
    with pytest.raises(ValueError, match=r"parallel must have parts whose product divides the 1 processes, got replicate \d"):
        run_recipe(small_recipe(f"parallel={parallel}"), tmp_path / "run")
    with start("cpu") as processes:
        assert (processes.data_size, processes.sequence_size, processes.speaks) == (1, 1, True)


if __name__ == "__main__":
    run_recipe(small_recipe(*SHORT, *sys.argv[2:]), Path(sys.argv[1]))
