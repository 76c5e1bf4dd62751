"""Builds what runs the Hopper kernels: on the host model (g++, no GPU) for every test, by nvcc for the checks of primitives.

    library = build("forward")                      # csrc/model_entries/forward.cpp with the model, loaded; cached by content
    report = library.reported(model().forward, ..., options=Options(completion=LAZY))
    assert report.clean, report
    library = build("forward", faults=[Fault("attention/sm90/forward.cuh", "old text", "new text")])   # a planted fault

An entry is extern "C" and ends in (const Options*, char* report, int size); it gives the report to `write_report`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "host_model"
EAGER, LAZY, RANDOM = 0, 1, 2
# Fortify refuses the jumps between stacks by which fibers switch.
FLAGS = ["-std=c++17", "-march=native", "-fPIC", "-DAADKERN_HOST_MODEL", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]


class Options(ctypes.Structure):
    """csrc/primitives/model/launch.h says what they mean."""

    _fields_ = (
        ("completion", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("resident_ctas", ctypes.c_int),
        ("check_races", ctypes.c_int),
        ("max_switches", ctypes.c_int64),
    )

    def __init__(self, completion=RANDOM, seed=1, resident_ctas=1, check_races=True, max_switches=50_000_000):
        super().__init__(completion, seed, resident_ctas, check_races, max_switches)

    def __repr__(self) -> str:
        return f"Options({', '.join(f'{name}={getattr(self, name)}' for name, _ in self._fields_)})"


def schedules(random: int, **options) -> Iterator[Options]:
    """Eager, lazy, and this many random ones."""
    yield Options(EAGER, seed=3, **options)
    yield Options(LAZY, seed=64, **options)  # shared memory at offset 0 of its 1024-byte pattern
    yield from (Options(RANDOM, seed=seed, **options) for seed in range(1, random + 1))


@dataclass(frozen=True)
class Report:
    """What went wrong in a launch: kind -> (count, first message)."""

    kinds: dict[str, tuple[int, str]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not self.kinds

    @classmethod
    def parse(cls, text: str) -> Report:
        rows = [line.split("\t", 2) for line in text.splitlines() if line]
        return cls({kind: (int(count), message) for kind, count, message in rows})

    def __str__(self) -> str:
        return "\n".join(f"[{kind}] {count} times, first {message}" for kind, (count, message) in self.kinds.items()) or "clean"


def run(entry, *arguments, options: Options | None = None) -> Report:
    """Calls an entry; arguments as ctypes takes them, tensors by their data_ptr()."""
    buffer = ctypes.create_string_buffer(16384)
    entry.restype = ctypes.c_int
    entry(*arguments, ctypes.byref(options or Options()), buffer, ctypes.c_int(len(buffer)))
    return Report.parse(buffer.value.decode())


@dataclass(frozen=True)
class Fault:
    """A textual substitution in csrc/<file>; the old text must occur exactly once."""

    file: str
    old: str
    new: str


def without(text: str, *parts: str) -> str:
    """The text less these parts of it, each of which occurs once."""
    for part in parts:
        if text.count(part) != 1:
            raise ValueError(f"{part!r} occurs {text.count(part)} times, not once, in {text!r}")
        text = text.replace(part, "")
    return text


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if found is None:
        pytest.skip("needs a C++ compiler (g++)")
    return found


@functools.cache
def machine() -> str:
    """Compiler and processor, since -march=native makes code for this one."""
    return subprocess.run([compiler(), "-march=native", "-Q", "--help=target", "--version"], capture_output=True, text=True).stdout


def digest(*parts: object, folders: Iterable[Path] = ()) -> str:
    sha = hashlib.sha256(repr((machine(), parts)).encode())
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"}):
            sha.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return sha.hexdigest()[:24]


def compile_to(target: Path, command: list[str]) -> Path:
    """Runs `command -o target`, unless target is there; by way of another name, since several processes may build at once."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            result = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
            made.replace(target)
    return target


