"""FlashAttention 3 from a source folder, forward and backward, as a rival in the same run: ``python -m benchmarks.fa3 DIR``.

The wheels that are to be had hold no backward for Hopper. DIR is a checkout of Dao-AILab/flash-attention with its submodule
csrc/cutlass, or the ``hopper`` folder in it, and stays as it is: a copy is built, with setup.py's own switches for all that a
comparison at head_dim 128 in bf16 and fp16 does not run, so that 4 instances are left of 451. What was built lies in
build/fa3-..., named by source, torch and compiler, and is taken as it is the next time; whoever has it first on the module path
finds ``flash_attn_interface`` there, which the contender "loop, FA3" imports. Unverified on a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.results import ROOT

# Of hopper/setup.py, at commit 0251105 of August 2026. Clusters stay: they are part of its speed.
SWITCHES = {
    f"FLASH_ATTENTION_{name}": "TRUE"
    for name in (
        *(
            f"DISABLE_{feature}"
            for feature in ("SPLIT", "PAGEDKV", "APPENDKV", "LOCAL", "SOFTCAP", "PACKGQA", "FP8", "VARLEN", "SM80")
        ),
        *(f"DISABLE_HDIM{size}" for size in ("64", "96", "192", "256", "DIFF64", "DIFF192")),
        "FORCE_BUILD",
    )
}
MODULES = ("flash_attn_interface.py", "flash_attn_config.py", "flash_attn_3/__init__.py")
SOURCES = {".py", ".h", ".hpp", ".cu", ".cuh", ".cpp"}


def hopper_folder(folder: Path) -> Path:
    """The ``hopper`` folder that was meant. Raises ValueError where there is none, or CUTLASS is missing beside it."""
    hopper = next((place for place in (folder, folder / "hopper") if (place / "flash_attn_interface.py").is_file()), None)
    if hopper is None or not (hopper / "setup.py").is_file():
        wanted = "a checkout of Dao-AILab/flash-attention or its hopper folder, with setup.py and flash_attn_interface.py"
        raise ValueError(f"--fa3-source must be {wanted}, got {folder}")
    if not (hopper.parent / "csrc" / "cutlass" / "include" / "cutlass").is_dir():
        wanted = "with its submodule (git submodule update --init csrc/cutlass)"
        raise ValueError(f"--fa3-source must be a checkout {wanted}, got {folder}, whose csrc/cutlass is empty")
    return hopper.resolve()


def place_of(hopper: Path) -> Path:
    """Where the build of these sources with this torch and compiler lies, or is to lie."""
    sha = hashlib.sha256(repr((sorted(SWITCHES), torch.__version__, sys.version_info[:2])).encode())
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    sha.update(subprocess.run([nvcc, "--version"], capture_output=True).stdout if nvcc else b"")
    for path in sorted(path for path in hopper.rglob("*") if path.suffix in SOURCES and path.is_file()):
        sha.update(str(path.relative_to(hopper)).encode() + path.read_bytes())
    return ROOT / "build" / f"fa3-{sha.hexdigest()[:16]}"


def build_command(target: Path, objects: Path) -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--build-lib", str(target), "--build-temp", str(objects)]


def built(folder: Path) -> Path:
    """The folder to put on the module path, built first if it is not there. Raises ValueError for a folder that is no source, and
    RuntimeError where the build fails (its output went to this process's)."""
    hopper = hopper_folder(folder)
    target = place_of(hopper)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aadkern-fa3-") as scratch:
        copy, build, tools = Path(scratch, "hopper"), Path(scratch, "made"), Path(scratch, "tools")
        shutil.copytree(hopper, copy, ignore=shutil.ignore_patterns("build", "dist", "*.egg-info", "*.so", "__pycache__"))
        Path(scratch, "csrc").symlink_to(hopper.parent / "csrc")
        Path(scratch, "README.md").write_text("FlashAttention 3\n")  # setup.py reads one
        tools.mkdir()
        Path(tools, "git").write_text("#!/bin/sh\nexit 0\n")  # it asks git for the submodule, which is there
        Path(tools, "git").chmod(0o755)
        jobs = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 6))), "NVCC_THREADS": "1"}
        environment = {**os.environ, **SWITCHES, **jobs, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        status = subprocess.run(build_command(build, Path(scratch, "objects")), cwd=copy, env=environment).returncode
        libraries = list(Path(build, "flash_attn_3").glob("_C*.so"))
        if status != 0 or not libraries:
            raise RuntimeError(f"FlashAttention 3 of {folder} was not built: setup.py ended with status {status}")
        for name in MODULES:  # the config is written by setup.py
            if Path(copy, name).exists():
                Path(build, name).parent.mkdir(exist_ok=True)
                shutil.copy(Path(copy, name), Path(build, name))
        half = Path(tempfile.mkdtemp(dir=target.parent))
        shutil.copytree(build, half, dirs_exist_ok=True)
        try:
            half.replace(target)
        except OSError:  # another process was first
            shutil.rmtree(half)
            if not target.is_dir():
                raise
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.fa3", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="a checkout of flash-attention, or its hopper folder")
    options = parser.parse_args(argv)
    try:
        print(built(options.folder))
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.fa3: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
