"""Drives the one CMake build, of the CUDA kernels, and writes what was built into the package; all metadata is in pyproject.toml.

Environment: AADKERN_BUILD_CUDA = auto (default: build what the machine allows, and no CUDA kernel where it has GPUs that could not
run one), 1 (CUDA kernels or failure), 0 (none). AADKERN_REPOSITORY = the address of the repository on GitHub, for the links of the
package's page on an index; the release workflow sets it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA_CHOICES = ("auto", "1", "0")
CAPABILITY = "9.0"  # of the GPUs that the CUDA kernels are for, and no other runs them
CUDA = "aadkern._C"
FACTS = Path("aadkern", "_built.json")
WITHOUT_CUDA = (
    "aadkern is installed without its CUDA kernels for sm_90a (H100, H200, H20); Triton's and torch's serve every GPU.\n"
    "To have them: CUDA 12.0 or later, a C++17 compiler and torch 2.11 or later, no GPU; `AADKERN_BUILD_CUDA=1 pip install -v .` "
    "says what fails."
)


class CMakeBuild(build_ext):
    def build_extensions(self) -> None:
        """The kernels, if they can be had and are wanted, and the facts in any case."""
        cuda = os.environ.get("AADKERN_BUILD_CUDA", "auto")
        if cuda not in CUDA_CHOICES:
            raise SystemExit(f"AADKERN_BUILD_CUDA={cuda!r} is not one of {', '.join(CUDA_CHOICES)}")
        library = Path(self.get_ext_fullpath(CUDA))
        library.unlink(missing_ok=True)  # what an earlier build left must not pass for this one's
        useless = "AADKERN_BUILD_CUDA=0 was set" if cuda == "0" else _useless_here() if cuda == "auto" else None
        facts = {"no_cuda": useless} if useless else self.built(cuda, library)
        if useless is None and not library.exists():
            _warn(facts["no_cuda"])
        elif useless:
            print(f"{CUDA}: {useless}", file=sys.stderr, flush=True)
        file = Path(self.build_lib, FACTS)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"version": self.distribution.get_version(), **facts}, indent=1) + "\n")

    def built(self, cuda: str, library: Path) -> dict[str, str]:
        """What CMake built, or why it did not."""
        facts = Path(self.build_temp).resolve() / "facts.txt"
        try:
            self.run_cmake(library, facts, cuda)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = str(error) if isinstance(error, OSError) else "CMake stopped, see above"
            if cuda == "1":
                raise SystemExit(f"AADKERN_BUILD_CUDA=1, and the build failed: {reason}") from None
            library.unlink(missing_ok=True)
            failed = isinstance(error, subprocess.CalledProcessError)
            return {"no_cuda": "the kernels did not compile (`pip install -v .` shows why)" if failed else reason}
        return dict(line.split("=", 1) for line in facts.read_text().splitlines())

    def run_cmake(self, library: Path, facts: Path, cuda: str) -> None:
        """Configure and build, placing the module where setuptools expects it."""
        cmake = shutil.which("cmake")
        if cmake is None:
            raise FileNotFoundError("cmake is not on PATH")
        facts.parent.mkdir(parents=True, exist_ok=True)
        definitions = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(library.resolve().parent),
            "AADKERN_BUILD_CUDA": cuda,
            "AADKERN_CUDA_FILE": library.name,
            "AADKERN_FACTS": str(facts),
            "AADKERN_TORCH": _torch(),
        }
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        # An earlier cache names tools of pip's build environment, which is gone.
        subprocess.run([cmake, "--fresh", "-S", str(ROOT), "-B", str(facts.parent), *generator, *flags], check=True)
        subprocess.run([cmake, "--build", str(facts.parent), "--parallel"], check=True)

    def copy_extensions_to_source(self) -> None:
        """Into an editable install, with the facts. A module that an earlier build left must not be found there."""
        (ROOT / self.get_ext_filename(CUDA)).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib, FACTS), ROOT / FACTS)


class Wheel(bdist_wheel):
    """One for every Python, as nothing in it knows of Python: of this platform with the kernels, of any without."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.root_is_pure = not any(Path(self.get_finalized_command("build").build_lib, "aadkern").glob("_C.*"))
        if self.root_is_pure:
            self.distribution.ext_modules = []  # an extension that was not built would send every file to the platform's folder
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def _useless_here() -> str | None:
    """Why CUDA kernels would serve no GPU of this machine; None where one would, or where none can be asked (an image's build)."""
    try:
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        query = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    capabilities = set(query.stdout.split()) if query.returncode == 0 else set()
    # Anything else than capabilities ("[N/A]", an old driver's error) is no answer.
    if not capabilities or CAPABILITY in capabilities or not all(text.replace(".", "", 1).isdecimal() for text in capabilities):
        return None
    have = f"compute capability {', '.join(sorted(capabilities))}"
    return f"the kernels are for sm_90a and the GPUs here have {have} (AADKERN_BUILD_CUDA=1 builds them all the same)"


def _torch() -> str:
    """The folder of the torch to take headers from, or ""; not imported. pip's build isolation hides the torch of the environment
    that it installs into, but the stable ABI's headers may be those of any version."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent)
    beside = Path(sysconfig.get_path("platlib"), "torch")
    return str(beside) if beside.is_dir() else ""


def _warn(reason: str) -> None:
    rule = "*" * 100
    print(f"\n{rule}\nWARNING: {CUDA} was not built: {reason}\n{WITHOUT_CUDA}\n{rule}\n", file=sys.stderr, flush=True)


def _readme(repository: str, version: str) -> str:
    """README.md as an index shows it, where relative links lead nowhere: they lead to the version's files in the repository.
    Where none is named, they are plain words and pictures are left out."""
    text = (ROOT / "README.md").read_text()
    tree = f"{repository.rstrip('/')}/{{kind}}/v{version}/{{path}}"

    def absolute(match: re.Match[str]) -> str:
        mark, words, path = match.groups()
        if not repository:
            return "" if mark else words
        return f"{mark}[{words}]({tree.format(kind='raw' if mark else 'blob', path=path)})"

    return re.sub(r"(!?)\[([^\[\]]*)\]\((?!\w+:|#)([^)\s]+)\)", absolute, text)


def _urls(repository: str) -> dict[str, str]:
    pages = {"Source": "", "Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
    return {name: repository.rstrip("/") + page for name, page in pages.items()} if repository else {}


REPOSITORY = os.environ.get("AADKERN_REPOSITORY", "")
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "aadkern" / "__init__.py").read_text(), re.M)[1]

# Optional, so that an editable install goes on without its file.
setup(
    ext_modules=[Extension(CUDA, sources=[], optional=True, py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    long_description=_readme(REPOSITORY, VERSION),
    long_description_content_type="text/markdown",
    project_urls=_urls(REPOSITORY),
)
