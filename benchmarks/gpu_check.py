"""All that a GPU is needed for, in one command: ``python -m benchmarks.gpu_check --out DIR``.

Builds the CUDA kernels, or takes those that were brought along, runs the tests marked ``gpu`` (checks of single Hopper
primitives first), times every case of attention against its rivals, then streaming and the other rooms, in order of importance
until the time is over, and prints a table. ``--plan`` names one of the calls of benchmarks.calls, for a GPU that is lent for
minutes. Needs torch, Triton, numpy and pytest, no network and no installed aadkern: a test or room that needs more is skipped by
name. Every stage runs in processes of its own under a time limit, so that nothing one of them does can stop the rest, and
DIR/results.json is written anew after every item: whatever ends this command, what was found stays. Without a GPU,
``--device cpu`` walks the same path at sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import chart, fa3, results, run, table
from benchmarks.calls import CALLS, CORRECT, learned, next_lines
from benchmarks.cases import core_cases, further_cases
from benchmarks.journal import Journal, run_limited, supervise

ROOT = results.ROOT
STAGES = ("build", "tests", "cases", "streaming", "rooms", "more cases")
FA3 = "fa3"  # FlashAttention 3 from the sources of --fa3-source, after "build"
LATER = ("sanitizer", "sweep")  # of a second call: compute-sanitizer over small runs, all candidate tiles of the Triton kernels
ROOMS = ("pooling", "blocks", "noise", "multi_gpu")  # python -m benchmarks.<room> --out FILE
WORDS = {"multi_gpu": ("--kind", "correct", "copies")}  # what one GPU can tell of several
# The most of the time still left that a stage may take, so that no stage starves those after it.
SHARE = {
    "build": 0.35,
    "fa3": 0.6,
    "tests": 0.45,
    "cases": 0.55,
    "streaming": 0.6,
    "rooms": 0.4,
    "more cases": 1.0,
    "sanitizer": 0.7,
    "sweep": 1.0,
}
LAST_SECONDS = 15.0  # kept back for the table, and for a supervisor's last look
MOST_LOG_BYTES = 2 << 20  # of one stage
FIRST = ("test_primitive_checks", "test_sm90_gpu", "sm90", "test_attention", "triton")
DRY_CASES = ["7x3_window9_sink3/3x2x16", "ring_chunk/3x2x16", "teacher_forcing/2x2x16"]


class Check:
    """One run: its folder, its clock, and the document that grows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out = options, options.out
        self.began = time.monotonic()
        self.end = self.began + 60 * options.minutes - LAST_SECONDS
        self.out.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="aadkern-check-"))
        path = os.pathsep.join(filter(None, (str(ROOT), dict(os.environ).get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        self.document: dict[str, Any] = {}
        self.plan = CALLS[options.plan] if options.plan else None
        self.log = self.out / "log.txt"

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def write(self) -> None:
        path = self.out / "results.json"
        try:
            results.write(self.document, path)
        except ValueError as error:  # what was measured must not be lost to a mistake in its form
            print(f"gpu_check: {error}", file=sys.stderr)
            path.write_text(json.dumps(self.document, indent=1, default=str) + "\n")

    def read_environment(self) -> None:
        """What is here, told by a process of its own: this one never touches CUDA, so that no error can stick to it."""
        code = "import json, sys; from benchmarks import results; print(json.dumps(results.environment(*sys.argv[1:])))"
        words = [self.options.device, *([self.options.commit] if self.options.commit else [])]
        outcome = run_limited([sys.executable, "-c", code, *words], self.scratch / "environment", 120, self.environment, ROOT)
        output = (self.scratch / "environment").read_text().strip().splitlines()
        documents = [line for line in output if line.startswith("{")]
        if outcome != "passed" or not documents:
            raise SystemExit(f"gpu_check: the environment could not be read: {outcome}\n" + "\n".join(output[-5:]))
        timed = run.timing_conditions(self.options.device, self.options.seconds)
        conditions = {"data": f"standard normal, seed {self.options.seed}", "minutes": self.options.minutes, **timed}
        conditions |= {"plan": self.options.plan} if self.options.plan else {}
        self.document = results.empty(json.loads(documents[-1]), conditions)

    def build(self, deadline: float) -> str:
        """The CUDA kernels that lie beside the sources, if they load; else the one build of the package, put there."""
        here = next((ROOT / "aadkern").glob("_C.*so"), None)
        if here is not None:
            code = "from aadkern._build import load_cuda; reason = load_cuda(); print(reason); raise SystemExit(reason is not None)"
            limit = min(120.0, deadline - time.monotonic())
            if run_limited([sys.executable, "-c", code], self.log, limit, self.environment, ROOT) == "passed":
                self.document["conditions"]["cuda_library"] = f"as found: sha256 {hashlib.sha256(here.read_bytes()).hexdigest()}"
                return "passed"
        wanted = {**self.environment, "AADKERN_BUILD_CUDA": "1" if self.options.device == "cuda" else "0"}
        folders = ["--build-lib", str(self.scratch / "built"), "--build-temp", str(self.scratch / "build")]
        command = [sys.executable, "setup.py", "build_ext", *folders]
        outcome = run_limited(command, self.log, deadline - time.monotonic(), wanted, ROOT)
        for library in (self.scratch / "built" / "aadkern").glob("*.so") if outcome == "passed" else ():
            there = ROOT / "aadkern" / library.name
            if there.exists():  # what was brought along is not lost
                there.replace(there.with_name(f"{library.name}.before"))
            shutil.copy2(library, there)
            self.document["conditions"]["cuda_library"] = "built in this run"
        return outcome

    def fa3(self, deadline: float) -> str:
        """FlashAttention 3 of --fa3-source: what its contender imports from then on."""
        command = [sys.executable, "-m", "benchmarks.fa3", str(self.options.fa3_source)]
        outcome = run_limited(command, self.log, deadline - time.monotonic(), self.environment, ROOT)
        if outcome == "passed":
            place = fa3.place_of(fa3.hopper_folder(self.options.fa3_source))
            self.environment["PYTHONPATH"] = f"{place}{os.pathsep}{self.environment['PYTHONPATH']}"
            self.document["conditions"]["fa3"] = f"{place.name}, of --fa3-source"
        return outcome

    def tests(self, deadline: float, stage: str, files: list[str]) -> str:
        """Every test marked gpu; what a test did to its process is part of its outcome."""
        journal = Journal(self.scratch / stage)
        if not files:
            return "passed"
        limit = self.options.test_limit * (3 if stage == "sanitizer" else 1)  # instrumented kernels are slow
        plugin = ["-p", "benchmarks.outcomes", "--journal", str(journal.path), "--test-limit", str(limit)]
        # Without the repository's pytest settings, which ask for a version of pytest: this takes the one that is there.
        plain = ["-c", os.devnull, f"--rootdir={ROOT}", "--import-mode=importlib", "-p", "no:cacheprovider", "-q", "--durations=10"]
        plain += ["--continue-on-collection-errors", "--disable-warnings"]
        command = [sys.executable, "-m", "pytest", *plain, *plugin, "-m", "gpu", *files]
        alone = {**self.environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TRITON_INTERPRET": "0"}

        earlier = self.document["tests"]

        def gather() -> None:
            self.document["tests"] = earlier + test_records(journal)
            self.write()

        outcome = supervise(command, journal, self.log, deadline, alone, ROOT, gather)
        gather()
        records = test_records(journal)
        bad = sum(test["outcome"] not in ("passed", "skipped", "xfailed") for test in records)
        return f"failed: {bad} of {len(records)} tests" if outcome == "passed" and bad else outcome

    def cases(self, deadline: float, ids: list[str], stage: str) -> str:
        """Every case that time allows, in order."""
        if not ids:
            return "passed"
        journal = Journal(self.scratch / stage.replace(" ", "-"))
        sizes = ["--device", self.options.device, "--seed", str(self.options.seed), "--seconds", str(self.options.seconds)]
        command = [sys.executable, "-m", "benchmarks.run", "--journal", str(journal.path), *sizes, "--case", *ids]
        dry = self.options.device == "cpu"
        contenders = self.options.contenders or (self.plan.contenders if self.plan and not dry else ())
        if contenders:
            command += ["--contender", *contenders]
        earlier = self.document["cases"]

        def gather() -> None:
            ended = journal.read().ended
            self.document["cases"] = earlier + [ended[case] for case in ids if ended.get(case) is not None]
            self.write()

        outcome = supervise(command, journal, self.log, deadline, self.environment, ROOT, gather)
        gather()
        state = journal.read()
        for case in ids:
            if state.ended.get(case) is None:
                self.document["not_reached"].append(f"{case} ({state.lost[case]})" if case in state.lost else case)
        return outcome

    def rooms(self, deadline: float) -> str:
        """The other rooms' own benchmarks, each in what time is left to them in equal parts."""
        here = [room for room in ROOMS if (ROOT / "benchmarks" / f"{room}.py").exists()]
        outcomes = {}
        for i, room in enumerate(here):
            limit = max(5.0, (deadline - time.monotonic()) / (len(here) - i))
            outcomes[room] = self.room(room, "rooms", limit, *WORDS.get(room, ()))
        bad = [f"{room} {outcome}" for room, outcome in outcomes.items() if outcome != "passed"]
        return f"failed: {'; '.join(bad)}" if bad else "passed"

    def room(self, name: str, stage: str, limit: float, *words: str) -> str:
        """``python -m benchmarks.NAME --out FILE``; what it wrote becomes part of the results, also where it did not end well."""
        file = self.scratch / f"{name}.json"
        words = (*words, "--commit", self.options.commit) if self.options.commit else words
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(file), *words]

        def gather() -> None:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
                room_document = json.loads(file.read_text(), parse_constant=str)
                if self.document["rooms"].get(name) != room_document:
                    self.document["rooms"][name] = room_document
                    self.write()

        outcome = run_limited(command, self.log, limit, self.environment, ROOT, gather)
        gather()
        room_document = self.document["rooms"].get(name, {})
        return f"not run: {room_document['not_run']}" if "not_run" in room_document else outcome

    def share(self, name: str) -> float:
        """The most of the time left that a stage may take: all of it where no other follows."""
        if name == self.options.stages[-1]:
            return 1.0
        return self.plan.shares.get(name, SHARE[name]) if self.plan else SHARE[name]

    def stage(self, name: str) -> str:
        left = self.share(name) * self.left
        deadline = time.monotonic() + left
        dry = self.options.device == "cpu"
        if name in ("tests", "sanitizer"):
            everything = marked_files()
            ours = self.plan.tests or (file for file in everything if file not in CORRECT) if self.plan else everything
            tests = self.options.tests or ours
            return self.tests(deadline, name, [file for file in tests if ("sanitizer" in file) == (name == "sanitizer")])
        if name == "cases":
            ours = list(self.plan.cases) if self.plan else core_cases()
            return self.cases(deadline, self.options.cases or (DRY_CASES if dry else ours), name)
        if name == "more cases":
            return self.cases(deadline, [] if dry or self.options.cases else further_cases(), name)
        if name == "streaming":
            sizes = ("--size", "tiny") if dry else ("--size", "1.3B", "14B")
            return self.room(name, name, left, *sizes, "--device", self.options.device, "--limit", f"{max(1.0, left - 10):.0f}")
        if name == "sweep":
            return "not run: it needs a GPU" if dry else self.room("sweep", name, left, "--limit", f"{0.9 * left:.0f}")
        return {"build": self.build, "fa3": self.fa3, "rooms": self.rooms}[name](deadline)

    def run(self) -> None:
        self.read_environment()
        for name in self.options.stages:
            began = time.monotonic()
            if self.left < 5:
                self.document["not_reached"].append(f"stage {name}")
                continue
            print(f"{name}: at most {self.share(name) * self.left:.0f} s", flush=True)
            with self.log.open("a") as log:
                log.write(f"==== {name}\n")
            start = self.log.stat().st_size
            try:
                outcome = self.stage(name)
            except Exception as error:  # a stage's own mistake must not cost the others
                outcome = f"failed: {type(error).__name__}: {error}"
            self.document["stages"].append({"name": name, "outcome": outcome, "seconds": time.monotonic() - began})
            print(f"{name}: {outcome}", flush=True)
            self.write()
            shorten(self.log, start)


def marked_files() -> list[str]:
    """Test files that have tests for a GPU, checks of single primitives first, then what is named sm90, attention and Triton."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"mark\.gpu\b", path.read_text())
    ]

    def place(file: str) -> tuple[int, str]:
        return next((i for i, word in enumerate(FIRST) if word in file), len(FIRST)), file

    return sorted(files, key=place)


def test_records(journal: Journal) -> list[dict[str, Any]]:
    """The journal as the results' list of tests."""
    state = journal.read()
    ended = [{"id": test, **record} for test, record in state.ended.items()]
    lost: Mapping[str, str] = state.lost
    return ended + [{"id": test, "outcome": "lost", "seconds": 0.0, "message": reason} for test, reason in lost.items()]


def shorten(log: Path, start: int = 0) -> None:
    """Keep the beginning and the end of what a log holds from ``start`` on, where that is long."""
    if log.exists() and log.stat().st_size - start > MOST_LOG_BYTES:
        text, half = log.read_bytes(), MOST_LOG_BYTES // 2
        log.write_bytes(text[: start + half] + b"\n... shortened ...\n" + text[-half:])


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for results.json, table.txt, chart.svg and log.txt")
    parser.add_argument("--plan", choices=tuple(CALLS), help="a call with its stages, tests, cases and contenders chosen")
    parser.add_argument("--minutes", type=float, help="default: 9, or the plan's")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    of = f"default: the plan's, or {', '.join(STAGES)}; for a second call: {', '.join(LATER)}"
    parser.add_argument("--stages", nargs="+", choices=(*STAGES, FA3, *LATER), metavar="STAGE", help=of)
    parser.add_argument("--tests", nargs="+", help="test files or ids (default: every file with tests marked gpu)")
    parser.add_argument("--test-limit", type=float, default=90.0, help="seconds that one test may take")
    parser.add_argument("--case", nargs="+", dest="cases", help="in place of the core cases, as for benchmarks.run")
    parser.add_argument("--contender", nargs="+", dest="contenders", help="as for benchmarks.run")
    parser.add_argument(
        "--fa3-source", type=Path, metavar="DIR", help="build the contender 'loop, FA3' of this flash-attention checkout"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for the rounds of one case, about (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    return parser


def call_options(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with a plan's where none was given."""
    parser = arguments()
    options = parser.parse_args(argv)
    plan = CALLS[options.plan] if options.plan else None
    options.minutes = options.minutes or (plan.minutes if plan else 9.0)
    options.stages = options.stages or list(plan.stages if plan else STAGES)
    if options.fa3_source is None:
        if FA3 in options.stages:
            parser.error("stage fa3 builds what --fa3-source names, and none was given")
        return options
    try:
        fa3.hopper_folder(options.fa3_source)
    except ValueError as error:
        parser.error(str(error))
    if FA3 not in options.stages:
        options.stages.insert(options.stages.index("build") + 1 if "build" in options.stages else 0, FA3)
    return options


def main(argv: list[str] | None = None) -> int:
    """0 if every stage passed or was not run for want of a package, 1 if any failed or was not reached."""
    check = Check(call_options(argv))
    try:
        check.run()
        check.write()
    finally:
        shutil.rmtree(check.scratch, ignore_errors=True)
    (check.out / "chart.svg").write_text(chart.draw([check.document]))
    (check.out / "table.txt").write_text("\n".join(table.lines(check.document)) + "\n")
    summary = list(table.short_lines(check.document))
    if check.options.plan:
        summary += ["", f"learned by --plan {check.options.plan}", *learned(check.document), *next_lines(check.options.plan)]
    print("\n" + "\n".join(summary), flush=True)
    stages = check.document["stages"]
    well = all(stage["outcome"] == "passed" or stage["outcome"].startswith("not run") for stage in stages)
    return 0 if well and len(stages) == len(check.options.stages) else 1


if __name__ == "__main__":
    sys.exit(main())
