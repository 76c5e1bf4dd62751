"""What a results file holds: one JSON document for every benchmark of attention, its environment, and the check of its form.

``FORM`` is the schema: a type or tuple of types, a list with the form of its items, a dict with the form of each key, or
``{str: form}`` for any keys.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = "aadkern-results/1"
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("triton", "numpy", "diffusers", "flash-attn", "flash-attn-4", "fa3-fwd", "xformers", "pytest", "hypothesis")

NUMBER, MAYBE_NUMBER = (int, float), (int, float, type(None))
MAYBE_WHOLE, MAYBE_TEXT = (int, type(None)), (str, type(None))
TIMING = {
    "median_ms": NUMBER,
    "p25_ms": NUMBER,
    "p75_ms": NUMBER,
    "tflops": NUMBER,
    "ceiling_share": MAYBE_NUMBER,
    "rounds_ms": [NUMBER],
}
CONTENDER = {
    "ours": bool,
    "status": str,  # one of STATUS
    "reason": MAYBE_TEXT,
    "errors": {str: NUMBER},
    "prepare_seconds": MAYBE_NUMBER,
    "peak_bytes": MAYBE_WHOLE,
    "timings": {str: TIMING},  # of forward, backward, both
}
CASE = {
    "id": str,
    "q_len": int,
    "k_len": int,
    "heads": int,
    "head_dim": int,
    "tokens_per_frame": int,
    "dtype": str,
    "area": int,
    "density": NUMBER,
    "flops": {str: int},
    "seed": int,
    "checked": {"heads": [int], "tensors": [str], "against": str, "rule": str},
    "ceiling": {"size": int, "dtype": str, "tflops": NUMBER, "rounds": int},
    "seconds": NUMBER,
    "contenders": {str: CONTENDER},
}
FORM: dict[str, Any] = {
    "schema": str,
    "environment": {
        "date": str,
        "commit": MAYBE_TEXT,
        "changed_files": MAYBE_WHOLE,  # against that commit
        "sources": str,  # sha256 over aadkern, csrc and benchmarks
        "machine": str,
        "cpu": str,
        "cores": int,
        "threads": int,
        "python": str,
        "torch": str,
        "cuda": MAYBE_TEXT,
        "cudnn": MAYBE_WHOLE,
        "nvcc": MAYBE_TEXT,
        "driver": MAYBE_TEXT,
        "device": {
            "type": str,
            "name": str,
            "capability": MAYBE_TEXT,
            "multiprocessors": MAYBE_WHOLE,
            "memory_bytes": MAYBE_WHOLE,
        },
        "packages": {str: MAYBE_TEXT},
        "backends": {str: str},
    },
    "conditions": {str: (str, int, float)},
    "stages": [{"name": str, "outcome": str, "seconds": NUMBER}],
    "tests": [{"id": str, "outcome": str, "seconds": NUMBER, "message": str}],
    "cases": [CASE],
    "rooms": {str: object},  # the documents of the other rooms' benchmarks, as they wrote them
    "not_reached": [str],
}
STATUS = ("timed", "checked", "missing", "refused", "failed")  # checked: right, but the case ended before it was timed


def problems(value: Any, form: Any = FORM, at: str = "results") -> list[str]:
    """Where a document departs from its form, in words; empty if nowhere."""
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{at} must be a list, got {type(value).__name__}"]
        return [text for i, item in enumerate(value) for text in problems(item, form[0], f"{at}[{i}]")]
    if isinstance(form, Mapping):
        if not isinstance(value, dict):
            return [f"{at} must be an object, got {type(value).__name__}"]
        any_key = form.get(str)
        named = {key for key in form if isinstance(key, str)}
        wrong = [f"{at} must have {key!r}" for key in sorted(named - set(value))]
        for key, item in value.items():
            if key not in named and any_key is None:
                wrong.append(f"{at} must not have {key!r}")
            else:
                wrong += problems(item, form[key] if key in named else any_key, f"{at}.{key}")
        return wrong
    if form is object:
        return []
    wanted = form if isinstance(form, tuple) else (form,)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        return [f"{at} must be {' or '.join(t.__name__ for t in wanted)}, got {value!r}"]
    if isinstance(value, float) and value != value:
        return [f"{at} must not be NaN"]
    return []


def document_problems(document: Any) -> list[str]:
    """``problems``, and what types cannot say."""
    wrong = problems(document)
    if wrong:
        return wrong
    if document["schema"] != SCHEMA:
        wrong.append(f"results.schema must be {SCHEMA!r}, got {document['schema']!r}")
    for case in document["cases"]:
        for name, contender in case["contenders"].items():
            at = f"{case['id']}: {name}"
            if contender["status"] not in STATUS:
                wrong.append(f"{at}: status must be one of {', '.join(STATUS)}, got {contender['status']!r}")
            if contender["timings"] and contender["status"] != "timed":
                wrong.append(f"{at}: has timings, so status must be 'timed', got {contender['status']!r}")
            if contender["status"] in ("timed", "checked") and not contender["errors"]:
                wrong.append(f"{at}: passes for right without the errors that were found")
            if contender["status"] in ("missing", "refused", "failed") and not contender["reason"]:
                wrong.append(f"{at}: is {contender['status']} without a reason")
    return wrong


def read(path: str | Path) -> dict[str, Any]:
    """A results file. Raises ValueError, naming the first departures, if it does not have the form."""
    try:
        document = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    wrong = document_problems(document)
    if wrong:
        raise ValueError(f"{path} is no {SCHEMA} file: {'; '.join(wrong[:3])}")
    return document


def write(document: dict[str, Any], path: Path) -> None:
    """Check and write it, whole or not at all."""
    wrong = document_problems(document)
    if wrong:
        raise ValueError(f"the results do not have their form: {'; '.join(wrong[:3])}")
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    os.replace(beside, path)


def empty(environment: dict[str, Any], conditions: dict[str, Any]) -> dict[str, Any]:
    """A document without results yet."""
    lists: dict[str, Any] = {"stages": [], "tests": [], "cases": [], "rooms": {}, "not_reached": []}
    return {"schema": SCHEMA, "environment": environment, "conditions": conditions, **lists}


def header(device_type: str, commit: str | None = None) -> dict[str, Any]:
    """What the JSON of every room's benchmark begins with: where it ran, by ``environment``."""
    return {"environment": environment(device_type, commit)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def sources_digest() -> str:
    """sha256 over the names and bytes of the sources, for copies that carry no history."""
    digest = hashlib.sha256()
    for folder in ("aadkern", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h"):
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or "unknown"
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device_type: str, commit: str | None = None) -> dict[str, Any]:
    """Where this runs: the device, versions, and the commit (``commit`` where the copy at hand has no history)."""
    import torch

    import aadkern

    cuda = device_type == "cuda"
    properties = torch.cuda.get_device_properties(0) if cuda else None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", "aadkern", "csrc", "benchmarks")
    head = _output("git", "rev-parse", "HEAD")
    nvcc = _output(shutil.which("nvcc") or "nvcc", "--version")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or head,
        "changed_files": len((changed or "").splitlines()) if head and not commit else None,
        "sources": sources_digest(),
        "machine": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nvcc": nvcc.splitlines()[-1] if nvcc else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0") if cuda else None,
        "device": {
            "type": device_type,
            "name": properties.name if properties else _cpu_name(),
            "capability": f"{properties.major}.{properties.minor}" if properties else None,
            "multiprocessors": properties.multi_processor_count if properties else None,
            "memory_bytes": properties.total_memory if properties else None,
        },
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": aadkern.backends(device_type),
    }
