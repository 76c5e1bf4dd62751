"""Checkpoints that are whole or absent.

    write <stage>/step-N.tmp (shards, state.json), fsync -> rename to <stage>/step-N -> replace `latest` -> prune

Only `latest` is believed, and it moves last, so a kill at any moment leaves the previous checkpoint. Whoever writes another
whole one's name into it goes back to that one; without it the stage begins anew. In the background the same is done to a copy of
the state, by a thread, while training goes on. A directory is
never written twice: torch.distributed.checkpoint (DCP) would load a mix of two saves without an error. Tensors go
through DCP, which reshards, so a checkpoint of two processes resumes on one; plain values go to state.json, floats
exactly. DCP's metadata is a pickle, and loading a pickle can run code, so only folders of this user are loaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from aadkern_train.engine.background import NOISE, Background
from aadkern_train.engine.config import Config, config_hash, differences
from aadkern_train.engine.files import naming, read_json, replace_file, sync
from aadkern_train.engine.processes import Processes

STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class CheckpointError(ValueError):
    """A checkpoint that cannot or must not be loaded; the message says why and what to do."""


class Stateful(Protocol):
    """What can be saved besides modules: nested dicts of tensors and plain values (numbers, strings, lists, None)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


State = Mapping[str, nn.Module | Stateful]


@dataclass(frozen=True)
class Saved:
    """A whole checkpoint on disk: where, and the settings it was made with (None where none were given)."""

    stage: str
    step: int
    path: Path
    config: dict[str, Any] | None


