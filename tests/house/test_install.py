"""Installing a copy with this environment's tools: with a compiler, without one, and by AADKERN_BUILD_CUDA."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.house.installs import ROOT, build, nvcc_that_says, run, sources

__all__ = ["sources"]  # a fixture


# An editable install of the repository would lend its own modules to a package that is not whole.
FACTS = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
import aadkern, aadkern._build as build
print(json.dumps([aadkern.__file__, aadkern.__version__, build.build_info(), build.describe()]))
"""


def install(sources: Path, **variables: str) -> tuple[Path, str]:
    """Where pip put the package, and what the build said."""
    target = sources.parent / "site"
    options = ["-v", "--no-deps", "--no-build-isolation", "--no-index", "--target", target]
    done = run([sys.executable, "-m", "pip", "install", *options, sources], sources, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return target, done.stdout + done.stderr


def facts(target: Path) -> tuple[dict | None, str]:
    """build_info() and describe() as the installed package tells them."""
    told = run([sys.executable, "-c", FACTS], target, PYTHONPATH=str(target))
    assert told.returncode == 0, told.stderr
    file, version, info, description = json.loads(told.stdout)
    assert Path(file).is_relative_to(target)
    assert info is None or info["version"] == version
    return info, description


def nvidia_smi_that_says(folder: Path, text: str, status: int = 0) -> str:
    """A PATH that begins with a folder whose nvidia-smi answers so."""
    folder.mkdir()
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ntest \"$1\" = --query-gpu=compute_cap || exit 9\nprintf '{text}'\nexit {status}\n")
    tool.chmod(0o755)
    return os.pathsep.join((str(folder), os.environ["PATH"]))


def test_auto_compiles_no_cuda_for_gpus_that_could_not_run_it(sources, tmp_path):
    """The nvcc is one that would be tried, and would be told to have failed."""
    cuda_home = nvcc_that_says(tmp_path / "cuda", "Cuda compilation tools, release 99.1, V99.1.23")
    done = build(sources, CUDA_HOME=cuda_home, PATH=nvidia_smi_that_says(tmp_path / "ada", "8.9\\n12.0\\n8.9\\n"))
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "the GPUs here have compute capability 12.0, 8.9 (AADKERN_BUILD_CUDA=1" in said, said
    assert "compiles nothing here" not in said and "was not built" not in said
    shutil.copy(sources / "built" / "aadkern" / "_built.json", sources / "aadkern")
    info, description = facts(sources)
    assert "have compute capability 12.0, 8.9" in info["no_cuda"] and info["no_cuda"] in description


def load_setup(monkeypatch):
    """setup.py as a module, its setup() replaced by nothing."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("text", "status", "useless"),
    [
        ("9.0\\n", 0, False),
        ("8.9\\n9.0\\n", 0, False),
        ("8.9\\n", 0, True),
        ("10.0\\n", 0, True),
        ("[N/A]\\n", 0, False),
        ("", 0, False),
        ("Field compute_cap is not a valid field to query.", 2, False),
        ("8.9\\n", 9, False),
    ],
)
def test_who_is_asked_for_its_capability(text, status, useless, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", nvidia_smi_that_says(tmp_path / "smi", text, status))
    assert (load_setup(monkeypatch)["_useless_here"]() is not None) == useless


def test_no_nvidia_smi_is_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_setup(monkeypatch)["_useless_here"]() is None


def test_with_a_compiler(sources, tmp_path):
    """But an nvcc that compiles nothing. What a working one builds is tested in test_sm90_build.py."""
    cuda_home = nvcc_that_says(tmp_path / "cuda", "Cuda compilation tools, release 99.1, V99.1.23")
    target, said = install(sources, CUDA_HOME=cuda_home)
    assert "WARNING: aadkern._C was not built" in said
    info, description = facts(target)
    assert info is not None
    assert info["cuda_compiler"] == "nvcc 99.1.23"
    assert info["cuda_architectures"] == []
    assert info["no_cuda"].startswith("nvcc 99.1.23 compiles nothing here")
    assert info["compiler"] is None and f"WARNING: not built: {info['no_cuda']}" in description
    assert sorted(path.name for path in target.rglob("py.typed")) == ["py.typed", "py.typed"]
    page = target / "aadkern_train" / "serve" / "page"
    assert sorted(path.name for path in page.iterdir()) == ["index.html", "page.css", "page.js"]
    assert {path.name for path in target.iterdir() if path.is_dir()} - {"bin"} == {
        "aadkern",
        "aadkern_train",
        *(path.name for path in target.glob("*.dist-info")),
    }


def test_without_a_compiler_it_installs_and_says_so(sources):
    """Not even CMake."""
    target, said = install(sources, CXX="/nonexistent/c++", PATH="/nonexistent")
    assert "WARNING: aadkern._C was not built: cmake is not on PATH" in said
    info, description = facts(target)
    assert info["no_cuda"] == "cmake is not on PATH" and "CUDA kernels: WARNING: not built: cmake is not" in description


def test_a_checkout_that_is_not_installed_says_so(sources):
    info, description = facts(sources)
    assert info is None and description.startswith("WARNING: these are sources that were not installed")


def test_without_cuda_kernels_by_choice_nothing_is_said(sources, tmp_path):
    """And what an earlier build left is not taken for this one's."""
    left = sources / "built" / "aadkern" / "_C.abi3.so"
    left.parent.mkdir(parents=True)
    left.write_text("of an earlier build")
    (sources / "temp").mkdir()
    (sources / "temp" / "CMakeCache.txt").write_text(
        "CMAKE_GENERATOR:INTERNAL=Ninja\nCMAKE_MAKE_PROGRAM:FILEPATH=/gone/bin/ninja\n"
    )
    done = build(sources, AADKERN_BUILD_CUDA="0")
    assert done.returncode == 0 and "was not built" not in done.stderr
    assert [path.name for path in left.parent.iterdir()] == ["_built.json"]
    assert json.loads((left.parent / "_built.json").read_text())["no_cuda"] == "AADKERN_BUILD_CUDA=0 was set"


