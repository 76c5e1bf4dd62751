"""What each of our kernels should reach on a GPU, and whether a results file says that it did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

WHOLE_MASK = "bidirectional"
MASKED = ("7x3", "i2v_window9_sink1")


class Goal(NamedTuple):
    """``ours`` must reach ``factor`` TFLOP/s in ``direction``; or be ``factor`` times as fast as ``rival``; or, where ``of_own`` is
    a case's name, reach that share of its own rate there. In all cases, or those named."""

    ours: str
    direction: str
    factor: float
    rival: str | None = None
    of_own: str | None = None
    cases: tuple[str, ...] = ()


# Rates for an H100 or H200, and asked of no other GPU but an H20 (H20_RATE); "loop" stands for one dense call per chunk.
GOALS = (
    Goal("aadkern triton", "forward", 480, cases=MASKED),
    Goal("aadkern triton", "backward", 330, cases=MASKED),
    Goal("aadkern triton", "both", 1.5, rival="flex"),
    Goal("aadkern triton", "both", 1.0, rival="loop, torch flash"),
    Goal("aadkern triton", "both", 1.0, rival="loop, FA2"),
    Goal("aadkern sm90", "forward", 600, cases=(WHOLE_MASK,)),
    Goal("aadkern sm90", "backward", 500, cases=(WHOLE_MASK,)),
    Goal("aadkern sm90 deterministic", "backward", 400, cases=(WHOLE_MASK,)),
    Goal("aadkern sm90", "forward", 0.95, of_own=WHOLE_MASK, cases=MASKED),
    Goal("aadkern sm90", "backward", 0.95, of_own=WHOLE_MASK, cases=MASKED),
    Goal("aadkern sm90", "both", 1.6, rival="flex"),
    Goal("aadkern sm90", "both", 1.0, rival="loop, cuDNN"),
)
# Pixel frames a second at 480p with one denoising step, without the VAE, on an H100 or H200; AAD-1 reports 43.4 and 14.3.
STREAMING = {"1.3B": 100.0, "14B": 20.0}
STREAMED = "rate: merged + graphs, 1 NFE"
# Of the pooling head's forward: times the speed of the layer it replaces, by the width of its tokens; and of copy bandwidth.
POOLING = {1536: 8.0, 5120: 22.0}
POOLING_SHARE = 0.7
# NVIDIA's H20: 148 TFLOP/s dense bf16. There every rate asked for is nine tenths of that.
H20_RATE = 0.9 * 148


def judged(document: dict[str, Any], times: Callable[[dict[str, Any], dict[str, Any]], float]) -> Iterator[str]:
    """Each goal that a CUDA document can answer, "met" or "missed", with its figure. ``times`` compares two timings."""
    device = document["environment"]["device"]
    if device["type"] != "cuda":
        return
    h20 = "H20" in device["name"].replace("H200", "")
    hopper = device["capability"] == "9.0"  # H100, H200 and their kin, for which rates are set
    for case in document["cases"]:
        for goal in GOALS:
            if goal.cases and case["id"].partition("/")[0] not in goal.cases:
                continue
            ours = timing(case, goal.ours, goal.direction)
            if ours is None or not (hopper or goal.rival):
                continue
            wanted = min(goal.factor, H20_RATE) if h20 and goal.factor > 2 else goal.factor
            if goal.rival is not None:
                other = timing(case, goal.rival, goal.direction)
                got = None if other is None else times(other, ours)
                what = f"{wanted:g} x {goal.rival}"
            elif goal.of_own is not None:
                whole = next((timing(c, goal.ours, goal.direction) for c in document["cases"] if like(c, case, goal.of_own)), None)
                got = None if whole is None else ours["tflops"] / whole["tflops"]
                what = f"{wanted:.0%} of its own rate in {goal.of_own}"
            else:
                got, what = ours["tflops"], f"{wanted:.0f} TFLOP/s"
            if got is not None:
                yield goal_line(got, wanted, f"{case['id']} {goal.direction}, {goal.ours}", what)
    if hopper and not h20:
        yield from of_rooms(document["rooms"])


def of_rooms(rooms: dict[str, Any]) -> Iterator[str]:
    """The goals of other rooms' benchmarks, set for an H100 or H200; those that their figures can answer."""
    for size, figures in rooms.get("streaming", {}).get("sizes", {}).items():
        if size in STREAMING and "fps" in figures["items"].get(STREAMED, {}):
            fps = figures["items"][STREAMED]["fps"]
            yield goal_line(fps, STREAMING[size], f"streaming {size}, 1 NFE, without VAE", f"{STREAMING[size]:g} FPS")
    for name, case in rooms.get("pooling", {}).get("cases", {}).items():
        if case["keys"]:  # a norm on the keys cannot be absorbed: no goal
            continue
        times, share = case["forward_ms"], case.get("share_of_copy_bandwidth")
        wanted = POOLING.get(case["channels"])
        if wanted is not None:
            yield goal_line(times["layer"] / times["aadkern"], wanted, f"pooling {name} forward", f"{wanted:g} x layer")
        if share is not None:
            yield goal_line(share["forward"], POOLING_SHARE, f"pooling {name} forward", f"{POOLING_SHARE:g} of copy bandwidth")


def goal_line(got: float, wanted: float, who: str, what: str) -> str:
    """One goal's line."""
    return f"  {'met   ' if got >= wanted else 'missed'} {who}: {got:.3g} of {what}"


def timing(case: dict[str, Any], contender: str, direction: str) -> dict[str, Any] | None:
    """A contender's timing in a case, if there is one."""
    return case["contenders"].get(contender, {"timings": {}})["timings"].get(direction)


def like(case: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    """Whether a case is the plan ``name`` at the sizes of another."""
    sizes = ("heads", "head_dim", "tokens_per_frame", "dtype")
    return case["id"].partition("/")[0] == name and all(case[size] == other[size] for size in sizes)
