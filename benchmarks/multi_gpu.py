"""One sequence on several GPUs, checked and then timed: ``torchrun --nproc-per-node=4 -m benchmarks.multi_gpu --out FILE``.

First attention's outputs and gradients are held to fp64 on every rank. Then come the copies beside an exchange, the exchange
itself (bytes, GB/s), an attention layer, blocks as a training step runs them, and streaming, these three beside the same on one
GPU. FILE is written anew when an item begins and when it ends, and an item that fails is a line with the reason: whatever ends
this command, what was found stays. Without torchrun it is one process and a group of one. On CPUs (``--device cpu``, the default
without a GPU) it walks the same path at a size whose times mean nothing. Needs torch and Triton; blocks and streaming need
diffusers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import results
from benchmarks.measure import one_line
from benchmarks.multi_gpu_items import KINDS, Bench, lines, named_items
from benchmarks.streaming_shapes import SIZES
from benchmarks.timing import keep

MODELS = {"cuda": ("1.3B", "14B"), "cpu": ("tiny",)}
RIGHT = "correct"  # the kind without which nothing is timed


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.multi_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for what is found")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", nargs="+", dest="models", choices=tuple(SIZES), help="default: 1.3B 14B, on CPUs tiny")
    parser.add_argument("--kind", nargs="+", dest="kinds", choices=KINDS, default=KINDS, help="what is done (all)")
    parser.add_argument("--rounds", type=int, default=20, help="of each timing (20)")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds after which ranks that wait for one another give up (600)"
    )
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    return parser


@contextmanager
def processes(device: str, limit: float) -> Iterator[torch.device]:
    """This process among those of torchrun, or alone; its device."""
    alone = "RANK" not in os.environ
    place: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if alone else {}
    chosen = torch.device(device)
    if device == "cuda":
        chosen = torch.device("cuda", 0 if alone else int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
        place["device_id"] = chosen
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=limit), **place)
    try:
        yield chosen
    finally:
        dist.destroy_process_group()


def everyone(value: Any) -> list[Any]:
    """What each rank says."""
    heard: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(heard, value)
    return heard


def outcome_of(item: Callable[[], Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """An item's outcome on this rank, and what it found."""
    try:
        return "passed", item()
    except ModuleNotFoundError as error:
        return f"missing: {error.name} is not installed", {}
    except Exception as error:  # it is told, and the others go on
        traceback.print_exc()
        return f"failed: {one_line(error)}", {}


def among(outcomes: list[str]) -> str:
    """One outcome of all ranks': the first that is not "passed", with its rank."""
    return next((f"{outcome} (rank {rank})" for rank, outcome in enumerate(outcomes) if outcome != "passed"), "passed")


def measured(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All items, one after another; the main rank writes the document and prints."""
    size, main = dist.get_world_size(), dist.get_rank() == 0
    on_cpu = options.device == "cpu"
    models = options.models or MODELS[options.device]
    times = (
        "of processes that share a CPU: meaningless" if on_cpu else "medians of the slowest rank, L2 overwritten before each run"
    )
    document: dict[str, Any] = {
        **(results.header(options.device, options.commit) if main else {}),
        "conditions": {"ranks": size, "backend": str(dist.get_backend()), "rounds": options.rounds, "times": times},
        "devices": everyone(torch.cuda.get_device_name(device) if not on_cpu else "cpu"),
        "items": {},
    }
    items = document["items"]
    wrong = False
    for name, item in named_items(Bench(device, options.rounds), models, options.kinds):
        items[name] = {"outcome": "not ended: whoever waits for a rank gives up after the limit, and the process with it"}
        if main:
            keep(document, options.out)
        began = time.monotonic()
        if wrong and not name.startswith(RIGHT):
            outcome, figures = "not run: what it would time is not right", {}
        else:
            outcome, figures = outcome_of(item)
        outcome = among(everyone(outcome))
        wrong |= name.startswith(RIGHT) and outcome != "passed"
        items[name] = {"outcome": outcome, "seconds": round(time.monotonic() - began, 3), **figures}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if main:
            keep(document, options.out)
            print("\n".join(lines(name, items[name])), flush=True)
    return document


def main(argv: list[str] | None = None) -> int:
    """0 if every item passed or was missing a package, else 1."""
    parser = arguments()
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be one that is here, got cuda: torch sees no CUDA device")
    if options.rounds < 1 or not options.limit > 0:
        parser.error(f"--rounds must be at least 1 and --limit more than 0, got {options.rounds} and {options.limit}")
    torch.manual_seed(0)
    with processes(options.device, options.limit) as device:
        document = measured(options, device)
        bad = [name for name, item in document["items"].items() if not item["outcome"].startswith(("passed", "missing"))]
        if dist.get_rank() == 0:
            print(
                f"\n{len(document['items']) - len(bad)} of {len(document['items'])} items are well; the file is {options.out}",
                flush=True,
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