def model_objects(sources: Path) -> list[Path]:
    """The model itself, compiled once: faults in kernels leave it as it is."""
    flags = [*FLAGS, "-O2", f"-I{sources}"]
    key = digest(FLAGS, folders=[sources / "primitives"])
    parts = sorted((sources / "primitives" / "model").glob("*.cpp"))
    return [compile_to(BUILD / f"{part.stem}-{key}.o", [compiler(), *flags, "-c", str(part)]) for part in parts]


def planted(faults: Iterable[Fault]) -> Path:
    """A copy of csrc with the faults in it."""
    faults = list(faults)
    target = BUILD / "faults" / digest(faults, folders=[SOURCES])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            copy = Path(folder) / "csrc"
            shutil.copytree(SOURCES, copy)
            for fault in faults:
                text = (copy / fault.file).read_text()
                if text.count(fault.old) != 1:
                    raise ValueError(f"{fault.file} holds {text.count(fault.old)} times, not once: {fault.old!r}")
                (copy / fault.file).write_text(text.replace(fault.old, fault.new))
            try:
                copy.replace(target)
            except OSError:  # another process was first
                if not target.exists():
                    raise
    return target


class Library(ctypes.CDLL):
    """A library of the host model. The entries for checks of primitives are plain C and called as they are, on a GPU machine too,
    where no pybind11 is; attention's take structs, which ``model()`` makes."""

    @property
    def file(self) -> str:
        return self._name

    def reported(self, call: Callable[..., str], *arguments: object, options: Options | None = None) -> Report:
        """What a function of ``model()`` reports of this library."""
        return Report.parse(call(self.file, *arguments, ctypes.addressof(options or Options())))


@functools.cache
def model() -> ModuleType:
    """csrc/model_entries/module.cpp: arguments of the attention kernels, and calls, bound by pybind11."""
    pybind11 = pytest.importorskip("pybind11")
    sources = [
        SOURCES / "model_entries" / "module.cpp",
        SOURCES / "attention" / "launch.h",
        SOURCES / "primitives" / "model" / "launch.h",
    ]
    key = digest([path.read_text() for path in sources], pybind11.__version__, sys.version)
    includes = [f"-I{SOURCES}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared"]
    made = compile_to(BUILD / f"hopper_model-{key}.so", [compiler(), *flags, *includes, str(sources[0])])
    spec = importlib.util.spec_from_file_location("hopper_model", made)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str, faults: Iterable[Fault] = (), optimise: str = "-O2") -> Library:
    """csrc/model_entries/<name>.cpp and the model, as a loaded library."""
    faults = list(faults)
    sources = planted(faults) if faults else SOURCES
    objects = model_objects(sources)
    # Kernels and entries may include anything of csrc but what only nvcc or torch's build sees.
    key = digest(
        name,
        optimise,
        [str(path.name) for path in objects],
        folders=[sources / part for part in ("attention", "primitive_checks", "model_entries")],
    )
    command = [
        compiler(),
        *FLAGS,
        optimise,
        f"-I{sources}",
        "-shared",
        str(sources / "model_entries" / f"{name}.cpp"),
        *map(str, objects),
    ]
    return Library(str(compile_to(BUILD / f"{name}-{key}.so", command)))


def nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("needs nvcc, on PATH or in CUDA_HOME/bin")
    return found


def build_primitive_checks() -> Library:
    """The checks of primitives as the GPU runs them: the same entries as build("primitive_checks"). Loading it needs no GPU."""
    flags = [
        "-std=c++17",
        "-O3",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
        "-Xcompiler",
        "-fPIC",
        "-Werror",
        "all-warnings",
        f"-I{SOURCES}",
    ]
    parts = [SOURCES / "primitive_checks" / "checks.cu", SOURCES / "primitives" / "device" / "tensor_map.cu"]
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    key = digest(version, flags, folders=[SOURCES / "primitives", SOURCES / "primitive_checks"])
    return Library(str(compile_to(BUILD / f"primitive_checks-{key}.so", [nvcc(), *flags, "-shared", *map(str, parts)])))
