"""The GPU check: what crashes, hangs or breaks costs itself alone; a dry run walks the whole path without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import calls, goals, gpu_check, results, table
from benchmarks.cases import attention_case, case_of
from benchmarks.contenders import CONTENDERS
from benchmarks.journal import Journal, run_limited, supervise
from benchmarks.measure import step
from benchmarks.outcomes import error_message
from benchmarks.run import given_up
from tests.engine.processes import environment

ROOT = results.ROOT
ENVIRONMENT = environment(PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
ENVIRONMENT.pop("PYTEST_ADDOPTS", None)

WORKER = """
import os, sys, time
from benchmarks.journal import Journal
journal = Journal(sys.argv[1])
state = journal.read()
for item in ("good", "segfault", "hang", "exit", "last"):
    if item in state.ended or item in state.lost:
        continue
    journal.begin(item, 0.7)
    print("working at", item, flush=True)
    if item == "segfault":
        os.kill(os.getpid(), 11)
    if item == "hang":
        time.sleep(60)
    if item == "exit":
        journal.lose(item, "CUDA error: an illegal memory access was encountered")
        sys.exit(3)
    journal.end(item, {"pid": os.getpid()})
journal.complete()
"""


def run_worker(folder: Path, code: str, seconds: float, changed=lambda: None) -> tuple[str, Journal]:
    (folder / "worker.py").write_text(code)
    journal = Journal(folder / "journal")
    command = [sys.executable, str(folder / "worker.py"), str(journal.path)]
    return supervise(command, journal, folder / "log", time.monotonic() + seconds, ENVIRONMENT, ROOT, changed), journal


def test_a_worker_is_carried_past_crashes_and_hangs(tmp_path):
    seen = []
    outcome, journal = run_worker(tmp_path, WORKER, 60, lambda: seen.append(len(Journal(tmp_path / "journal").read().ended)))
    state = journal.read()
    assert outcome == "passed" and state.complete
    assert list(state.ended) == ["good", "last"] and state.ended["good"] != state.ended["last"]  # two processes
    assert state.lost == {
        "segfault": "the process was ended by SIGSEGV",
        "hang": "not done within 0.7 s",
        "exit": "CUDA error: an illegal memory access was encountered",
    }
    assert seen and seen[0] == 1
    assert (tmp_path / "log").read_text().split("\n")[:2] == ["working at good", "working at segfault"]


def test_a_worker_that_never_begins_is_given_up(tmp_path):
    outcome, _ = run_worker(tmp_path, "import sys; sys.exit(5)", 60)
    assert outcome == "failed: the process ended with status 5 before any item, see log"


def test_the_deadline_ends_a_worker_and_what_it_started(tmp_path):
    code = f"""
