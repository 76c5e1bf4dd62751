"""The GPU check: what crashes, hangs or breaks costs itself alone; a dry run walks the whole path without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import gpu_check, results, table
from benchmarks.cases import attention_case
from benchmarks.journal import Journal, run_limited, supervise
from benchmarks.measure import step
from benchmarks.outcomes import said
from benchmarks.run import given_up

ROOT = results.ROOT
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
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
    outcome, journal = run_worker(tmp_path, code, 4)
    assert outcome == "failed: out of time" and time.monotonic() - began < 10
    assert journal.read().lost == {} and journal.read().open == ("slow", 60)
    child = Path(f"/proc/{(tmp_path / 'child').read_text()}")
    deadline = time.monotonic() + 5
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
    assert said("def f():\n>   assert x\nE   AssertionError: dq: largest error 2\nE   assert 1\n\nfile.py:3: AssertionError") == (
        "AssertionError: dq: largest error 2"
    )
    assert said("ImportError while importing\nlast line") == "last line" and said("") == ""


def test_who_crashed_twice_is_not_tried_a_third_time():
    first, second, third = (attention_case(name, 3, 1, 8) for name in ("7x3", "i2v_window9_sink1", "framewise"))
    lost = {step(first, "flex"): "SIGSEGV", step(first, "loop, torch"): "not done within 120 s", step(second, "flex"): "SIGSEGV"}
    skipped = given_up(lost, third, ["flex", "loop, torch"])
    assert skipped == {step(third, "flex"): "not tried: lost in 2 earlier cases", **lost}
    assert given_up(lost, second, ["flex"])[step(second, "flex")] == "SIGSEGV"


def test_files_with_tests_for_a_gpu_the_ladder_first():
    files = gpu_check.marked_files()
    assert "tests/test_bad_input.py" in files and "tests/test_plans.py" not in files
    assert all("mark.gpu" in (ROOT / file).read_text() for file in files)
    places = [next((i for i, word in enumerate(gpu_check.FIRST) if word in file), 9) for file in files]
    assert places == sorted(places)


def test_a_long_log_keeps_its_ends(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"begin" + bytes(gpu_check.MOST_LOG_BYTES) + b"end")
    gpu_check.shorten(log)
    kept = log.read_bytes()
    assert kept.startswith(b"begin") and kept.endswith(b"end") and len(kept) < gpu_check.MOST_LOG_BYTES + 100


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, monkeypatch):
    check = gpu_check.Check(
        gpu_check.arguments().parse_args(["--out", str(tmp_path), "--device", "cpu", "--stages", "build", "tests"])
    )
    monkeypatch.setattr(check, "look", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    monkeypatch.setattr(check, "build", lambda deadline: 1 / 0)
    monkeypatch.setattr(check, "tests", lambda *_: "passed")
    check.run()
    outcomes = {stage["name"]: stage["outcome"] for stage in results.read(tmp_path / "results.json")["stages"]}
    assert outcomes == {"build": "failed: ZeroDivisionError: division by zero", "tests": "passed"}


def test_a_rooms_figures_are_kept_whatever_they_are(tmp_path, monkeypatch):
    check = gpu_check.Check(gpu_check.arguments().parse_args(["--out", str(tmp_path), "--device", "cpu", "--stages", "rooms"]))
    monkeypatch.setattr(gpu_check, "ROOMS", ("noise",))

    def run_room(command, log, limit, environment, folder):
        assert command[1:3] == ["-m", "benchmarks.noise"] and limit > 5
        Path(command[command.index("--out") + 1]).write_text('{"ratio": NaN, "ms": 1.5}')
        return "failed: not done"

    monkeypatch.setattr(gpu_check, "run_limited", run_room)
    monkeypatch.setattr(check, "look", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    check.run()
    document = results.read(tmp_path / "results.json")
    assert document["rooms"] == {"noise": {"ratio": "NaN", "ms": 1.5}}
    assert document["stages"][0]["outcome"] == "failed: noise failed: not done"
    check.document["cases"] = "spoiled"
    check.write()
    assert json.loads((tmp_path / "results.json").read_text())["cases"] == "spoiled"


def test_streaming_without_diffusers_is_not_run_and_not_failed(tmp_path, monkeypatch):
    words = ["--out", str(tmp_path), "--stages", "streaming", "--commit", "0123abc"]
    check = gpu_check.Check(gpu_check.arguments().parse_args(words))

    def run_room(command, log, limit, environment, folder):
        asked = [command[command.index(word) + 1] for word in ("-m", "--size", "--device", "--commit")]
        assert asked == ["benchmarks.streaming", "1.3B", "cuda", "0123abc"] and "14B" in command
        allowed = float(command[command.index("--limit") + 1])
        assert 0.95 * check.left < limit <= check.left + 1 and allowed < limit  # no other stage follows: all the time
        Path(command[command.index("--out") + 1]).write_text('{"not_run": "diffusers is missing"}')
        return "passed"

    monkeypatch.setattr(gpu_check, "run_limited", run_room)
    monkeypatch.setattr(check, "look", lambda: check.document.update(results.empty(results.environment("cpu"), {})))
    check.run()
    document = results.read(tmp_path / "results.json")
    assert document["stages"][0]["outcome"] == "not run: diffusers is missing"
    assert "streaming: not run: diffusers is missing" in "\n".join(table.short_lines(document))


def test_the_shares_leave_time_for_every_stage():
    left = 9 * 60 - gpu_check.LAST_SECONDS
    for name, following in itertools.pairwise(gpu_check.STAGES):
        left -= gpu_check.SHARE[name] * left
        assert left > 20, following


def test_a_dry_run_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    cases = ["--case", "ring_chunk/2x2x8", "7x3/2x2x8", "--contender", "aadkern sdpa", "loop, torch", "--seconds", "0.05"]
    stages = ["--stages", "tests", "cases", "--tests", "tests/test_bad_input.py"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check",
        "--out",
        str(out),
        "--device",
        "cpu",
        "--minutes",
        "3",
        *stages,
        *cases,
    ]
    done = subprocess.run([*command, "--commit", "0123abc"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    document = results.read(out / "results.json")
    assert [stage["outcome"] for stage in document["stages"]] == ["passed", "passed"]
    assert {test["outcome"] for test in document["tests"]} == {"skipped"} and len(document["tests"]) >= 2
    assert [case["id"] for case in document["cases"]] == ["ring_chunk/2x2x8", "7x3/2x2x8"]
    timed = {name: who["status"] for name, who in document["cases"][1]["contenders"].items()}
    assert timed == {"aadkern sdpa": "timed", "loop, torch": "timed"}
    assert document["environment"]["commit"] == "0123abc" and document["not_reached"] == []
    assert "7x3/2x2x8 backward" in done.stdout and "loop, torch" in (out / "table.txt").read_text()
    files = list(out.iterdir())
    assert len(files) <= 8 and sum(file.stat().st_size for file in files) < 16 << 20
    assert json.loads((out / "results.json").read_text()) == document
