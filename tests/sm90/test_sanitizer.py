"""compute-sanitizer over the kernels for sm_90a: stray accesses, memory read before it is written, misused barriers, races.

Unverified: not run on a GPU yet.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aadkern import runtime
from aadkern.range_attention import sm90
from tests.sm90 import sanitized
from tests.sm90.hopper_operators import schedule

__all__ = ["schedule"]  # a fixture
ROOT = Path(__file__).resolve().parents[2]
FOUND = 9  # the exit status for "the tool found something"


def sanitize(tool: str, *command: str, seconds: int = 240) -> str:
    """What the tool said. Skips where it cannot work, fails where it found something or the command failed."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    line = [found, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", *command]
    try:
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{tool} did not end within {seconds} s")
    said = done.stdout + done.stderr
    if re.search("Device not supported|Unable to find injection|Target application terminated before first instrumented", said):
        pytest.skip(f"compute-sanitizer does not work here: {said[-300:]}")
    assert done.returncode == 0, said[-6000:]
    assert re.search(r"(ERROR|RACECHECK) SUMMARY: 0 ", said), f"no summary of {tool}:\n{said[-3000:]}"
    return said


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tool",
    [
        "memcheck",
        "initcheck",
        "synccheck",
        # It does not follow bulk copies and their mbarriers, and takes what they order for a race.
        pytest.param("racecheck", marks=pytest.mark.xfail(strict=False, reason="false positives on bulk copies")),
    ],
)
def test_sm90(tool):
    if (reason := runtime.reason_against("sm90", "cuda")) is not None:
        pytest.skip(reason)
    assert "every result is right" in sanitize(tool, sys.executable, "-m", "tests.sm90.sanitized")


TOOL = """#!/bin/sh
echo "$@"
echo '========= {summary}'
exit {status}
"""


@pytest.mark.parametrize(
    ("summary", "status", "outcome"),
    [
        ("ERROR SUMMARY: 0 errors", 0, None),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, None),
        ("ERROR SUMMARY: 3 errors", FOUND, AssertionError),
        ("ERROR SUMMARY: 3 errors", 0, AssertionError),
        ("ERROR SUMMARY: 0 errors", 1, AssertionError),
        ("", 0, AssertionError),
        ("Error: Device not supported", 1, pytest.skip.Exception),
    ],
)
def test_a_finding_is_a_failure(summary, status, outcome, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(summary=summary, status=status))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if outcome is None:
        assert "--tool memcheck --error-exitcode 9" in sanitize("memcheck", "true")
    else:
        with pytest.raises(outcome):
            sanitize("memcheck", "true")


def test_the_small_runs_on_the_host_model(schedule, monkeypatch):
    """That they are what they say, without a GPU."""
    sanitized.run(torch.bfloat16, 64, "cpu")
    monkeypatch.setattr(sm90, "backward", lambda *given: tuple(1.1 * x for x in given[2:5]))
    with pytest.raises(AssertionError):
        sanitized.run(torch.bfloat16, 64, "cpu")
