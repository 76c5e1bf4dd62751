"""What aadkern.runtime.VERIFIED says of GPUs is held to the results files that it names, and "auto" to what it says."""

from __future__ import annotations

import copy
import json

import pytest

from aadkern import runtime
from benchmarks import results, verified
from benchmarks.verified import PROOF, not_run, shortcomings

ROOT = results.ROOT


def test_every_entry_of_a_gpu_names_a_results_file_that_proves_it():
    for what, gpu, file in verified.entries():
        assert shortcomings(results.read(ROOT / file), what, gpu) == [], f"{what}: {gpu}"


def test_the_readme_holds_the_rows_of_what_was_measured():
    files = sorted({file for _, _, file in verified.entries()})
    readme = (ROOT / "README.md").read_text()
    assert verified.with_rows(readme, list(verified.readme_rows([results.read(ROOT / file) for file in files]))) == readme


def document() -> dict:
    """A results file that proves sm90."""
    made = results.empty({"commit": "0123abcd", "changed_files": 0}, {})
    made["environment"] |= {"device": {"type": "cuda", "name": "NVIDIA H200"}, "backends": {"sm90": runtime.AVAILABLE}}
    passed = {"outcome": "passed", "seconds": 1.0, "message": ""}
    made["tests"] = [{"id": f"{file}::test_one", **passed} for file in PROOF["sm90"]]
    made["cases"] = [{"id": "7x3", "contenders": {"aadkern sm90": {"status": "timed", "reason": None}}}]
    return made


def test_what_does_not_prove_anything_is_found():
    proof = document()
    assert shortcomings(proof, "sm90", "NVIDIA H200") == []
    for change, told in (
        (lambda d: d["environment"]["device"].update(name="NVIDIA A100"), "it is of 'NVIDIA A100'"),
        (lambda d: d["environment"].update(commit=None), "its commit is None"),
        (lambda d: d["environment"].update(changed_files=2), "with 2 files changed"),
        (lambda d: d["environment"]["backends"].update(sm90="not built"), "sm90 was 'not built'"),
        (lambda d: d["tests"][0].update(outcome="skipped"), "no test of tests/sm90/test_sm90_gpu.py passed"),
        (
            lambda d: d["tests"].append({"id": "tests/attention/test_bad_input.py::x[1-sm90-cuda-64]", "outcome": "failed"}),
            "failed",
        ),
        (lambda d: d["tests"].append({"id": "tests/sm90/test_primitive_checks.py::y", "outcome": "lost"}), "lost"),
        (lambda d: d["cases"][0]["contenders"]["aadkern sm90"].update(status="refused", reason="wrong dq"), "wrong dq"),
        (lambda d: d["cases"].clear(), "no case compared"),
    ):
        broken = copy.deepcopy(proof)
        change(broken)
        assert told in " ".join(shortcomings(broken, "sm90", "NVIDIA H200"))


@pytest.mark.parametrize("what", PROOF)
def test_only_its_own_tests_prove_a_backend_or_room(what):
    """All tests of all the others passed, and every backend compared: that proves it not."""
    made = document()
    made["environment"]["backends"] = dict.fromkeys(runtime.BACKENDS, runtime.AVAILABLE)
    made["cases"][0]["contenders"] = {f"aadkern {name}": {"status": "timed", "reason": None} for name in runtime.BACKENDS}
    others = [file for other in PROOF if other != what for file in PROOF[other]]
    made["tests"] = [{"id": f"{file}::test_x", "outcome": "passed", "message": ""} for file in others]
    assert [told for told in shortcomings(made, what, "NVIDIA H200") if f"no test of {PROOF[what][0]} passed" in told]
    made["tests"] += [{"id": f"{file}::test_x", "outcome": "passed", "message": ""} for file in PROOF[what]]
    assert shortcomings(made, what, "NVIDIA H200") == []
    made["tests"].append({"id": "tests/attention/test_bad_input.py::x[2-sdpa-cuda-32]", "outcome": "failed", "message": ""})
    assert shortcomings(made, what, "NVIDIA H200") == []  # somebody else's


