"""Drives the one CMake build; all metadata is in pyproject.toml.

Environment: AADKERN_BUILD_CUDA = auto (default: build what the machine allows, and no CUDA kernel where it has GPUs that could not
run one), 1 (CUDA kernels or failure), 0 (none).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = ("auto", "1", "0")
CAPABILITY = "9.0"  # of the GPUs that the CUDA kernels are for, and no other runs them
HOST, CUDA = "aadkern._host", "aadkern._C"
WITHOUT = {
    HOST: (
        "aadkern is installed without it. Nothing is slower or missing but the build facts in `aad info`.\n"
        "To have it: install a C++17 compiler (CXX names one), then `pip install -v .` shows the build."
    ),
    CUDA: (
        "aadkern is installed without its CUDA kernels for sm_90a (H100, H200, H20); Triton's and torch's serve every GPU.\n"
        "To have them: CUDA 12.0 or later and torch 2.11 or later, no GPU; `AADKERN_BUILD_CUDA=1 pip install -v .` says what fails."
    ),
}


class CMakeExtension(Extension):
    """A module that CMake builds; `optional` lets an editable install go on without its file."""

    def __init__(self, name: str, **options: bool) -> None:
        super().__init__(name, sources=[], optional=True, **options)


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        """One CMake build of both modules; under auto a second one without CUDA, if the kernels do not compile."""
        cuda = os.environ.get("AADKERN_BUILD_CUDA", "auto")
        if cuda not in CUDA_CHOICES:
            raise SystemExit(f"AADKERN_BUILD_CUDA={cuda!r} is not one of {', '.join(CUDA_CHOICES)}")
        for name in (HOST, CUDA):  # what an earlier build left must not pass for this one's
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        useless = _useless_here() if cuda == "auto" else None
        if useless:
            print(f"aadkern._C: {useless}", file=sys.stderr, flush=True)
            reason = self.failure(AADKERN_BUILD_CUDA="0", AADKERN_NO_CUDA=useless)
            if reason:
                _warn(HOST, reason)
            return
        reason = self.failure(AADKERN_BUILD_CUDA=cuda)
        if reason and cuda == "1":
            raise SystemExit(f"AADKERN_BUILD_CUDA=1, and the build failed: {reason}")
        if reason and cuda == "auto":
            no_cuda = "the kernels did not compile (`pip install -v .` shows why)"
            reason = self.failure(AADKERN_BUILD_CUDA="0", AADKERN_NO_CUDA=no_cuda)
        for name in (HOST, CUDA) if cuda == "auto" else (HOST,):
            if not Path(self.get_ext_fullpath(name)).exists():
                _warn(name, reason or "see `No CUDA kernels` above")

    def failure(self, **definitions: str) -> str | None:
        """Why CMake did not build what the definitions ask for; None: it did."""
        try:
            self.run_cmake(definitions)
        except OSError as error:
            return str(error)
        except subprocess.CalledProcessError:
            return "CMake stopped, see above"
        return None

    def run_cmake(self, definitions: dict[str, str]) -> None:
        """Configure and build, placing the modules where setuptools expects them."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on PATH")
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        cuda_file = Path(self.get_ext_fullpath(CUDA)).resolve()
        definitions |= {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(cuda_file.parent),
            "Python_EXECUTABLE": sys.executable,
            "AADKERN_VERSION": self.distribution.get_version(),
            "AADKERN_CUDA_FILE": cuda_file.name,
            "AADKERN_TORCH": _torch(),
        }
        if importlib.util.find_spec("pybind11"):
            import pybind11

            definitions["pybind11_DIR"] = pybind11.get_cmake_dir()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        # An earlier cache names tools of pip's build environment, which is gone.
        subprocess.run([cmake, "--fresh", "-S", str(ROOT), "-B", str(build_dir), *generator, *flags], check=True)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel"], check=True)

    def copy_extensions_to_source(self) -> None:
        """Into an editable install. A module of an earlier build that this one does not have must not be found there."""
        for extension in self.extensions:
            (ROOT / self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


def _useless_here() -> str | None:
    """Why CUDA kernels would serve no GPU of this machine; None where one would, or where none can be asked (an image's build)."""
    try:
        asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = set(told.stdout.split()) if told.returncode == 0 else set()
    # Anything else than capabilities ("[N/A]", an old driver's error) is no answer.
    if not found or CAPABILITY in found or not all(text.replace(".", "", 1).isdecimal() for text in found):
        return None
    have = f"compute capability {', '.join(sorted(found))}"
    return f"the kernels are for sm_90a and the GPUs here have {have} (AADKERN_BUILD_CUDA=1 builds them all the same)"


def _torch() -> str:
    """The folder of the torch to take headers from, or ""; not imported. pip's build isolation hides the torch of the environment
    that it installs into, but the stable ABI's headers may be those of any version."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent)
    beside = Path(sysconfig.get_path("platlib"), "torch")
    return str(beside) if beside.is_dir() else ""


def _warn(name: str, reason: str) -> None:
    rule = "*" * 100
    print(f"\n{rule}\nWARNING: {name} was not built: {reason}\n{WITHOUT[name]}\n{rule}\n", file=sys.stderr, flush=True)


setup(
    ext_modules=[CMakeExtension(HOST), CMakeExtension(CUDA, py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild},
)
