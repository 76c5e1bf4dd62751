"""Chunk rate of streaming beside the lineage's protocol: ``python -m benchmarks.streaming [--size ...] [--out FILE]``.

Sizes ``1.3B`` and ``14B`` (the default on a GPU) are Wan 2.1's true shapes with random weights at 480p: contenders one after
another in a process of their own, so that what crashes or hangs costs itself alone; FILE is written anew after each. ``tiny``
walks that path on a CPU. ``demo`` (the default on a CPU) and ``small`` compare four ways in turn in one process. The rival is
Self-Forcing's protocol with the same weights (``benchmarks.streaming_lineage``). Nobody is timed before its video agrees.
Unverified on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aadkern import StreamingGenerator, Window
from benchmarks import results, table
from benchmarks.journal import Journal, supervise
from benchmarks.streaming_lineage import ClonedCache, lineage
from benchmarks.timing import keep

if TYPE_CHECKING:
    from benchmarks.streaming_contenders import Bench

WINDOW, CHUNK = Window(9, sink=1), 4
# layers, heads, head_dim, ffn, channels, side, patch, text tokens (0: no text). "demo" is the digits recipe's network.
IN_TURN = {"demo": (4, 4, 16, 192, 1, 20, 4, 0), "small": (6, 4, 32, 512, 16, 16, 2, 64)}
TRUE = ("1.3B", "14B", "tiny")
# What is measured of a size, what matters most first. The first two are what the others' videos are held to.
ON_CUDA = (
    "rate: lineage, 1 NFE",
    "rate: two passes, 1 NFE",
    "rate: merged + graphs, 1 NFE",
    "vae: merged + graphs",
    "rate: merged, 1 NFE",
    "parts: merged",
    "parts: lineage",
    "rate: merged + compile + graphs, 1 NFE",
    "rate: merged + FP8 + graphs, 1 NFE",
    "rate: merged + graphs, 4 NFE",
    "rate: lineage, 4 NFE",
    "rate: merged + graphs, sm90, 1 NFE",
    "rate: merged + FP8 + compile + graphs, 1 NFE",
    "rate: lineage, cuDNN, 1 NFE",
)
ON_CPU = (
    "rate: lineage, 1 NFE",
    "rate: two passes, 1 NFE",
    "rate: merged, 1 NFE",
    "vae: merged",
    "parts: merged",
    "parts: lineage",
    "rate: merged + FP8, 1 NFE",
    "rate: merged, 4 NFE",
    "rate: lineage, 4 NFE",
)
ITEM = r"rate: .+, [14] NFE|vae: .+|parts: .+"
ITEM_LIMIT = 240.0  # seconds; torch.compile of a block is the longest
HOW_TO_BRING = "docs/results.md tells how to bring it to a machine without network"


def ours(model: Any, merged: bool, noise: Tensor, first: Tensor, text: Tensor | None) -> Iterator[Tensor]:
    """The video by StreamingGenerator."""
    height, width = first.shape[-2:]
    cache = model.new_cache(1, height, width, WINDOW, max_chunk_frames=CHUNK, merged=merged)
    return StreamingGenerator(model, cache, text=text).chunks(lambda chunk, step: noise, first_frame=first)


def contenders(size: str, device: str) -> tuple[dict[str, Iterator[Tensor]], Tensor]:
    """The same video, made in every way, and the noise of all its chunks."""
    from aadkern.wan import CausalWan

    layers, heads, head_dim, ffn, channels, side, patch, tokens = IN_TURN[size]
    model = CausalWan(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn,
        in_channels=channels, out_channels=channels, text_dim=64, freq_dim=64, patch_size=(1, patch, patch),
    ).to(device).eval()  # fmt: skip
    for block in model.blocks:  # gates that let the attention through, or a wrong cache would not be seen
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    noise = torch.randn(1, channels, CHUNK, side, side, device=device)
    first = torch.randn(1, channels, 1, side, side, device=device)
    text = torch.randn(1, tokens, 64, device=device) if tokens else None

    def theirs(**blocks: Any) -> Iterator[Tensor]:
        cache = ClonedCache(model, 1, side, side, WINDOW)
        with torch.no_grad():
            kept = None if text is None else model.text_cache(text)
        return lineage(model, cache, lambda chunk, step: noise, first, kept, **blocks)

    videos = {
        "merged": ours(model, True, noise, first, text),
        "two passes": ours(model, False, noise, first, text),
        "lineage": theirs(),
        "lineage, same blocks": theirs(blocks=contextlib.nullcontext),
    }
    return videos, noise


def measure(size: str, rounds: int, device: str) -> dict[str, Any]:
    """Median milliseconds a chunk of each contender with a full ring, one chunk of each in turn."""
    videos, noise = contenders(size, device)
    error = 0.0
    for _ in range(6):  # until the ring is full and everything is warm
        flows = {name: noise - next(video) for name, video in videos.items()}
        scale = flows["lineage"].abs().max()
        error = max(error, *(((flow - flows["lineage"]).abs().max() / scale).item() for flow in flows.values()))
    if not error < 1e-3:
        raise RuntimeError(f"the contenders must make the same video, their flows differ by {error:.1e} of the largest value")
    seconds: dict[str, list[float]] = {name: [] for name in videos}
    for _ in range(rounds):
        for name, video in videos.items():
            began = time.perf_counter()
            next(video)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    ratios = {name: medians[name] / medians["merged"] for name in medians}
    about = {"size": size, "dtype": "float32", "rounds": rounds, "largest_difference": error}
    return {**results.header(device), **about, "ms_per_chunk": medians, "over_merged": ratios}


def items(device: str, names: Sequence[str] | None = None) -> list[str]:
    """What is measured of a size: ``names``, or the device's own. Raises ValueError for a word that is no item."""
    for item in names or []:
        if not re.fullmatch(ITEM, item):
            raise ValueError(f"item must be 'rate: NAME, N NFE', 'vae: NAME' or 'parts: NAME', got {item!r}")
    return list(names or (ON_CUDA if device == "cuda" else ON_CPU))