@pytest.mark.parametrize("what", PROOF)
def test_a_new_entry_wants_every_test_of_its_files(what):
    made = document()
    assert all(len(verified.gpu_tests(file)) > 0 for file in PROOF[what])
    passed = {"outcome": "passed", "seconds": 1.0, "message": ""}
    made["tests"] = [{"id": f"{file}::{name}[x]", **passed} for file in PROOF[what] for name in verified.gpu_tests(file)]
    assert not_run(made, what) == []
    left = made["tests"].pop()
    assert not_run(made, what) == [f"{left['id'].partition('[')[0]} was not run"]
    made["tests"].append({**left, "outcome": "skipped", "message": "Skipped: needs compute capability 8.9 or later"})
    assert "was skipped: Skipped: needs compute" in not_run(made, what)[0]
    made["tests"][-1]["message"] = "Skipped: needs two CUDA devices"
    assert not_run(made, what) == []


def files_of_a_gpu(folder, monkeypatch):
    """Two results files of one GPU, the first of which proves sm90 and the second noise; and a copy of what is edited."""
    for name in ("README.md", "aadkern/runtime.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text((ROOT / name).read_text())
    (folder / "tests").symlink_to(ROOT / "tests")
    (folder / "benchmarks" / "results").mkdir(parents=True)
    environment = results.environment("cpu")
    environment |= {"commit": "0123abcd", "changed_files": 0, "backends": {"sm90": runtime.AVAILABLE}}
    environment["device"] |= {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0"}
    case = results.read(ROOT / "benchmarks" / "results" / "attention-cpu.json")["cases"][0]
    ours, rival = (case["contenders"][name] for name in ("aadkern sdpa", "loop, torch"))
    case["contenders"] = {"aadkern sm90": ours, "loop, cuDNN": rival}
    files = []
    for what in ("sm90", "noise"):
        made = results.empty(copy.deepcopy(environment), {})
        made["tests"] = [
            {"id": f"{file}::{name}", "outcome": "passed", "seconds": 1.0, "message": ""}
            for file in PROOF[what]
            for name in verified.gpu_tests(file)
        ]
        made["cases"] = [case] if what == "sm90" else []
        files.append(folder / f"{what}.json")
        files[-1].write_text(json.dumps(made))
    monkeypatch.setattr(verified, "ROOT", folder)
    return files


def test_one_command_enters_what_files_prove(tmp_path, monkeypatch, capsys):
    files = files_of_a_gpu(tmp_path, monkeypatch)
    words = [*map(str, files), "--name", "h200"]
    assert verified.main(words) == 0 and not (tmp_path / "benchmarks" / "results" / "h200.json").exists()  # told, not written
    for _ in range(2):  # twice is once
        assert verified.main([*words, "--write"]) == 0
        told = capsys.readouterr().out
        assert "sm90: proven on NVIDIA H200" in told and "noise: proven on NVIDIA H200" in told
        assert "triton: not proven: no test of tests/attention/test_triton_attention_gpu.py passed" in told
        entered = {}
        exec((tmp_path / "aadkern" / "runtime.py").read_text(), entered)
        entry = "NVIDIA H200: benchmarks/results/h200.json"
        assert entered["VERIFIED"]["sm90"] == (entry,) and entered["VERIFIED"]["noise"] == ("the CPU interpreter", entry)
        assert entered["VERIFIED"]["triton"] == runtime.VERIFIED["triton"]
    whole = results.read(tmp_path / "benchmarks" / "results" / "h200.json")
    assert shortcomings(whole, "sm90", "NVIDIA H200") == shortcomings(whole, "noise", "NVIDIA H200") == []
    rows = (tmp_path / "README.md").read_text().partition(verified.BEGIN)[2].partition(verified.END)[0].splitlines()
    made = [row for row in rows if row.startswith("| NVIDIA H200 |")]
    assert len(made) == 3 and all("| aadkern sm90 |" in row and "loop, cuDNN" in row for row in made)


def test_files_that_do_not_belong_together_are_refused(tmp_path, monkeypatch, capsys):
    files = files_of_a_gpu(tmp_path, monkeypatch)
    other = json.loads(files[1].read_text())
    for part, told in (("commit", "one commit, got '0123abcd' and 'of another'"), ("sources", "one sources")):
        (tmp_path / "other.json").write_text(json.dumps({**other, "environment": {**other["environment"], part: "of another"}}))
        with pytest.raises(SystemExit):
            verified.main([str(files[0]), str(tmp_path / "other.json"), "--name", "h200", "--write"])
        assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        verified.main([str(files[0]), "--name", "../h200"])
    assert verified.main([str(files[0]), "--name", "h200", "--write"]) == 0
    with pytest.raises(SystemExit):
        verified.main([str(files[1]), "--name", "h200", "--write"])
    assert "h200.json holds another result" in capsys.readouterr().err


def test_auto_takes_sm90_only_once_it_is_verified(monkeypatch):
    """And what it cannot serve goes to the next."""
    monkeypatch.setattr(runtime, "reason_against", lambda backend, device: None)
    monkeypatch.setitem(runtime.VERIFIED, "sm90", ())
    assert runtime.choose_backend("auto", "cuda:0", "bfloat16", 128) == "triton"
    assert runtime.choose_backend("sm90", "cuda:0", "bfloat16", 128) == "sm90"
    monkeypatch.setitem(runtime.VERIFIED, "sm90", ("NVIDIA H200: benchmarks/results/h200.json",))
    for dtype, head_dim, chosen in (
        ("bfloat16", 128, "sm90"),
        ("float16", 64, "sm90"),
        ("float32", 128, "triton"),
        ("bfloat16", 96, "triton"),
        ("float64", 64, "sdpa"),
    ):
        assert runtime.choose_backend("auto", "cuda:0", dtype, head_dim) == chosen
    assert runtime.choose_backend("auto", "cpu", "bfloat16", 128) == "sdpa"


@pytest.mark.parametrize(("capability", "served"), [((9, 0), True), ((8, 0), False), ((10, 0), False), ((12, 0), False)])
def test_only_the_very_capability_is_served(capability, served, monkeypatch):
    """Code for sm_90a runs on 9.0 and on nothing later."""
    import torch

    from aadkern import _build

    monkeypatch.setattr(_build, "load_cuda", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = runtime._reason_against_sm90("cuda:1")
    assert (reason is None) == served
    assert served or f"compute capability {capability[0]}.{capability[1]}, not 9.0" in reason
    monkeypatch.setattr(torch.version, "hip", "6.4")  # an MI250 tells 9.0 too
    assert "AMD" in runtime._reason_against_sm90("cuda:1")
    monkeypatch.setattr(_build, "load_cuda", lambda: "not built: for a reason")
    assert runtime._reason_against_sm90("cuda") == "not built: for a reason"


def test_info_tells_what_was_compiled_and_what_ran(monkeypatch):
    from aadkern_train.cli import info_text

    lines = {line.split()[0]: line for line in info_text().splitlines() if "; ran on: " in line}
    assert set(lines) == set(runtime.COMPILED) and all("nothing yet" in line for line in lines.values())
    monkeypatch.setitem(runtime.VERIFIED, "triton", ("the CPU interpreter", "NVIDIA H200: benchmarks/results/h200.json"))
    lines = {line.split()[0]: line for line in info_text().splitlines() if "; ran on: " in line}
    assert lines["9.0"].endswith("ran on: NVIDIA H200: benchmarks/results/h200.json") and "nothing yet" in lines["8.9"]
