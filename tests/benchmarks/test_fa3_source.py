"""FlashAttention 3 from a source folder: what is built, by which switches, where it lies, who finds it. A stand-in is built."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks import fa3, gpu_check, results

# As much of hopper/setup.py as is relied upon: it reads the switches, README.md and git, writes a config, and places a library.
SETUP = """
import itertools, os, pathlib, subprocess, sys
pathlib.Path("../README.md").read_text()
subprocess.run(["git", "submodule", "update", "--init", "../csrc/cutlass"], check=True)
assert pathlib.Path("../csrc/cutlass/include/cutlass").is_dir()
if os.environ.get("STAND_IN_FAILS"):
    sys.exit("error: no compiler")
off = {name for name in os.environ if name.startswith("FLASH_ATTENTION_DISABLE_") and os.environ[name] == "TRUE"}
has = lambda feature: f"FLASH_ATTENTION_DISABLE_{feature}" not in off
sizes = [size for size in (64, 96, 128, 192, 256) if has(f"HDIM{size}")]
types = ["bf16"] + ["fp16"] * has("FP16") + ["e4m3"] * has("FP8")
variants = [""] + [f"_{feature.lower()}" for feature in ("SPLIT", "PAGEDKV", "SOFTCAP", "PACKGQA") if has(feature)]
forward = [f"fwd_hdim{size}_{type}{variant}" for size, type, variant in itertools.product(sizes, types, variants)]
backward = [f"bwd_hdim{size}_{type}" for size, type in itertools.product(sizes, types) if has("BACKWARD")]
pathlib.Path("flash_attn_config.py").write_text(f"BUILT = {forward + backward!r}\\n")
made = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1], "flash_attn_3")
made.mkdir(parents=True)
(made / "_C.abi3.so").write_bytes(b"a library")
print("built once", flush=True)
"""
INTERFACE = """
import pathlib, flash_attn_3, flash_attn_config, torch
assert (pathlib.Path(flash_attn_3.__file__).parent / "_C.abi3.so").exists()
def flash_attn_func(q, k, v):
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2), None
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A checkout, to be built under tmp_path."""
    monkeypatch.setattr(fa3, "ROOT", tmp_path / "ours")
    hopper = tmp_path / "flash-attention" / "hopper"
    (hopper / "flash_attn_3").mkdir(parents=True)
    (hopper.parent / "csrc" / "cutlass" / "include" / "cutlass").mkdir(parents=True)
    for name, text in {"setup.py": SETUP, "flash_attn_interface.py": INTERFACE, "flash_attn_3/__init__.py": ""}.items():
        (hopper / name).write_text(text)
    return hopper.parent


@pytest.mark.parametrize("inside", ["", "hopper"])
def test_four_instances_are_built_and_the_source_stays_as_it_is(source, inside, monkeypatch):
    before = sorted(path for path in source.rglob("*"))
    place = fa3.built(source / inside)
    assert sorted(path for path in source.rglob("*")) == before
    names = [f"{direction}_hdim128_{dtype}" for direction in ("fwd", "bwd") for dtype in ("bf16", "fp16")]
    assert (place / "flash_attn_config.py").read_text() == f"BUILT = {names!r}\n"
    assert sorted(p.name for p in place.rglob("*.so")) == ["_C.abi3.so"] and place.parent == fa3.ROOT / "build"
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    assert fa3.built(source) == place  # as it lies there
    (source / "hopper" / "setup.py").write_text(SETUP + "# changed\n")
    with pytest.raises(RuntimeError, match=r"FlashAttention 3 of .* was not built: setup.py ended with status 1"):
        fa3.built(source)
    assert [p.name for p in place.parent.iterdir()] == [place.name]


def test_the_contender_runs_what_was_built(source):
    """In a process of its own, found by the module path as in the workers of gpu_check."""
    place = fa3.built(source)
    code = """
import torch
from benchmarks import contenders
from benchmarks.cases import attention_case
case = attention_case("7x3", 4, 2, 16)
attend = contenders.CONTENDERS["loop, FA3"].make(case, torch.device("cuda"))
q, k, v = (torch.randn(1, case.plan.q_len, 2, 16, requires_grad=True) for _ in range(3))
mine = contenders.CONTENDERS["loop, torch"].make(case, torch.device("cpu"))
assert torch.equal(attend(q, k, v), mine(q, k, v)) and contenders.CONTENDERS["loop, FA3"].trains(torch.device("cuda"))
import flash_attn_interface
print(flash_attn_interface.__file__)
"""
    path = os.pathsep.join((str(place), str(results.ROOT)))
    told = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == str(place / "flash_attn_interface.py")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("hopper/setup.py", "must be a checkout of Dao-AILab/flash-attention or its hopper folder"),
        ("hopper/flash_attn_interface.py", "must be a checkout of Dao-AILab/flash-attention or its hopper folder"),
        ("csrc/cutlass/include/cutlass", r"git submodule update --init csrc/cutlass.*whose csrc/cutlass is empty"),
    ],
)
def test_a_folder_that_is_no_source_is_refused_in_a_line(source, missing, said, capsys):
    gone = source / missing
    gone.rmdir() if gone.is_dir() else gone.unlink()
    with pytest.raises(ValueError, match=said):
        fa3.built(source)
    assert fa3.main([str(source)]) == 1 and len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(SystemExit):
        gpu_check.call_options(["--out", "x", "--fa3-source", str(source)])
    assert "--fa3-source must be" in capsys.readouterr().err.splitlines()[-1]


def test_gpu_check_builds_it_after_our_own_and_before_what_uses_it(source, tmp_path, monkeypatch):
    asked = gpu_check.call_options(["--out", str(tmp_path / "out"), "--plan", "attention", "--fa3-source", str(source)])
    assert asked.stages == ["build", "fa3", "cases"]
    assert gpu_check.call_options(["--out", "x", "--fa3-source", str(source), "--stages", "fa3"]).stages == ["fa3"]
    with pytest.raises(SystemExit):
        gpu_check.call_options(["--out", "x", "--stages", "fa3"])
    check = gpu_check.Check(asked)
    check.document = {"conditions": {}}
    commands = []
    monkeypatch.setattr(gpu_check, "run_limited", lambda command, *rest: commands.append(command) or "passed")
    assert check.fa3(1e12) == "passed"
    assert commands == [[sys.executable, "-m", "benchmarks.fa3", str(source)]]
    place = fa3.place_of(fa3.hopper_folder(source))
    assert check.environment["PYTHONPATH"].split(os.pathsep)[0] == str(place)
    assert check.document["conditions"]["fa3"] == f"{place.name}, of --fa3-source"
    monkeypatch.setattr(gpu_check, "run_limited", lambda *rest: "failed: exit status 1")
    before = dict(check.environment)
    assert check.fa3(1e12) == "failed: exit status 1" and check.environment == before
