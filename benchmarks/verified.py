"""What results files of a GPU prove, entered: ``python -m benchmarks.verified --name h200 FILE... [--write]``.

Several files of benchmarks.gpu_check on one GPU and one commit count together. For each backend of attention and each other room it
says what is proven or what is missing; with ``--write`` the files become benchmarks/results/NAME.json, what they prove is entered
into ``aadkern.runtime.VERIFIED``, and the README's measured rows are made anew. Commit the three together.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aadkern import runtime
from benchmarks import results, table

ROOT = results.ROOT
FOLDER = "benchmarks/results"
WITHOUT_A_GPU = {"cpu", "the CPU interpreter"}
ENTRY = re.compile(r"(?P<gpu>.+): (?P<file>benchmarks/results/[\w.-]+\.json)")
# The files whose tests on a GPU prove a backend or room, and nothing else does.
PROOF = {
    "sm90": ("tests/sm90/test_sm90_gpu.py", "tests/sm90/test_primitive_checks.py"),
    "triton": ("tests/attention/test_triton_attention_gpu.py", "tests/attention/test_bad_input.py"),
    "flash": ("tests/attention/test_flash_gpu.py",),
    "pooling": ("tests/pooling/test_pooling_gpu.py",),
    "noise": ("tests/noise/test_noise_gpu.py",),
    "blocks": ("tests/blocks/test_blocks_gpu.py",),
    "fp8": ("tests/fp8/test_fp8_gpu.py",),
}
BAD_OUTCOMES = ("failed", "error", "lost")
EXCUSED = "needs two CUDA devices"  # the one reason for which a test may be skipped
BEGIN, END = "<!-- measured on GPUs: written by benchmarks.verified -->", "<!-- end of what was measured -->"
NOTHING = "Nothing was measured on a GPU yet."


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Several calls as one document. Raises ValueError where they are not of one GPU, commit and sources."""
    first = documents[0]["environment"]
    for document in documents[1:]:
        at = document["environment"]
        for what, ours, theirs in (
            ("GPU", first["device"]["name"], at["device"]["name"]),
            ("commit", first["commit"], at["commit"]),
            ("sources", first["sources"], at["sources"]),
            ("torch", first["torch"], at["torch"]),
        ):
            if ours != theirs:
                raise ValueError(f"results files must be of one {what}, got {ours!r} and {theirs!r}")
    whole = results.empty(first, {**documents[-1]["conditions"], "calls": len(documents)})
    for document in documents:
        for part in ("stages", "tests", "cases", "not_reached"):
            whole[part] += document[part]
        whole["rooms"] |= document["rooms"]
    return whole


def concerns(test: str, what: str) -> bool:
    """Whether a test, by its id, speaks of a backend or room: it names it, or stands in one of its files and names no backend."""
    named = {backend for backend in runtime.BACKENDS if re.search(rf"[\[-]{backend}-cuda", test)}
    return what in named or (test.partition("::")[0] in PROOF[what] and not named)


def shortcomings(document: dict[str, Any], what: str, gpu: str) -> list[str]:
    """Why a results file does not prove that a backend or room is right on a GPU; empty if it does."""
    at, reasons = document["environment"], []
    if at["device"]["type"] != "cuda" or at["device"]["name"] != gpu:
        reasons.append(f"it is of {at['device']['name']!r} ({at['device']['type']})")
    if not at["commit"] or at["changed_files"]:
        reasons.append(f"its commit is {at['commit']!r} with {at['changed_files']} files changed")
    for file in PROOF[what]:
        if not any(test["id"].startswith(f"{file}::") and test["outcome"] == "passed" for test in document["tests"]):
            reasons.append(f"no test of {file} passed")
    about = [test for test in document["tests"] if concerns(test["id"], what)]
    reasons += [f"{test['id']} {test['outcome']}" for test in about if test["outcome"] in BAD_OUTCOMES]
    if what not in runtime.BACKENDS:
        return reasons
    if at["backends"].get(what) != runtime.AVAILABLE:
        reasons.append(f"{what} was {at['backends'].get(what)!r}")
    name = f"aadkern {what}"
    contenders = [(case["id"], case["contenders"][name]) for case in document["cases"] if name in case["contenders"]]
    reasons += [
        f"{name} was {c['status']} in {case}: {c['reason']}" for case, c in contenders if c["status"] not in ("timed", "checked")
    ]
    if not contenders:
        reasons.append(f"no case compared {name} with fp64")
    return reasons


def gpu_tests(file: str) -> list[str]:
    """The test functions of a file that are marked gpu, or all where the whole file is."""
    tree = ast.parse((ROOT / file).read_text())
    whole = any(isinstance(node, ast.Assign) and "mark.gpu" in ast.unparse(node) for node in tree.body)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [f.name for f in functions if whole or any(ast.unparse(mark) == "pytest.mark.gpu" for mark in f.decorator_list)]


def not_run(document: dict[str, Any], what: str) -> list[str]:
    """Tests of PROOF's files that the document lacks or skipped: a call that was cut off proves nothing. Asked of a new entry only,
    since a test that is written later must not take an old one back."""
    missing = []
    for file in PROOF[what]:
        for function in gpu_tests(file):
            whole = f"{file}::{function}"
            ran = [test for test in document["tests"] if test["id"].partition("[")[0] == whole and concerns(test["id"], what)]
            skipped = [test for test in ran if test["outcome"] == "skipped" and EXCUSED not in test["message"]]
            if not ran or skipped:
                missing.append(f"{whole} was not run" if not ran else f"{skipped[0]['id']} was skipped: {skipped[0]['message']}")
    return missing