def measured(bench: Bench, item: str) -> dict[str, Any]:
    """One item's record."""
    what, _, rest = item.partition(": ")
    if what == "rate":
        name, _, nfe = rest.removesuffix(" NFE").rpartition(", ")
        return bench.contender(name, int(nfe))
    return {"vae": bench.vae, "parts": bench.split}[what](rest)


def measure_items(size: str, options: argparse.Namespace) -> None:
    """Measure what the journal does not hold yet; runs in a process of its own, which may be lost and begun again."""
    from benchmarks.measure import leave_if_beyond_repair, one_line
    from benchmarks.streaming_contenders import Bench, Missing, WrongVideo, release
    from benchmarks.streaming_shapes import SIZES

    journal, device = Journal(options.journal), torch.device(options.device)
    state = journal.read()
    if "header" not in state.ended:
        journal.end("header", results.header(options.device, options.commit))
    bench = Bench(SIZES[size], device)
    for item in items(options.device, options.items):
        if item in state.ended or item in state.lost:
            continue
        journal.begin(item, ITEM_LIMIT)
        try:
            record = {"status": "timed", **measured(bench, item)}
        except Missing as error:
            record = {"status": "missing", "reason": str(error)}
        except WrongVideo as error:
            record = {"status": "refused", "reason": str(error)}
        except Exception as error:  # of any library: it is told, and the others go on
            traceback.print_exc()
            record = {"status": "failed", "reason": one_line(error)}
            leave_if_beyond_repair(journal, item, one_line(error), device)
        journal.end(item, record)
        release()
    journal.complete()