class Checkpoints:
    """The checkpoints of one run folder: RUN/checkpoints/<stage>/step-N and RUN/checkpoints/latest."""

    def __init__(self, folder: Path, processes: Processes, keep: int = 2, background: bool = False) -> None:
        """folder: RUN/checkpoints, made if absent, unfinished saves in it removed.

        keep >= 1: how many of the current stage stay; of earlier stages the last one stays. background: `save` returns when the
        state is copied; `wait` for the rest of it before what it saved is believed, and `settle` however a run ends.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.processes, self.keep = Path(folder), processes, keep
        self.background = Background(processes) if background else None
        processes.on_main(self._clean)

    def wait(self) -> None:
        """Until the save in the background, if there is one, is whole. Raises on every rank what went wrong with it on one."""
        if self.background is not None:
            self.background.wait()

    def settle(self) -> None:
        """`wait` for a run that ends with an error: asks no other rank, and raises nothing."""
        if self.background is not None:
            self.background.settle()

    def save(self, stage: str, step: int, state: State, config: Config | None = None) -> Path:
        """Saves every part of state under (stage, step), makes it the latest, and removes what `keep` does not keep.

        Every rank calls it with its own shards. Raises ValueError when latest already is this (stage, step); in the background,
        what went wrong with the save before, of which one at most is under way.
        """
        self.wait()
        if not STAGE_NAME.fullmatch(stage):
            raise ValueError(f"stage must be a plain name (letters, digits, '_', '-', '.'), got {stage!r}")
        tensors, values = _split(state)
        target = self.folder / stage / f"step-{step}"
        waiting = target.with_name(target.name + ".tmp")
        self.processes.on_main(lambda: self._make_room(target, waiting))
        header = {"stage": stage, "step": step, "config": None if config is None else config.model_dump(mode="json")}

        def commit() -> None:
            replace_file(waiting / "state.json", json.dumps({**header, "values": values}, indent=1))
            os.rename(waiting, target)
            sync(target.parent)
            replace_file(self.folder / "latest", f"{stage}/{target.name}\n")
            self._prune(target)

        def write(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
            with naming(waiting):
                _dcp_save(tensors, waiting, self.processes, group)

        if self.background is None:
            write(tensors, None)
            self.processes.on_main(commit)
        else:
            self.background.begin(tensors, write, commit)
        return target

    def latest(self) -> Saved | None:
        """The newest whole checkpoint, None if there is none; CheckpointError if `latest` does not name one here."""
        return self.processes.on_main(self._latest)

    def load(
        self,
        state: State,
        config: Config | None = None,
        *,
        ignore: tuple[str, ...] = (),
        allow_changes: bool = False,
        trust: bool = False,
    ) -> Saved:
        """Loads the latest checkpoint into the parts of state, in place, and says which it was.

        Raises CheckpointError, before anything is changed, when there is none; when its settings differ from config
        (except the dotted keys in ignore, and what lies under them; allow_changes=True takes any); when its tensors or
        values have other names or shapes than state; when its files belong to another user (trust=True loads them).
        """
        saved = self.latest()
        if saved is None:
            raise CheckpointError(f"no checkpoint in {self.folder}")
        if not trust:
            _check_owner(saved.path)
        broken = _broken(saved.path)
        if broken is not None:
            raise CheckpointError(f"{broken}; {self._instead()}")
        if config is not None and not allow_changes:
            _check_config(saved, config, ignore)
        tensors, own_values = _split(state)
        values = read_json(saved.path / "state.json")["values"]
        _check_tensors(saved.path, tensors)
        if set(values) != set(own_values):
            raise CheckpointError(f"{saved.path}: values differ from this run's: {_some(set(values) ^ set(own_values))}")
        try:
            _dcp_load(tensors, saved.path, self.processes)
        except Exception as error:  # bytes altered within a file: the pickles in it raise anything
            raise CheckpointError(f"{saved.path} cannot be loaded: {error}; {self._instead()}") from error
        for name, part in state.items():
            _restore(name, part, tensors, values)
        return saved

    def _latest(self) -> Saved | None:
        pointer = self.folder / "latest"
        if not pointer.exists():
            return None
        line = pointer.read_text(errors="replace").strip()
        stage, _, name = line.partition("/")
        if not STAGE_NAME.fullmatch(stage) or not re.fullmatch(r"step-\d+", name):
            expected = "expected <stage>/step-<number>, a folder beside it"
            raise CheckpointError(f"{pointer} says {line[:100]!r}; {expected}; {self._instead()}")
        path = self.folder / stage / name
        if not path.resolve().is_relative_to(self.folder.resolve()):
            raise CheckpointError(f"{pointer} leads outside of the run folder, to {path.resolve()}; refused")
        if not (path / "state.json").is_file():
            raise CheckpointError(f"{pointer} names {path}, which is not a checkpoint (no state.json); {self._instead()}")
        try:
            header = _header(path)
        except ValueError as error:
            raise CheckpointError(f"{error}; {self._instead()}") from error
        return Saved(header["stage"], header["step"], path, header["config"])

    def _instead(self) -> str:
        """What to do where the checkpoint that `latest` names, or `latest` itself, is broken."""
        pointer = self.folder / "latest"
        whole = [path for path in self.folder.glob("*/step-*") if _step_of(path) >= 0 and _owned(path) and _broken(path) is None]
        anew = f"without {pointer} the stage begins anew"
        if not whole:
            return f"no other whole checkpoint is there; {anew}"
        newest = max(whole, key=lambda path: ((path / "state.json").stat().st_mtime_ns, _step_of(path)))
        return f"`echo {newest.relative_to(self.folder)} > {pointer}` goes back to the newest whole one; {anew}"

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in self.folder.glob("*/step-*.tmp"):
            shutil.rmtree(unfinished)

    def _make_room(self, target: Path, waiting: Path) -> None:
        latest = self._latest()
        if target.exists():
            if latest is not None and latest.path == target:
                raise ValueError(f"{target} is saved already; a step is saved once")
            self._remove(target)  # whole, but a kill came before `latest` moved
        if waiting.exists():
            shutil.rmtree(waiting)
        waiting.mkdir(parents=True)
        sync(self.folder)

    def _prune(self, newest: Path) -> None:
        """Keeps the newest `keep` of the current stage and the last of every other stage."""
        for stage in self.folder.iterdir():
            steps = sorted((step for step in stage.glob("step-*") if _step_of(step) >= 0), key=_step_of, reverse=True)
            if stage == newest.parent:
                steps = [step for step in steps if _step_of(step) <= _step_of(newest)]
            for old in steps[self.keep if stage == newest.parent else 1 :]:
                self._remove(old)

    @staticmethod
    def _remove(path: Path) -> None:
        doomed = path.with_name(path.name + ".old.tmp")
        os.rename(path, doomed)  # so that a kill while removing leaves nothing that looks whole
        shutil.rmtree(doomed)


def _step_of(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _state_of(part: nn.Module | Stateful) -> dict[str, Any]:
    return get_model_state_dict(part) if isinstance(part, nn.Module) else part.state_dict()


def _split(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The leaves of all parts by path ("generator/blocks.0.weight"): tensors, and plain values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, part in state.items():
        for path, leaf in _leaves(name, _state_of(part)):
            if isinstance(leaf, Tensor):
                tensors[path] = leaf.detach()
            else:
                values[path] = _plain(path, leaf)
    return tensors, values


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, part in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{path}: keys of a state must be strings, got {key!r}; torch optimisers need optim.Optimiser")
        yield from _leaves(f"{path}/{key}", part)


def _plain(path: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(path, part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{path}: a state holds tensors, numbers, strings, None and lists of them, got {type(value).__name__}")


def _restore(name: str, part: nn.Module | Stateful, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    def filled(path: str, own: Any) -> Any:
        if isinstance(own, dict):
            return {key: filled(f"{path}/{key}", value) for key, value in own.items()}
        return tensors[path] if path in tensors else values[path]

    loaded = filled(name, _state_of(part))
    if isinstance(part, nn.Module):
        set_model_state_dict(part, loaded)
    else:
        part.load_state_dict(loaded)


def _dcp_save(tensors: dict[str, Tensor], path: Path, processes: Processes, group: dist.ProcessGroup | None) -> None:
    writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True)
    _unwrapped(lambda: dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=processes.size == 1))


def _dcp_load(tensors: dict[str, Tensor], path: Path, processes: Processes) -> None:
    _unwrapped(lambda: dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=processes.size == 1))


def _unwrapped(action: Callable[[], object]) -> None:
    """DCP's errors as what they were: it makes a BaseException of them all, of Ctrl-C too. torch's file writer says a RuntimeError
    of a full disk, behind which the true one stands."""
    try:
        _quietly(action)
    except CheckpointException as error:
        cause = behind = next(iter(error.failures.values()))[0]
        while behind is not None and not isinstance(behind, OSError):
            behind = behind.__cause__ or behind.__context__
        if behind is None and isinstance(cause, RuntimeError):
            behind = OSError(None, str(cause).partition("\n")[0])
        raise (behind or cause) from None


def _quietly(action: Callable[[], object]) -> None:
    if threading.current_thread() is not threading.main_thread():  # filters are of the whole process: Background has set its own
        action()
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=NOISE)
        action()


def _header(path: Path) -> dict[str, Any]:
    header = read_json(path / "state.json")
    missing = {"stage", "step", "config", "values"} - header.keys()
    if missing:
        raise ValueError(f"{path / 'state.json'} must hold {', '.join(sorted(missing))}, and does not")
    return header


def _broken(path: Path) -> str | None:
    """Why a checkpoint cannot be loaded; None: it is whole, as far as its parts' names and lengths tell."""
    try:
        _header(path)
        metadata = dcp.FileSystemReader(path).read_metadata()
        ends: dict[str, int] = {}
        for part in (metadata.storage_data or {}).values():
            ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    except (OSError, ValueError) as error:
        return str(error)
    except Exception as error:  # a pickle that was cut off or altered raises anything
        return f"{path / '.metadata'} cannot be read: {type(error).__name__}: {error}"
    for name, end in ends.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size < end:
            return f"{file} is cut off: {file.stat().st_size} of {end} bytes are there"
    return None


