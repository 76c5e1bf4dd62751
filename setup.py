"""Drives the one CMake build; all metadata is in pyproject.toml.

Environment: AADKERN_BUILD_CUDA = auto (default: build what the machine allows), 1 (CUDA kernels or failure), 0 (none).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = ("auto", "1", "0")


class CMakeExtension(Extension):
    """A module that CMake builds; `optional` lets an editable install go on without its file."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[], optional=True)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("AADKERN_BUILD_CUDA", "auto")
        if cuda not in CUDA_CHOICES:
            raise SystemExit(f"AADKERN_BUILD_CUDA={cuda!r} is not one of {', '.join(CUDA_CHOICES)}")
        try:
            self.run_cmake(ext, cuda)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = "CMake stopped, see above" if isinstance(error, subprocess.CalledProcessError) else str(error)
            if cuda == "1":
                raise SystemExit(f"AADKERN_BUILD_CUDA=1, and the build failed: {reason}") from error
            print(_without_host_module(ext.name, reason), file=sys.stderr, flush=True)

    def run_cmake(self, ext: Extension, cuda: str) -> None:
        """Configure and build, placing the module where setuptools expects it."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on PATH")
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        definitions = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "AADKERN_VERSION": self.distribution.get_version(),
            "AADKERN_BUILD_CUDA": cuda,
        }
        if importlib.util.find_spec("pybind11"):
            import pybind11

            definitions["pybind11_DIR"] = pybind11.get_cmake_dir()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        subprocess.run([cmake, "-S", str(ROOT), "-B", str(build_dir), *generator, *flags], check=True)
        subprocess.run([cmake, "--build", str(build_dir)], check=True)


def _without_host_module(name: str, reason: str) -> str:
    rule = "*" * 100
    return (
        f"\n{rule}\nWARNING: {name} was not built: {reason}\n"
        "aadkern is installed without it. Nothing is slower or missing but the build facts in `aad info`.\n"
        f"To have it: install a C++17 compiler (CXX names one), then `pip install -v .` shows the build.\n{rule}\n"
    )


setup(ext_modules=[CMakeExtension("aadkern._host")], cmdclass={"build_ext": CMakeBuild})
