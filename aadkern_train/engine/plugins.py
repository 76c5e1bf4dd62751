"""Python files of one's own that register stages or worlds: a recipe names them under ``plugins``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path


def load_plugins(files: Iterable[str | Path]) -> tuple[str, ...]:
    """Runs each file once in this process; returns their absolute paths.

    Raises ValueError, naming the file, for one that is not there or ends in an error.
    """
    return tuple(_load(Path(file)) for file in files)


def _load(file: Path) -> str:
    path = str(file.expanduser().resolve())
    if not Path(path).is_file() or file.suffix != ".py":
        raise ValueError(f"plugins must be Python files, found none at {path}")
    name = "aadkern_plugin_" + hashlib.blake2b(path.encode(), digest_size=6).hexdigest()
    if name in sys.modules:
        return path
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[name] = module  # before it runs: pydantic looks annotations up there
    try:
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"plugins: {path} ended in {type(error).__name__}: {error}") from error
    return path