def test_cuda_without_nvcc_is_refused(sources, tmp_path):
    done = build(sources, AADKERN_BUILD_CUDA="1", CUDA_HOME=nvcc_that_says(tmp_path / "cuda", "not a compiler"))
    assert done.returncode != 0
    assert "there was no working nvcc" in " ".join(done.stderr.split())


def test_an_unknown_choice_is_refused_before_any_work(sources):
    done = build(sources, AADKERN_BUILD_CUDA="yes")
    assert done.returncode != 0
    assert "AADKERN_BUILD_CUDA='yes' is not one of auto, 1, 0" in done.stderr
    assert not (sources / "temp").exists()


ADDRESS = "https://github.com/somebody/aadkern"


def test_the_page_on_an_index_has_links_that_lead_somewhere(monkeypatch):
    """Each relative link of the README leads to a file that exists, at the version's tag."""
    page = load_setup(monkeypatch)["_readme"](ADDRESS, "1.2.3")
    targets = re.findall(r"(!?)\[[^\[\]]*\]\(([^)\s]+)\)", page)
    here = [target for _, target in targets if target.startswith("#")]
    places = [(mark, target) for mark, target in targets if target not in here]
    assert len(places) > 20 and {target.startswith(ADDRESS) for _, target in places} == {True}
    for mark, target in places:
        path = target.removeprefix(f"{ADDRESS}/{'raw' if mark else 'blob'}/v1.2.3/").partition("#")[0]
        assert (ROOT / path).is_file(), target
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in re.findall(r"^#+ .*", page, re.M)
    }
    assert {target[1:] for target in here} <= headings


def test_without_an_address_the_page_has_words_in_place_of_links(monkeypatch):
    page = load_setup(monkeypatch)["_readme"]("", "1.2.3")
    assert re.findall(r"\]\((?!#|https:)", page) == [] and "docs/start.md explains plans" in page


def test_an_installed_aad_does_not_offer_the_benchmarks(tmp_path, capsys, monkeypatch):
    from aadkern_train import cli

    assert "aad bench --help" in cli.parser().format_help()
    monkeypatch.setattr(cli, "benchmarks_root", lambda: tmp_path)
    assert re.search(r"\bbench\b", cli.parser().format_help()) is None
    assert (
        cli.main(["bench"]) == 2 and "the benchmarks are in the repository, not in the installed package" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_sources_package_holds_what_its_tests_need(tmp_path):
    """Built, unpacked, and tested there: all tests are found, and those of plans, of the house and of the drawings pass."""
    copy = tmp_path / "checkout"
    names = run(["git", "ls-files"], ROOT)
    if names.returncode:
        pytest.skip("no git checkout")
    for name in names.stdout.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = run([sys.executable, "-c", build, tmp_path / "out"], copy)
    assert done.returncode == 0, done.stderr
    (package,) = (tmp_path / "out").glob("aadkern-*.tar.gz")
    shutil.unpack_archive(package, tmp_path / "unpacked", filter="data")
    (sources,) = (tmp_path / "unpacked").iterdir()
    left_out = [name for name in names.stdout.splitlines() if not (sources / name).exists()]
    assert [name for name in left_out if not name.startswith(".git")] == []
    here = {"PYTHONPATH": str(sources)}
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = run([*pytest_, "--collect-only", "tests"], sources, **here)
    assert found.returncode == 0, found.stdout[-2000:]
    some = ["tests/attention/test_plans.py", "tests/house/test_pictures.py", "tests/house/test_contracts.py"]
    done = run([*pytest_, *some], sources, **here)
    assert done.returncode == 0, done.stdout[-3000:]
