"""A pytest plugin, ``-p benchmarks.outcomes --journal FILE``: every test's outcome on disk as soon as it is known.

Tests that the journal already holds are left out, so that the supervisor can go on after a test that took its process with it.
After a failure that left CUDA beyond repair the process ends by itself: every later test would fail for that reason alone.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from benchmarks.journal import Journal


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", required=True, help="where outcomes are written (benchmarks.journal)")
    parser.addoption("--test-limit", type=float, default=90.0, help="seconds that one test may take")


def pytest_configure(config: pytest.Config) -> None:
    limit = config.getoption("--test-limit")
    config.pluginmanager.register(Recorder(Journal(config.getoption("--journal")), limit), "aadkern-outcomes")


class Recorder:
    """Writes the journal of one session."""

    def __init__(self, journal: Journal, limit: float) -> None:
        self.journal, self.limit = journal, limit
        state = journal.read()
        self.known = state.ended.keys() | state.lost.keys()
        self.outcome: dict[str, Any] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.known:
            self.journal.end(report.nodeid, {"outcome": "error", "seconds": 0.0, "message": error_message(report.longreprtext)})
        elif report.skipped and report.nodeid not in self.known:  # a whole file, by importorskip
            self.journal.end(report.nodeid, {"outcome": "skipped", "seconds": 0.0, "message": error_message(str(report.longrepr))})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [item for item in items if item.nodeid in self.known]
        items[:] = [item for item in items if item.nodeid not in self.known]
        config.hook.pytest_deselected(items=done)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.outcome = {"outcome": "passed", "seconds": 0.0, "message": ""}
        self.journal.begin(nodeid, self.limit)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcome["seconds"] += report.duration
        if report.failed:
            self.outcome.update(outcome="failed" if report.when == "call" else "error", message=error_message(report.longreprtext))
        elif report.skipped and self.outcome["outcome"] == "passed":
            self.outcome.update(
                outcome="xfailed" if hasattr(report, "wasxfail") else "skipped", message=error_message(report.longreprtext)
            )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.journal.end(nodeid, self.outcome)
        if self.outcome["outcome"] in ("failed", "error") and beyond_repair():
            os._exit(3)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            self.journal.complete()


def error_message(text: str) -> str:
    """The line of a traceback that says what was wrong: the last that pytest marks with E, else the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    marked = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (marked or lines or [""])[0 if marked else -1].strip()[:400]


def beyond_repair() -> bool:
    """Whether CUDA was used in this process and now refuses even to wait."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