def _owned(path: Path) -> bool:
    try:
        _check_owner(path)
    except CheckpointError:
        return False
    return True


def _check_owner(path: Path) -> None:
    user = os.getuid() if hasattr(os, "getuid") else None
    for file in (path, *path.iterdir()):
        if user is not None and file.stat().st_uid != user:
            raise CheckpointError(
                f"{file} belongs to user {file.stat().st_uid}, not to you ({user}); loading a checkpoint can run code, "
                "so it is refused. If you trust it, copy the folder, or load with trust=True"
            )


def _check_config(saved: Saved, config: Config, ignore: tuple[str, ...]) -> None:
    now = config.model_dump(mode="json")
    if saved.config is None or config_hash(saved.config) == config_hash(now):
        return
    ignored = tuple(f"{key}." for key in ignore)
    changed = {key: pair for key, pair in differences(saved.config, now).items() if not f"{key}.".startswith(ignored)}
    if changed:
        listed = ", ".join(f"{key} ({old!r} then, {new!r} now)" for key, (old, new) in changed.items())
        raise CheckpointError(f"{saved.path} was made with other settings: {listed}; allow_changes=True loads it anyway")


def _check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    if set(stored) != set(tensors):
        raise CheckpointError(f"{path}: tensors differ from this run's: {_some(set(stored) ^ set(tensors))}")
    for name, tensor in tensors.items():
        if tuple(stored[name].size) != tuple(tensor.shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(stored[name].size)}, expected {tuple(tensor.shape)}")


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
