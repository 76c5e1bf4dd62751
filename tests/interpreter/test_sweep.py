"""The sweep of rival configurations, on interpreted kernels: it times what is right, refuses what is not, and leaves no trace."""

from __future__ import annotations

import time

import pytest
import torch

from aadkern.range_attention import triton_forward
from benchmarks import sweep
from benchmarks.cases import case_of
from benchmarks.checks import truth


@pytest.fixture
def problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(sweep, "CANDIDATES", {name: tiles[:2] for name, tiles in sweep.CANDIDATES.items()})
    return sweep.problem_of(case_of("bidirectional/1x1x16"), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["forward", "dkv"])
def test_every_right_candidate_is_timed_with_its_own_configuration(kernel, problem, monkeypatch):
    used, table = set(), dict(sweep.table_of(kernel))
    original = triton_forward.pick

    def watched(configs, q):
        used.update(configs.values())
        return original(configs, q)

    monkeypatch.setattr("aadkern.range_attention.triton_forward.pick", watched)
    monkeypatch.setattr("aadkern.range_attention.triton_backward.pick", watched)
    records = sweep.swept(kernel, problem, truth(problem, 1.0), 0.1, time.monotonic() + 60)
    assert {record["tile"] for record in records} == {sweep.described(tile) for tile in sweep.CANDIDATES[kernel]}
    assert all(record["ms"] > 0 and record["tflops"] > 0 for record in records)
    assert set(sweep.CANDIDATES[kernel]) <= used and sweep.table_of(kernel) == table


def test_a_wrong_or_late_candidate_is_not_timed(problem, monkeypatch):
    known = truth(problem, 1.0)
    late = sweep.swept("forward", problem, known, 0.1, time.monotonic() - 1)
    assert [record["reason"] for record in late] == ["out of time"] * 2
    right = triton_forward.forward
    monkeypatch.setattr(triton_forward, "forward", lambda *x: (right(*x)[0] * 1.01, right(*x)[1]))
    wrong = sweep.swept("forward", problem, known, 0.1, time.monotonic() + 60)
    assert all("WrongResult: out" in record["reason"] and "ms" not in record for record in wrong)


def test_the_table_stands_first_among_its_rivals():
    for kernel, tiles in sweep.CANDIDATES.items():
        assert sweep.table_of(kernel)["sm90", 128] == tiles[0] and len(set(tiles)) == len(tiles)