def facts(size: str) -> dict[str, Any]:
    """What does not need measuring: shape, FLOPs of a chunk, and the floor that they set."""
    from benchmarks.streaming_shapes import FLOOR_TFLOPS, LEVELS, PIXEL_FRAMES, SIZES, WINDOW, chunk_flops, floor_seconds

    shape = SIZES[size]
    frames = PIXEL_FRAMES * shape.chunk
    return {
        "shape": shape._asdict(),
        "window": {"frames": WINDOW.frames, "sink": WINDOW.sink},
        "pixel_frames_per_chunk": frames,
        "flops_per_chunk": {f"{nfe} NFE": chunk_flops(shape, nfe) for nfe in LEVELS},
        "floor": {
            "tflops": FLOOR_TFLOPS,
            "fps": {f"{nfe} NFE": frames / floor_seconds(shape, nfe) for nfe in LEVELS},
        },
    }


def gathered(size: str, journal: Journal) -> dict[str, Any]:
    """A size's part of the document, from what its journal says so far."""
    state = journal.read()
    records = {item: record for item, record in state.ended.items() if item != "header"}
    lost = {item: {"status": "failed", "reason": reason} for item, reason in state.lost.items()}
    return {**facts(size), "items": {**records, **lost}}


def true_sizes(options: argparse.Namespace) -> int:
    """Every size in workers of its own, within the time limit; earlier sizes leave half of what is left to later ones."""
    document: dict[str, Any] = {"sizes": {}}
    ends, failed = time.monotonic() + options.limit, False
    with tempfile.TemporaryDirectory() as folder:
        for i, size in enumerate(options.sizes):
            journal, log = Journal(Path(folder) / f"{size}.journal"), Path(folder) / f"{size}.log"
            words = ["--size", size, "--device", options.device, "--journal", str(journal.path)]
            words += ["--commit", options.commit] if options.commit else []
            words += ["--item", *options.items] if options.items else []

            def gather(size: str = size, journal: Journal = journal) -> None:
                document.update(journal.read().ended.get("header", {}))
                document["sizes"][size] = gathered(size, journal)
                keep(document, options.out)

            deadline = time.monotonic() + (ends - time.monotonic()) / (1 if i == len(options.sizes) - 1 else 2)
            command = [sys.executable, "-m", "benchmarks.streaming", *words]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            outcome = supervise(command, journal, log, deadline, environment, results.ROOT, gather)
            gather()
            figures = document["sizes"][size]
            figures["outcome"] = outcome
            figures["not_reached"] = [item for item in items(options.device, options.items) if item not in figures["items"]]
            keep(document, options.out)
            print("\n".join(table.streaming_lines(size, figures)), flush=True)
            if outcome != "passed":
                failed = True
                print(log.read_text()[-4000:], file=sys.stderr)
    return 1 if failed else 0


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.streaming", description=__doc__.split("\n")[0])
    parser.add_argument("--size", nargs="+", dest="sizes", choices=(*TRUE, *IN_TURN), help="default: 1.3B 14B, or demo on a CPU")
    parser.add_argument("--item", nargs="+", dest="items", help="of a true size, such as 'rate: merged + graphs, 1 NFE'")
    parser.add_argument("--rounds", type=int, default=40, help="of demo and small")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds for all true sizes, earlier ones first")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="a JSON file, written anew after every item")
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)  # as a worker that can be begun again
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu: torch finds no CUDA device")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    options.sizes = options.sizes or (["1.3B", "14B"] if options.device == "cuda" else ["demo"])
    try:
        items(options.device, options.items)
    except ValueError as error:
        parser.error(str(error))
    in_turn = [size for size in options.sizes if size in IN_TURN]
    if in_turn and len(options.sizes) > 1:
        parser.error(f"--size {in_turn[0]} must stand alone, got {' '.join(options.sizes)}")
    try:
        import diffusers  # noqa: F401
    except ImportError as error:
        reason = f"{(error.name or str(error)).partition('.')[0]} is missing"
        print(f"not run: {reason}; {HOW_TO_BRING}")
        keep({"not_run": reason}, options.out)
        return 0
    if options.journal is not None:
        measure_items(options.sizes[0], options)
        return 0
    if not in_turn:
        return true_sizes(options)
    result = measure(in_turn[0], options.rounds, options.device)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))
    keep(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
