"""The CUDA kernels as the package builds them, without a GPU: one library for sm_90a on the stable ABI, or the reason why not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aadkern import _build
from tests.house.installs import build, nvcc_that_says, run, sources

__all__ = ["sources"]  # a fixture

# In a process of its own, since a torch loads such a library once. An editable install would lend its own modules.
TELL = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import torch, aadkern
from aadkern import _build
reason, backends = _build.load_cuda(), aadkern.backends("cpu")
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = ("sm90_forward", "sm90_backward", "sm90_workspace_bytes")
keys = [[has(f"aadkern::{name}", key) for name in names] for key in ("CUDA", "CPU")]
print(json.dumps([_build.build_info(), _build.describe(), reason, backends["sm90"], keys]))
"""


def told(sources: Path) -> list:
    """build_info(), describe(), load_cuda(), what backends() says of sm90 on the CPU, and for which devices it is registered."""
    done = run([sys.executable, "-c", TELL], sources, PYTHONPATH=str(sources))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def needed_symbols(library: Path) -> set[str]:
    """What the dynamic linker has to find, without versions."""
    return {line.split()[-1].partition("@")[0] for line in output("nm", "-D", "--undefined-only", library).splitlines()}


def cuobjdump() -> str | None:
    """Triton's own serves where the toolkit's is absent."""
    import triton

    of_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(of_triton) if of_triton.exists() else shutil.which("cuobjdump")


def audit(library: Path) -> None:
    """One binary for every torch from 2.11 on, with nothing of CUDA or Python linked to it, for sm_90a alone."""
    needs = needed_symbols(library)
    of_torch = {name for name in needs if re.match("(aoti_)?torch_", name)}
    assert {"aoti_torch_library_init_impl", "torch_library_impl", "aoti_torch_get_current_cuda_stream"} <= of_torch
    assert {name for name in needs if re.search("c10|3ato|2at|5torch|caffe|Py", name)} == set()  # torch's C++, or Python
    assert {name for name in needs if re.match("cu[A-Z]|cuda[A-Z]|__cuda|nv", name)} == set()  # CUDA's runtime or driver
    dynamic = output("readelf", "-d", library)
    assert set(re.findall(r"NEEDED.*\[(libtorch[^\]]*)\]", dynamic)) == {"libtorch.so", "libtorch_cpu.so"}
    assert not re.search("RPATH|RUNPATH|libcuda|libnv|libpython", dynamic)
    if tool := cuobjdump():
        assert set(re.findall(r"sm_\w+", output(tool, "--list-elf", library))) == {"sm_90a"}
        assert "ptx" not in subprocess.run([tool, "--list-ptx", library], capture_output=True, text=True).stdout


def test_the_installed_library():
    """Of `make env`; the one below is built anew."""
    library = _build.cuda_library()
    if library is None:
        pytest.skip(f"CUDA kernels {_build.load_cuda()}")
    audit(library)
    assert _build.load_cuda() is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_one_library_on_the_stable_abi(sources):
    """19 s of processor time."""
    done = build(sources, AADKERN_BUILD_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "spill" not in done.stdout + done.stderr
    (library,) = (sources / "built" / "aadkern").glob("_C.*so")
    audit(library)

    shutil.copytree(sources / "built" / "aadkern", sources / "aadkern", dirs_exist_ok=True)
    info, description, reason, answer, (on_cuda, on_cpu) = told(sources)
    assert info["cuda_architectures"] == ["9.0a"] and info["no_cuda"] is None and "CUDA kernels: sm_90a" in description
    assert reason is None and on_cuda == [True] * 3 and on_cpu == [False] * 3
    assert re.search(r"built for sm_90a, .*compute capability 9\.0", answer)


def test_a_library_that_does_not_load_is_told(sources):
    library = sources / "aadkern" / "_C.abi3.so"
    library.write_bytes(b"not a library")
    *_, reason, answer, (on_cuda, _) = told(sources)
    version = re.escape(torch.__version__)
    assert re.fullmatch(rf"built for sm_90a, cannot load into torch {version}: .*_C\.abi3\.so: .+", reason), reason
    assert answer == reason and on_cuda == [False] * 3

    code = 'extern "C" void of_another_torch(); static const int loaded = (of_another_torch(), 1);'
    (sources / "alien.cpp").write_text(code)
    output("g++", "-shared", "-fPIC", sources / "alien.cpp", "-o", library)
    *_, reason, _, _ = told(sources)
    assert reason.endswith("undefined symbol: of_another_torch")


def test_what_a_build_needs_is_named(sources, tmp_path):
    """Each thing that lacks is told, and refused only where kernels are asked for."""
    works = nvcc_that_says(tmp_path / "works", "Cuda compilation tools, release 13.0, V13.0.88")
    old = nvcc_that_says(tmp_path / "old", "Cuda compilation tools, release 11.8, V11.8.89")
    for toolkit, found, reason in (
        (works, "/nonexistent", "the build saw no torch 2.11 or later"),
        (old, Path(torch.__file__).parent, "nvcc 11.8.89 does not know sm_90a"),
        (works, Path(torch.__file__).parent, "nvcc 13.0.88 compiles nothing here"),
        (works, torch_of_version(tmp_path, 2, 9), "torch 2.9 is older than 2.11"),
    ):
        done = configure(sources, "1", CUDA_HOME=toolkit, AADKERN_TORCH=str(found))
        assert done.returncode != 0 and f"AADKERN_BUILD_CUDA=1, but {reason}" in " ".join(done.stderr.split())
    done = configure(sources, "auto", CUDA_HOME=old, AADKERN_TORCH=str(found))
    assert done.returncode == 0 and "No CUDA kernels: nvcc 11.8.89 does not know" in " ".join(done.stderr.split())


def torch_of_version(folder: Path, major: int, minor: int) -> Path:
    header = folder / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define TORCH_VERSION_MAJOR {major}\n\n#define TORCH_VERSION_MINOR {minor}\n#define TORCH_VERSION_PATCH 1\n"
    )
    return folder / "torch"


def configure(sources: Path, cuda: str, CUDA_HOME: str, **definitions: str) -> subprocess.CompletedProcess[str]:
    definitions |= {"AADKERN_BUILD_CUDA": cuda}
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    return run(["cmake", "--fresh", "-S", sources, "-B", sources / "cmake", *flags], sources, CUDA_HOME=CUDA_HOME)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_that_do_not_compile_cost_only_themselves(sources):
    """11 s each."""
    with (sources / "csrc" / "attention" / "sm90" / "forward.cu").open("a") as file:
        file.write('#error "planted"\n')
    done = build(sources, AADKERN_BUILD_CUDA="1")
    assert done.returncode != 0 and "planted" in done.stdout + done.stderr
    assert "AADKERN_BUILD_CUDA=1, and the build failed" in done.stderr
    done = build(sources)
    assert done.returncode == 0 and "WARNING: aadkern._C was not built" in done.stderr
    assert [path.name for path in (sources / "built" / "aadkern").iterdir()] == ["_built.json"]
    shutil.copy(sources / "built" / "aadkern" / "_built.json", sources / "aadkern")
    info, description, reason, _, _ = told(sources)
    assert "the kernels did not compile" in info["no_cuda"] and info["no_cuda"] in reason and info["no_cuda"] in description
