"""A copy of the sources, built with this environment's tools, and an nvcc that says what a test wants."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT_FROM = ["CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "csrc", "pyproject.toml", "setup.py"]


@pytest.fixture
def sources(tmp_path):
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in BUILT_FROM:
        kind = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        kind(ROOT / name, copy / name)
    for name in ("aadkern", "aadkern_train"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_built.json", "__pycache__"))
    return copy


def run(command: list[str | Path], cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("AADKERN_BUILD_CUDA", "PYTHONPATH", "CXX")}
    return subprocess.run(command, cwd=cwd, env=clean | variables, capture_output=True, text=True)


def build(sources: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "setup.py", "build_ext", "--build-lib", "built", "--build-temp", "temp"], sources, **variables)


def nvcc_that_says(folder: Path, text: str) -> str:
    """A CUDA_HOME whose nvcc prints `text`; it is found before any real one."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho '{text}'\n")
    nvcc.chmod(0o755)
    return str(folder)
