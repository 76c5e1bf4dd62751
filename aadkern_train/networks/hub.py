"""A Hub id where a folder is expected: ``OWNER/NAME``, ``OWNER/NAME@REVISION``, ``OWNER/NAME/transformer``.

huggingface_hub's cache is asked first, and what is whole there is taken as it is, without a connection. What lacks is fetched, only
the files that are needed.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from aadkern_train.networks.folders import STEM, weight_files

ENCODERS = ("vae", "text_encoder", "tokenizer")
ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<inner>\w[\w/-]*))?", re.ASCII)
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".mp4", ".yaml", ".json")


def hub_folder(path: Path | str, setting: str, parts: Sequence[str] = ("transformer",), fetch: bool = True) -> Path:
    """``path`` where something lies there, where its first folder does, and where it is no Hub id; else the folder in
    huggingface_hub's cache that holds these ``parts`` of a pipeline, or the folder within the repository that ``path`` names.

    Raises FileNotFoundError, naming ``setting``, for what is neither here nor in the cache and cannot be fetched, or without
    ``fetch`` is not.
    """
    path = Path(path)
    match = ID.fullmatch(path.as_posix())
    if path.exists() or match is None or Path(path.parts[0]).exists() or path.suffix.lower() in FILES:
        return path
    inner = match["inner"] or ""
    parts = (inner,) if inner else parts
    patterns = ["*.json", f"{STEM}*.safetensors", *(f"{part}/*.safetensors" for part in parts)]
    try:
        folder = _cached(match["repo"], match["revision"], patterns, parts, fetch)
    except Exception as error:  # of huggingface_hub, of the HTTP client that it has, or of the disk
        from huggingface_hub import constants

        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = "HF_HUB_OFFLINE is set" if fetch and constants.HF_HUB_OFFLINE else lines[0].rstrip(".:")[:160]
        revision = f" --revision {match['revision']}" if match["revision"] else ""
        include = "".join(f" --include {shlex.quote(pattern)}" for pattern in patterns)
        here = f"{setting} must be a folder or a Hub id: nothing lies at {path}"
        raise FileNotFoundError(
            f"{here}, and {match['repo']} is not whole in {constants.HF_HUB_CACHE} and could not be fetched ({why}): "
            f"hf download {match['repo']}{revision}{include}"
        ) from None
    return folder / inner


def hub_checkpoint(checkpoint: Path, parts: Path | None) -> Path:
    """``hub_folder`` of a model that streams; without ``parts`` the other parts come from it too."""
    return hub_folder(checkpoint, "checkpoint", ("transformer", *(() if parts is not None else ENCODERS)))


def repository(folder: Path) -> str | None:
    """The id whose snapshot in huggingface_hub's cache a folder is, or lies in; None for other folders."""
    for inner in (folder, *folder.parents):
        if inner.parent.name == "snapshots" and inner.parent.parent.name.startswith("models--"):
            return inner.parent.parent.name.removeprefix("models--").replace("--", "/")
    return None


def _cached(repo: str, revision: str | None, patterns: Sequence[str], parts: Sequence[str], fetch: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    def snapshot(local: bool) -> Path:
        kept = {"allow_patterns": list(patterns), "ignore_patterns": ["*.fp16*"]}
        return Path(snapshot_download(repo, revision=revision, local_files_only=local, **kept))

    try:
        here = snapshot(local=True)
        if _lacking(here, parts) is None:
            return here
    except errors.LocalEntryNotFoundError:
        pass
    if not fetch:
        raise FileNotFoundError("nothing is fetched here")
    here = snapshot(local=False)
    lacking = _lacking(here, parts)  # without a connection, what there is of it is given
    if lacking is not None:
        raise FileNotFoundError(f"it lacks {lacking}")
    return here


def _lacking(folder: Path, parts: Sequence[str]) -> str | None:
    """Which of these parts a snapshot does not hold with all their weights; a transformer alone is all that there is of it."""
    for part in [folder] if (folder / "config.json").is_file() else [folder / part for part in parts]:
        try:
            (part / ("tokenizer.json" if part.name == "tokenizer" else "config.json")).stat()
            if part.name != "tokenizer":
                weight_files(part, STEM, "model")
        except (OSError, ValueError):
            return f"a whole {part.name}" if part != folder else "whole weights"
    return None