import subprocess, sys, time
from benchmarks.journal import Journal
Journal(sys.argv[1]).begin("slow", 60)
child = subprocess.Popen(["sleep", "60"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
time.sleep(60)
"""
    began = time.monotonic()
    outcome, journal = run_worker(tmp_path, code, 8)
    assert outcome == "failed: out of time" and time.monotonic() - began < 45
    assert journal.read().lost == {} and journal.read().open == ("slow", 60)
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}")
    deadline = time.monotonic() + 30
    while child.exists() and "\nState:\tZ" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or "\nState:\tZ" in (child / "status").read_text()


def test_a_line_cut_short_is_passed_over(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.begin("one", 5)
    journal.end("one", {"x": 1})
    with journal.path.open("a") as file:
        file.write('{"event": "begin", "ite')
    assert journal.read() == ({"one": {"x": 1}}, {}, None, False)


def test_a_command_under_a_limit(tmp_path):
    python, log = sys.executable, tmp_path / "log"
    assert run_limited([python, "-c", "print('said')"], log, 30, ENVIRONMENT, ROOT) == "passed"
    assert (
        run_limited([python, "-c", "import sys; sys.exit(2)"], log, 30, ENVIRONMENT, ROOT)
        == "failed: the process ended with status 2"
    )
    assert run_limited(["sleep", "60"], log, 0.3, ENVIRONMENT, ROOT) == "failed: not done within 0.3 s"
    assert log.read_text() == "said\n"


TESTS = """
import os, time, pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("n", range(3))
def test_right(n):
    assert n >= 0

def test_wrong():
    assert 1 + 1 == 3, "sums"

def test_takes_the_process_with_it():
    os.abort()

def test_hangs():
    time.sleep(60)

def test_skipped():
    pytest.skip("no such device")

@pytest.fixture
def broken():
    raise OSError("no library")

def test_with_a_broken_fixture(broken):
    pass

@pytest.mark.xfail(strict=True)
def test_known_fault():
    raise AssertionError

def test_after_all_that():
    pass
"""


def test_every_outcome_of_a_test_is_kept(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_not_importable.py").write_text("import no_such_module")
    journal = Journal(tmp_path / "journal")
    plugin = ["-p", "benchmarks.outcomes", "--journal", str(journal.path), "--test-limit", "1.5"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        *plugin,
        str(tmp_path),
    ]
    outcome = supervise(command, journal, tmp_path / "log", time.monotonic() + 100, ENVIRONMENT, tmp_path)
    assert outcome == "passed", (tmp_path / "log").read_text()
    records = {record["id"].partition("::")[2] or record["id"]: record for record in gpu_check.test_records(journal)}
    assert {name: record["outcome"] for name, record in records.items()} == {
        "test_not_importable.py": "error",
        **{f"test_right[{n}]": "passed" for n in range(3)},
        "test_wrong": "failed",
        "test_takes_the_process_with_it": "lost",
        "test_hangs": "lost",
        "test_skipped": "skipped",
        "test_with_a_broken_fixture": "error",
        "test_known_fault": "xfailed",
        "test_after_all_that": "passed",
    }
    assert records["test_wrong"]["message"] == "AssertionError: sums"
    assert records["test_takes_the_process_with_it"]["message"] == "the process was ended by SIGABRT"
    assert records["test_with_a_broken_fixture"]["message"] == "OSError: no library"
    assert "no_such_module" in records["test_not_importable.py"]["message"]
    document = results.empty(results.environment("cpu"), {})
    document["tests"] = list(records.values())
    assert results.document_problems({**document, "tests": gpu_check.test_records(journal)}) == []


def test_what_a_traceback_says():
    assert error_message(
        "def f():\n>   assert x\nE   AssertionError: dq: largest error 2\nE   assert 1\n\nfile.py:3: AssertionError"
    ) == ("AssertionError: dq: largest error 2")
    assert error_message("ImportError while importing\nlast line") == "last line" and error_message("") == ""


def test_who_crashed_twice_is_not_tried_a_third_time():
    first, second, third = (attention_case(name, 3, 1, 8) for name in ("7x3", "i2v_window9_sink1", "framewise"))
    lost = {step(first, "flex"): "SIGSEGV", step(first, "loop, torch"): "not done within 120 s", step(second, "flex"): "SIGSEGV"}
    skipped = given_up(lost, third, ["flex", "loop, torch"])
    assert skipped == {step(third, "flex"): "not tried: lost in 2 earlier cases", **lost}
    assert given_up(lost, second, ["flex"])[step(second, "flex")] == "SIGSEGV"


def test_files_with_tests_for_a_gpu_the_checks_of_primitives_first():
    files = gpu_check.marked_files()
    assert "tests/attention/test_bad_input.py" in files and "tests/attention/test_plans.py" not in files
    assert all("mark.gpu" in (ROOT / file).read_text() for file in files)
    places = [next((i for i, word in enumerate(gpu_check.FIRST) if word in file), 9) for file in files]
    assert places == sorted(places)


def test_a_long_log_keeps_its_ends(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"begin" + bytes(gpu_check.MOST_LOG_BYTES) + b"end")
    gpu_check.shorten(log)
    kept = log.read_bytes()
    assert kept.startswith(b"begin") and kept.endswith(b"end") and len(kept) < gpu_check.MOST_LOG_BYTES + 100
    log.write_bytes(b"an earlier stage" + kept)
    gpu_check.shorten(log, 16)  # what a stage before left is not touched, nor counted
    assert log.read_bytes() == b"an earlier stage" + kept


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    check = gpu_check.Check(gpu_check.call_options(["--out", str(tmp_path), "--device", "cpu", "--stages", "build", "tests"]))
    monkeypatch.setattr(check, "read_environment", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    monkeypatch.setattr(check, "build", lambda deadline: 1 / 0)
    monkeypatch.setattr(check, "tests", lambda *_: "passed")
    check.run()
    outcomes = {stage["name"]: stage["outcome"] for stage in results.read(tmp_path / "results.json")["stages"]}
    assert outcomes == {"build": "failed: ZeroDivisionError: division by zero", "tests": "passed"}


def test_a_rooms_figures_are_kept_whatever_they_are(tmp_path, monkeypatch):
    check = gpu_check.Check(gpu_check.call_options(["--out", str(tmp_path), "--device", "cpu", "--stages", "rooms"]))
    monkeypatch.setattr(gpu_check, "ROOMS", ("noise",))

    def run_room(command, log, limit, environment, folder, look):
        assert command[1:3] == ["-m", "benchmarks.noise"] and limit > 5
        Path(command[command.index("--out") + 1]).write_text('{"ratio": NaN, "ms": 1.5}')
        return "failed: not done"

    monkeypatch.setattr(gpu_check, "run_limited", run_room)
    monkeypatch.setattr(check, "read_environment", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    check.run()
    document = results.read(tmp_path / "results.json")
    assert document["rooms"] == {"noise": {"ratio": "NaN", "ms": 1.5}}
    assert document["stages"][0]["outcome"] == "failed: noise failed: not done"
    check.document["cases"] = "spoiled"
    check.write()
    assert json.loads((tmp_path / "results.json").read_text())["cases"] == "spoiled"


def test_streaming_without_diffusers_is_not_run_and_not_failed(tmp_path, monkeypatch):
    words = ["--out", str(tmp_path), "--stages", "streaming", "--commit", "0123abc"]
    check = gpu_check.Check(gpu_check.call_options(words))

    def run_room(command, log, limit, environment, folder, look):
        asked = [command[command.index(word) + 1] for word in ("-m", "--size", "--device", "--commit")]
        assert asked == ["benchmarks.streaming", "1.3B", "cuda", "0123abc"] and "14B" in command
        allowed = float(command[command.index("--limit") + 1])
        assert 0.95 * check.left < limit <= check.left + 1 and allowed < limit  # no other stage follows: all the time
        Path(command[command.index("--out") + 1]).write_text('{"not_run": "diffusers is missing"}')
        return "passed"

    monkeypatch.setattr(gpu_check, "run_limited", run_room)
    monkeypatch.setattr(check, "read_environment", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    check.run()
    document = results.read(tmp_path / "results.json")
    assert document["stages"][0]["outcome"] == "not run: diffusers is missing"
    assert "streaming: not run: diffusers is missing" in "\n".join(table.short_lines(document))


@pytest.mark.parametrize("missing", [None, "aadkern/_C.abi3.so", "cannot load"])
def test_kernels_brought_along_are_used_where_they_load_and_never_lost(missing, tmp_path, monkeypatch):
    package = tmp_path / "aadkern"
    package.mkdir()
    carried = package / "_C.abi3.so"
    if missing != "aadkern/_C.abi3.so":
        carried.write_bytes(b"carried")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check = gpu_check.Check(gpu_check.call_options(["--out", str(tmp_path / "out"), "--stages", "build"]))
    check.document = results.empty({}, {})
    built = []

    def run_command(command, log, limit, environment, folder):
        if "setup.py" not in command:
            return "failed: the process ended with status 1" if missing else "passed"
        assert "--inplace" not in command and environment["AADKERN_BUILD_CUDA"] == "1"
        folder = Path(command[command.index("--build-lib") + 1]) / "aadkern"
        folder.mkdir(parents=True)
        (folder / "_C.abi3.so").write_bytes(b"built")
        built.append(folder)
        return "passed"

    monkeypatch.setattr(gpu_check, "run_limited", run_command)
    assert check.build(time.monotonic() + 60) == "passed"
    assert carried.read_bytes() == (b"built" if missing else b"carried") and len(built) == bool(missing)
    assert check.document["conditions"]["cuda_library"].startswith("built in" if missing else "as found: sha256 ")
    assert {path.name for path in package.iterdir()} == {"_C.abi3.so"} | (
        {"_C.abi3.so.before"} if missing == "cannot load" else set()
    )
    assert missing != "cannot load" or (package / "_C.abi3.so.before").read_bytes() == b"carried"


def test_a_build_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    (tmp_path / "aadkern").mkdir()
    (tmp_path / "aadkern" / "_C.abi3.so").write_bytes(b"carried")
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "run_limited", lambda *_: "failed: not done within 1 s")
    check = gpu_check.Check(gpu_check.call_options(["--out", str(tmp_path / "out"), "--stages", "build"]))
    assert check.build(time.monotonic() + 60) == "failed: not done within 1 s"
    assert [path.read_bytes() for path in (tmp_path / "aadkern").iterdir()] == [b"carried"]


def test_plans_ask_for_what_there_is_and_fit_a_call():
    """At most nine minutes; every name of a case, contender, test file, stage and next call is one; together all test files."""
    asked_for = set()
    for name, call in calls.CALLS.items():
        options = gpu_check.call_options(["--out", "x", "--plan", name])
        assert options.minutes == call.minutes <= 9 and options.stages == list(call.stages)
        assert set(call.stages) <= {*gpu_check.STAGES, *gpu_check.LATER} and set(call.shares) <= set(call.stages[:-1])
        assert call.then is None or call.then in calls.CALLS
        assert [case_of(case).id for case in call.cases] == list(call.cases)
        assert set(call.contenders) <= set(CONTENDERS)
        if "tests" in call.stages:
            asked_for |= set(call.tests or set(gpu_check.marked_files()) - set(calls.CORRECT))
    assert set(gpu_check.marked_files()) == asked_for
    assert gpu_check.call_options(["--out", "x", "--plan", "rest", "--minutes", "4", "--stages", "rooms"]).stages == ["rooms"]


def test_a_plan_chooses_tests_cases_and_contenders(tmp_path, monkeypatch):
    words = ["--out", str(tmp_path), "--plan", "rest", "--stages", "tests", "cases", "--commit", "0123abc"]
    check = gpu_check.Check(gpu_check.call_options(words))
    commands = []

    def supervised(command, *rest):
        commands.append(command)
        return "passed"

    monkeypatch.setattr(gpu_check, "supervise", supervised)
    monkeypatch.setattr(check, "read_environment", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    check.run()
    of_tests, of_cases = commands
    assert not set(calls.CORRECT) & set(of_tests) and "tests/fp8/test_fp8_gpu.py" in of_tests
    assert of_cases[of_cases.index("--case") + 1] == "7x3_window9_sink3/1560x12x128"
    assert of_cases[of_cases.index("--contender") + 1 :] == list(calls.CALLS["rest"].contenders)


def timing(ms):
    return {"median_ms": ms, "tflops": 1000 / ms, "rounds_ms": [ms, ms], "ceiling_share": None}


def a_case(name, **contenders):
    """Forwards alone: {contender: milliseconds}."""
    made = {
        who: {"ours": not who.startswith(("loop", "flex")), "timings": {"forward": timing(ms)}} for who, ms in contenders.items()
    }
    sizes = {"heads": 12, "head_dim": 128, "tokens_per_frame": 1560, "dtype": "bfloat16"}
    return {"id": f"{name}/1560x12x128", "contenders": made, **sizes}


def test_what_was_learned():
    document = {"environment": {"device": {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0"}}, "rooms": {}}
    document["tests"] = [{"outcome": outcome} for outcome in ("passed", "passed", "lost", "skipped")]
    document["cases"] = [
        a_case("bidirectional", **{"aadkern sm90": 1.5, "sm90 wide": 1.4, "aadkern triton": 2.0, "loop, cuDNN": 1.75}),
        a_case("7x3", **{"aadkern sm90": 2.5, "sm90 wide": 1.8, "aadkern triton": 3.0, "loop, cuDNN": 2.7, "loop, FA3": 3.6}),
    ]
    told = "\n".join(calls.learned(document))
    assert "tests: 2 passed, 1 failed or lost, 1 skipped" in told
    assert "fastest of ours, forward: sm90 wide in 2 of 2 cases, 1.38 x the fastest rival (median of 2)" in told  # 1.25, 1.5
    assert "goals: 1 of 3 met" in told  # sm90 667 of 600; of its own rate there 60 %; triton 333 of 480
    document["rooms"] = {
        "streaming": {
            "sizes": {"1.3B": {"items": {"rate: merged, 1 NFE": {"fps": 90.0}, "rate: merged + graphs, 1 NFE": {"fps": 120.0}}}}
        },
        "sweep": {"cases": {"7x3": {"dq": [{"tile": "128x64", "ms": 1.0}], "dkv": [{"tile": "64x64", "reason": "spills"}]}}},
    }
    told = "\n".join(calls.learned(document))
    assert "streaming 1.3B: 120 FPS by merged + graphs, 1 NFE" in told and "fastest tiles, 7x3: dq 128x64" in told
    assert "--plan attention" in "".join(calls.next_lines("first")) and "benchmarks.verified" in "".join(calls.next_lines("rest"))


def test_goals_of_rates_are_asked_of_hopper_alone():
    """H100 and H200 alike; an H20 by its own rate; elsewhere only how ours stands to others."""
    case = a_case("7x3", **{"aadkern triton": 2.0, "loop, FA2": 2.0})
    case["contenders"]["aadkern triton"]["timings"]["both"] = timing(2.0)
    case["contenders"]["loop, FA2"]["timings"]["both"] = timing(2.1)
    document = {"cases": [case], "rooms": {"streaming": {"sizes": {"1.3B": {"items": {goals.STREAMED: {"fps": 120.0}}}}}}}
    told = {}
    for name, capability in (
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA H200", "9.0"),
        ("NVIDIA GH200 480GB", "9.0"),
        ("NVIDIA H20", "9.0"),
        ("NVIDIA GeForce RTX 4090", "8.9"),
    ):
        device = {"type": "cuda", "name": name, "capability": capability}
        told[name] = list(goals.judged({**document, "environment": {"device": device}}, table.times))
    assert told["NVIDIA H100 80GB HBM3"] == told["NVIDIA H200"] == told["NVIDIA GH200 480GB"] and len(told["NVIDIA H200"]) == 3
    assert "500 of 480 TFLOP/s" in told["NVIDIA H200"][0] and "500 of 133 TFLOP/s" in told["NVIDIA H20"][0]
    assert len(told["NVIDIA H20"]) == 2 and [line.rpartition("of ")[2] for line in told["NVIDIA GeForce RTX 4090"]] == [
        "1 x loop, FA2"
    ]


def test_the_shares_leave_time_for_every_stage():
    left = 9 * 60 - gpu_check.LAST_SECONDS
    for name, following in itertools.pairwise(gpu_check.STAGES):
        left -= gpu_check.SHARE[name] * left
        assert left > 20, following


MISSING = ("diffusers", "pydantic", "av", "rich", "yaml", "sklearn", "transformers", "einops", "hypothesis", "safetensors", "PIL")
WITHOUT = f"""
import functools, importlib.machinery
finder = importlib.machinery.PathFinder
def without(find, name, *rest):
    return None if name.partition(".")[0] in {MISSING!r} else find(name, *rest)
finder.find_spec = functools.partial(without, finder.find_spec)  # no method of pytest's hook, which takes it for its own
"""


def test_a_dry_run_from_end_to_end_on_a_bare_machine(tmp_path):
    """With torch, Triton, numpy and pytest alone: every test for a GPU is collected that is collected here."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    bare, out = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}, tmp_path / "out"
    refused = subprocess.run([sys.executable, "-c", "import hypothesis"], env=bare, capture_output=True, text=True)
    assert "No module named 'hypothesis'" in refused.stderr
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(out), "--device", "cpu", "--minutes", "4"]
    words = ["--case", "ring_chunk/2x2x8", "7x3/2x2x8", "--contender", "aadkern sdpa", "loop, torch", "--seconds", "0.05"]
    words += ["--stages", "tests", "cases", "--commit", "0123abc"]
    done = subprocess.run([*command, *words], cwd=ROOT, env=bare, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    document = results.read(out / "results.json")
    assert [stage["outcome"] for stage in document["stages"]] == ["passed", "passed"]
    assert {test["outcome"] for test in document["tests"]} == {"skipped"}
    assert all(re.search("needs (a|two) CUDA device", test["message"]) for test in document["tests"])
    assert [case["id"] for case in document["cases"]] == ["ring_chunk/2x2x8", "7x3/2x2x8"]
    timed = {name: who["status"] for name, who in document["cases"][1]["contenders"].items()}
    assert timed == {"aadkern sdpa": "timed", "loop, torch": "timed"}
    assert document["environment"]["commit"] == "0123abc" and document["not_reached"] == []
    assert "7x3/2x2x8 backward" in done.stdout and "loop, torch" in (out / "table.txt").read_text()
    files = sorted(file.name for file in out.iterdir())
    assert files == ["chart.svg", "log.txt", "results.json", "table.txt"]
    log = (out / "log.txt").read_text()
    assert 0 == log.index("==== tests") < log.index("==== cases") < log.index("7x3/2x2x8")
    assert json.loads((out / "results.json").read_text()) == document

    found = {test["id"] for test in document["tests"]}
    plain = ["-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--disable-warnings"]
    marked = (str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    everything = sorted(set(marked) - {"tests/sm90/test_sanitizer.py"})  # a stage of its own
    command = [sys.executable, "-m", "pytest", *plain, "-m", "gpu", "--collect-only", *everything]
    here = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert {line for line in here.stdout.splitlines() if "::" in line} == found, here.stdout[-2000:] + here.stderr
    assert len(found) > 300
