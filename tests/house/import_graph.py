"""Who imports whom in the repository's packages, read from the files."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for package in ("aadkern", "aadkern_train", "benchmarks") for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """(a, a.b) of each `from a import b`, ("", a) of each `import a`, at any depth of a file's code."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (("", alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((source, f"{source}.{alias.name}") for alias in node.names)


@cache
def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports; `from a import b` counts as a and a.b."""
    return {name for names in imported(path) for name in names if name}


@cache
def arrows(path: Path) -> set[str]:
    """The files of the three packages that a file imports, for types too; `from a import b` means a/b.py where that is one."""
    modules = {module_name(file) for file in SOURCES}
    found = {name if name in modules else source for source, name in imported(path)}
    return found & modules - {module_name(path)}


def circle(graph: Mapping[str, Iterable[str]]) -> str | None:
    """A walk along arrows that comes back to where it began, or None."""
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> str | None:
        if name in trail:
            return " -> ".join((*trail[trail.index(name) :], name))
        if name in done:
            return None
        found = next(filter(None, (walk(other, (*trail, name)) for other in graph.get(name, ()))), None)
        done.add(name)
        return found

    return next(filter(None, (walk(name, ()) for name in graph)), None)


def room(name: str) -> str:
    """aadkern.wan.model -> "wan", aadkern.plans -> "plans", aadkern -> ""."""
    return name.split(".")[1] if "." in name else ""