def entries() -> list[tuple[str, str, str]]:
    """(backend or room, GPU, results file) of every entry of ``VERIFIED`` that is of a GPU. Raises ValueError for another form."""
    gpu_entries = []
    for what, claims in runtime.VERIFIED.items():
        for entry in claims:
            match = ENTRY.fullmatch(entry)
            if match is None and entry not in WITHOUT_A_GPU:
                raise ValueError(f"VERIFIED[{what!r}]: {entry!r} is not '<GPU>: {FOLDER}/<file>.json'")
            if match is not None:
                gpu_entries.append((what, match["gpu"], match["file"]))
    return gpu_entries


def readme_rows(documents: list[dict[str, Any]]) -> Iterator[str]:
    """The README's table of what was measured: ours in every case and direction beside the fastest rival; streams; of each GPU."""
    if not documents:
        yield NOTHING
        return
    yield "| GPU | what | ours | | fastest rival |"
    yield "|---|---|---|---:|---:|"
    for document in documents:
        gpu = document["environment"]["device"]["name"]
        for case in {case["id"]: case for case in document["cases"]}.values():
            for direction in table.DIRECTIONS:
                best, rivals = table.best_of_ours(case, direction), table.timed(case, direction, ours=False)
                if best is None:
                    continue
                rival = min(rivals, key=lambda pair: pair[1]["median_ms"], default=None)
                beside = "-" if rival is None else f"{rival[0]}: {table.times(rival[1], best[1]):.2f} x our time"
                yield f"| {gpu} | {case['id']} {direction} | {best[0]} | {best[1]['tflops']:.0f} TFLOP/s | {beside} |"
        for size, figures in document["rooms"].get("streaming", {}).get("sizes", {}).items():
            rates = {item.removeprefix("rate: "): record["fps"] for item, record in figures["items"].items() if "fps" in record}
            for item, fps in sorted(rates.items(), key=lambda pair: -pair[1])[:1]:
                yield f"| {gpu} | streaming {size}, without VAE | {item} | {fps:.1f} FPS | - |"


def with_rows(readme: str, rows: list[str]) -> str:
    """The README with these rows between its two marks."""
    start, end = readme.index(BEGIN) + len(BEGIN), readme.index(END)
    return f"{readme[:start]}\n\n" + "\n".join(rows) + f"\n\n{readme[end:]}"


def with_entries(source: str, entered: dict[str, str]) -> str:
    """runtime.py with an entry more for each backend or room."""
    for what, entry in entered.items():
        line = re.search(rf'^    "{what}": \((.*?)\),$', source, re.MULTILINE | re.DOTALL)
        if line is None:
            raise ValueError(f"runtime.VERIFIED has no line of its own for {what!r}")
        if entry in line[1]:
            continue
        existing = "".join(f"{text.strip()}, " for text in line[1].split(",") if text.strip())
        source = source.replace(line[0], f'    "{what}": ({existing}"{entry}"{"" if existing else ","}),')
    return source


def main(argv: list[str] | None = None) -> int:
    """0 if the files prove something, 1 if nothing."""
    parser = argparse.ArgumentParser(prog="benchmarks.verified", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="results.json of one or more calls of benchmarks.gpu_check")
    parser.add_argument("--name", required=True, help=f"of the file that they become in {FOLDER}, without .json")
    parser.add_argument("--write", action="store_true", help="write that file, the entries of VERIFIED and the README's rows")
    options = parser.parse_args(argv)
    try:
        if not re.fullmatch(r"[\w.-]+", options.name):
            raise ValueError(f"--name must be of letters, digits, '.', '_' and '-', got {options.name!r}")
        document = merged([results.read(file) for file in options.files])
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    gpu, entered = document["environment"]["device"]["name"], {}
    for what in PROOF:
        lacking = shortcomings(document, what, gpu) + not_run(document, what)
        print(f"{what}: " + (f"proven on {gpu}" if not lacking else "not proven: " + "; ".join(lacking[:3])))
        if not lacking:
            entered[what] = f"{gpu}: {FOLDER}/{options.name}.json"
    file = ROOT / FOLDER / f"{options.name}.json"
    named = {path for _, _, path in entries()} - {f"{FOLDER}/{options.name}.json"}
    rows = list(readme_rows([*(results.read(ROOT / path) for path in sorted(named)), *([document] if entered else [])]))
    print("\n" + "\n".join(rows))
    if options.write and entered:
        if file.exists() and results.read(file) != document:
            parser.error(f"--name must be new, got {options.name!r}: {file} holds another result")
        results.write(document, file)
        source, readme = ROOT / "aadkern" / "runtime.py", ROOT / "README.md"
        source.write_text(with_entries(source.read_text(), entered))
        readme.write_text(with_rows(readme.read_text(), rows))
        print(f"\nwritten: {file.relative_to(ROOT)}, aadkern/runtime.py, README.md")
    return 0 if entered else 1


if __name__ == "__main__":
    sys.exit(main())
