"""Times of runs made in turn in one process, by CUDA events or the host's clock; the matmul ceiling; peak memory."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

LEAST_ROUNDS, MOST_ROUNDS = 5, 50
FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU so far (H200 60 MB, B200 126 MB)

Job = Callable[[], Any]
Seconds = dict[str, float]  # of "forward" and, with a backward, of "backward" and "both"


class Run(NamedTuple):
    """One timed run: a forward and, if there is one, a backward of what the forward gave."""

    forward: Callable[[], Any]
    backward: Callable[[Any], object] | None = None

    def __call__(self) -> None:
        output = self.forward()
        if self.backward is not None:
            self.backward(output)


class Clock:
    """Times runs on a device, without waiting for each where the device has events.

    On CUDA the cache is overwritten before every run: all start cold, and the ~0.1 ms it takes lets the host run ahead, so that
    launch overhead is seen only where launches take longer than the kernels. The backward follows its forward at once, as in
    training.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1e3 if self.cuda else last - first

    def start(self, run: Run) -> Callable[[], Seconds]:
        """Make the run; what is returned gives its times, after ``wait``."""
        if self._flush is not None:
            self._flush.zero_()
        marks = [self._mark()]
        output = run.forward()
        marks.append(self._mark())
        if run.backward is None:
            return lambda: {"forward": self._between(*marks)}
        run.backward(output)
        first, middle, last = (*marks, self._mark())
        return lambda: {
            "forward": self._between(first, middle),
            "backward": self._between(middle, last),
            "both": self._between(first, last),
        }


def alternate(runs: Mapping[str, Run], device: torch.device, seconds: float, least: int = LEAST_ROUNDS) -> dict[str, list[Seconds]]:
    """The times of every run by name: all in turn, each round beginning with another, for about ``seconds`` in all.

    One warm-up round and one that sets the number of rounds (``least`` to 50) are not counted.
    """
    clock, names = Clock(device), list(runs)
    for name in names:
        runs[name]()
    clock.wait()
    began = time.perf_counter()
    for name in names:
        clock.start(runs[name])
    clock.wait()
    rounds = max(least, min(MOST_ROUNDS, int(seconds / max(time.perf_counter() - began, 1e-6))))
    taken: dict[str, list[Seconds]] = {name: [] for name in names}
    for turn in range(rounds):
        at = turn % len(names)
        pending = {name: clock.start(runs[name]) for name in (*names[at:], *names[:at])}
        clock.wait()
        for name, result in pending.items():
            taken[name].append(result())
    return taken


def medians(jobs: Mapping[str, Job], device: torch.device, seconds: float, least: int = LEAST_ROUNDS) -> dict[str, float]:
    """The median milliseconds of each job, timed as ``alternate`` does."""
    taken = alternate({name: Run(job) for name, job in jobs.items()}, device, seconds, least)
    return {name: 1e3 * statistics.median(times["forward"] for times in runs) for name, runs in taken.items()}


def summary(seconds: list[float], flops: int, ceiling: float | None) -> dict[str, Any]:
    """Median and quartiles in milliseconds, the rate of the median, its share of the ceiling (both in TFLOP/s), and every round."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (seconds[0],) * 3
    rate = flops / median / 1e12
    return {
        "median_ms": 1e3 * median,
        "p25_ms": 1e3 * low,
        "p75_ms": 1e3 * high,
        "tflops": rate,
        "ceiling_share": None if ceiling is None else rate / ceiling,
        "rounds_ms": [round(1e3 * value, 5) for value in seconds],
    }


def matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int | None = None) -> dict[str, object]:
    """What torch's own matrix product of random square matrices reaches on the device now, in TFLOP/s."""
    size = size or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = [run["forward"] for run in alternate({"matmul": Run(lambda: a @ b)}, device, seconds=0.1, least=10)["matmul"]]
    dtype_name = str(dtype).removeprefix("torch.")
    return {"size": size, "dtype": dtype_name, "tflops": 2 * size**3 / statistics.median(taken) / 1e12, "rounds": len(taken)}


def peak_bytes(run: Run, device: torch.device) -> int | None:
    """The most memory that a run held beside what was there before it; None where that is not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def keep(figures: Any, path: Path | None) -> None:
    """Figures as JSON, whole or not at all: written after every case, so that a run which is cut off keeps what it found."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(figures, indent=1) + "\n")
        part.replace(path)
