"""GPUs, and the rates that a plan counts by: measured ones of a results file where there are any, else this table's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


@dataclass(frozen=True)
class Machine:
    """One GPU. ``memory`` in GiB as the driver reports it; ``peak``: dense bf16 of the data sheet, TFLOP/s; ``linear``,
    ``attention``, ``backward``: what large products and attention really reach; ``copy``: bytes read and written, GB/s; ``link``:
    GB/s each way to a GPU of the same node. ``source`` says where each is from.
    """

    name: str
    memory: float
    peak: float
    linear: float
    attention: float
    backward: float
    copy: float
    link: float
    source: str


_SHARES = "products at 70 % of the peak, attention at 60 % and 50 %, copies at 80 %, as Hopper's reach: a guess"
MACHINES: dict[str, Machine] = {
    "a100": Machine(
        "A100 SXM 80 GB", 79.1, 312, 250, 190, 160, 1600, 250,
        "NVIDIA A100 data sheet (312 TFLOP/s, 2039 GB/s, NVLink 600 GB/s both ways); attention: FlashAttention-2, arXiv 2307.08691",
    ),
    "h100": Machine(
        "H100 SXM 80 GB", 79.1, 989, 700, 650, 550, 2700, 370,
        "NVIDIA H100 data sheet (989 TFLOP/s, 3350 GB/s, NVLink 900 GB/s both ways); attention: FlashAttention-3, arXiv 2407.08608 "
        "and Dao-AILab/flash-attention#1893",
    ),
    "h200": Machine(
        "H200 SXM 141 GB", 139.8, 989, 780, 650, 550, 4300, 370,
        "NVIDIA H200 data sheet (989 TFLOP/s, 4800 GB/s, NVLink 900 GB/s both ways); products and copies as PyTorch reached on one "
        "(docs/kernels.md); attention: as H100",
    ),
    "h800": Machine(
        "H800 SXM 80 GB", 79.1, 989, 700, 650, 550, 2700, 165,
        "as H100, with NVLink of 400 GB/s both ways (NVIDIA H800 data sheet)",
    ),
    "h20": Machine(
        "H20 96 GB", 95.1, 148, 133, 133, 118, 3200, 370,
        "148 TFLOP/s and 4000 GB/s: Dao-AILab/flash-attention#1310; NVLink 900 GB/s both ways; rates at 90 % and 80 % of the peak "
        "(FlashAttention-3 there: 126 to 141 TFLOP/s, the same issue and thu-ml/SageAttention's chart)",
    ),
    "b200": Machine(
        "B200 SXM 180 GB", 178.0, 2250, 1575, 1350, 1125, 6400, 740,
        f"NVIDIA B200 data sheet (2250 TFLOP/s, 8000 GB/s, NVLink 1800 GB/s both ways); {_SHARES}",
    ),
    "rtx5090": Machine(
        "GeForce RTX 5090 32 GB", 31.3, 209.5, 147, 126, 105, 1430, 25,
        f"NVIDIA RTX Blackwell whitepaper (209.5 TFLOP/s with fp32 sums, 1792 GB/s, PCIe); {_SHARES}",
    ),
    "rtx4090": Machine(
        "GeForce RTX 4090 24 GB", 23.5, 165.2, 116, 99, 83, 800, 20,
        f"NVIDIA Ada whitepaper (165.2 TFLOP/s with fp32 sums, 1008 GB/s, PCIe); {_SHARES}",
    ),
}  # fmt: skip


def machine(name: str, results: Path = RESULTS) -> tuple[Machine, str]:
    """A GPU by its short name, and where its rates are from. Raises ValueError, naming the known ones."""
    known = MACHINES.get(name.lower())
    if known is None:
        raise ValueError(f"gpu must be one of {', '.join(MACHINES)}, got {name!r}")
    return measured(known, name.lower(), sorted(results.glob("*.json")) if results.is_dir() else [])


def known(device: str) -> Machine | None:
    """The GPU by the name that CUDA tells, "NVIDIA H100 80GB HBM3"; None for another, or one of its slower cards."""
    words = re.split(r"[\s-]+", device)
    if {"PCIe", "PCIE", "NVL", "D", "Laptop"} & set(words):
        return None
    return next((one for name, one in MACHINES.items() if name.upper().removeprefix("RTX") in words), None)


def measured(known: Machine, name: str, files: Iterable[Path]) -> tuple[Machine, str]:
    """The GPU with the rates that the newest results file of its kind holds of our own kernels, each timed behind its check."""
    model = name.upper().removeprefix("RTX")
    newest, measurement = "", None
    for file in files:
        try:
            document = json.loads(file.read_text())
            environment = document["environment"]
            named = model in re.split(r"[\s-]+", environment["device"]["name"]) and environment["device"]["type"] == "cuda"
            if named and environment["date"] > newest and (rates := _rates(document)):
                newest, measurement = environment["date"], (file, rates)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a results file of another kind, or none
    if measurement is None:
        return known, f"the table of GPUs, none measured here ({known.source})"
    file, rates = measurement
    source = ", ".join(f"{name} {value:.0f}" for name, value in rates.items())
    source = f"{source} TFLOP/s measured in {file.name} of {newest[:10]}; the rest by the table ({known.source})"
    return replace(known, **rates), source


def _rates(document: dict) -> dict[str, float]:
    """The median TFLOP/s, over the cases with Wan's head size, of the fastest of our own contenders in each, and of the products
    timed beside them."""
    ours: dict[str, list[float]] = {"attention": [], "backward": []}
    products: list[float] = []
    for case in document["cases"]:
        timed = [c["timings"] for c in case["contenders"].values() if c["ours"] and c["status"] == "timed"]
        if case["head_dim"] != 128 or not timed:
            continue
        products.append(case["ceiling"]["tflops"])
        for rate, timing in (("attention", "forward"), ("backward", "backward")):
            reached = [timings[timing]["tflops"] for timings in timed if timing in timings]
            ours[rate] += [max(reached)] if reached else []
    return {name: median(values) for name, values in {"linear": products, **ours}.items() if values}
