"""What aadkern.runtime.VERIFIED says of GPUs is held to the results files that it names, and "auto" to what it says."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from aadkern import runtime
from benchmarks import results

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_A_GPU = {"cpu", "the CPU interpreter"}
ENTRY = re.compile(r"(?P<gpu>.+): (?P<file>benchmarks/results/[\w.-]+\.json)")
# The files whose tests on a GPU prove a backend: some must have passed, none may have failed, nor any that names the backend.
PROOF = {"sm90": ("tests/test_sm90_gpu.py", "tests/test_sm90_ladder.py"), "triton": ("tests/test_bad_input.py",)}
BAD_OUTCOMES = ("failed", "error", "lost")


def shortcomings(document: dict, backend: str, gpu: str) -> list[str]:
    """Why a results file does not prove that a backend is right on a GPU; empty if it does."""
    at, found = document["environment"], []
    if at["device"]["type"] != "cuda" or at["device"]["name"] != gpu:
        found.append(f"it is of {at['device']['name']!r} ({at['device']['type']})")
    if not at["commit"] or at["changed_files"]:
        found.append(f"its commit is {at['commit']!r} with {at['changed_files']} files changed")
    if at["backends"].get(backend) != runtime.AVAILABLE:
        found.append(f"{backend} was {at['backends'].get(backend)!r}")
    for file in PROOF[backend]:
        if not any(test["id"].startswith(f"{file}::") and test["outcome"] == "passed" for test in document["tests"]):
            found.append(f"no test of {file} passed")
    about = [t for t in document["tests"] if t["id"].startswith(PROOF[backend]) or backend in t["id"]]
    found += [f"{test['id']} {test['outcome']}" for test in about if test["outcome"] in BAD_OUTCOMES]
    name = f"aadkern {backend}"
    contenders = [(case["id"], case["contenders"][name]) for case in document["cases"] if name in case["contenders"]]
    found += [
        f"{name} was {c['status']} in {case}: {c['reason']}" for case, c in contenders if c["status"] not in ("timed", "checked")
    ]
    if not contenders:
        found.append(f"no case compared {name} with fp64")
    return found


def test_every_entry_of_a_gpu_names_a_results_file_that_proves_it():
    for backend, entries in runtime.VERIFIED.items():
        for entry in set(entries) - WITHOUT_A_GPU:
            said = ENTRY.fullmatch(entry)
            assert said, f"{backend}: {entry!r} is not '<GPU>: benchmarks/results/<file>.json'"
            assert shortcomings(results.read(ROOT / said["file"]), backend, said["gpu"]) == [], f"{backend}: {entry}"


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
        (lambda d: d["tests"][0].update(outcome="skipped"), "no test of tests/test_sm90_gpu.py passed"),
        (lambda d: d["tests"].append({"id": "tests/test_bad_input.py::x[sm90-cuda]", "outcome": "failed"}), "failed"),
        (lambda d: d["tests"].append({"id": "tests/test_sm90_ladder.py::y", "outcome": "lost"}), "lost"),
        (lambda d: d["cases"][0]["contenders"]["aadkern sm90"].update(status="refused", reason="wrong dq"), "wrong dq"),
        (lambda d: d["cases"].clear(), "no case compared"),
    ):
        broken = copy.deepcopy(proof)
        change(broken)
        assert told in " ".join(shortcomings(broken, "sm90", "NVIDIA H200"))


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
    monkeypatch.setattr(_build, "load_cuda", lambda: "not built: for a reason")
    assert runtime._reason_against_sm90("cuda") == "not built: for a reason"
