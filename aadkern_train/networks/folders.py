"""A network's folder in diffusers' format, read and written: one of a hub's, or a stage's finished weights.

    config.json  diffusion_pytorch_model.safetensors (or shards of 5 GB and their index)  run.json  adapter.safetensors

``run.json`` is ours: what the network predicts, and for a stage's weights the run's settings, so that such a folder alone streams.
``adapter.safetensors`` lies beside the weights of a network that learned as adapters, which the weights hold already.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from aadkern.wan import CausalWan
from aadkern_train.engine.files import naming, read_json, replace_file, save_tensors, sync
from aadkern_train.engine.processes import Processes, local, local_rows, whole
from aadkern_train.networks.denoiser import Denoiser

STEM = "diffusion_pytorch_model"  # diffusers' name
ADAPTER = "adapter.safetensors"
SHARD_BYTES = 5_000_000_000
ANEW = "a stage's weights are made anew where their folder is removed and the run resumed"
TRANSFORMERS = ("WanTransformer3DModel", "CausalWan")
# What diffusers raises for a configuration that does not fit.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Weights:
    """A part's tensors by name, as the headers of its files tell: which file holds each, and its shape. Both are empty where the
    files are pickles, which tell nothing."""

    files: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """A network as its folder tells, before any weight is read."""

    config: dict[str, Any]
    weights: Weights
    predicts: str


def inspect(path: Path) -> Stored:
    """Looks at a network's folder: configuration, names and shapes of the weights, all without reading these.

    Raises ValueError where the folder is none, cannot be read, lacks weights, or holds them twice.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} must be a network's folder in diffusers' format, it has no config.json; {ANEW}")
    try:
        config = read_json(path / "config.json")
        check_transformer(config, path)
        weights = find_weights(path, STEM)
        check_shapes(config, weights.shapes, path)
    except UNREADABLE as error:
        raise ValueError(f"{path} must be a network's folder in diffusers' format, it cannot be read: {error}; {ANEW}") from None
    if not weights.files:
        raise ValueError(f"{path} must hold its weights as safetensors, it holds pickles")
    used = {file.name for file in weights.files.values()}
    beside = sorted({file.name for file in path.glob("*.safetensors")} - used - {ADAPTER})
    if beside:
        raise ValueError(f"{path} must hold its weights once, {beside[0]} lies beside {min(used)}: leave one of them")
    return Stored(config, weights, facts(path).get("predicts", "flow"))


def empty(stored: Stored) -> Denoiser:
    """A folder's network on the meta device, without weights."""
    with torch.device("meta"):
        net = CausalWan.from_config(dict(stored.config))
    return Denoiser(net.train(), stored.predicts)


@torch.no_grad()
def fill(net: nn.Module, stored: Stored) -> None:
    """Reads a folder's weights into its network. Of a sharded one this rank reads its own rows alone, in the parameters' dtype.

    A loop: torch's own reader for such folders (2.13, HuggingFaceStorageReader) is no faster, holds more meanwhile, and takes every
    file in the folder, an fp16 variant beside the weights too.
    """
    parameters = dict(net.named_parameters())
    for file in sorted(set(stored.weights.files.values())):
        with safetensors.safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 (no mapping)
                if name in parameters:
                    here, rows = local(parameters[name]), local_rows(parameters[name])
                    here.copy_(held.get_slice(name)[rows] if here.dim() else held.get_tensor(name))


def load(path: Path) -> Denoiser:
    """A folder's network on the CPU, whole. Raises ValueError as ``inspect`` does."""
    stored = inspect(path)
    denoiser = empty(stored)
    denoiser.net.to_empty(device="cpu")
    fill(denoiser.net, stored)
    return denoiser


def check_transformer(config: Mapping[str, Any], path: Path) -> None:
    """That a configuration is one that ``CausalWan`` takes: Wan's, without image embeddings, whose patches are pictures'."""
    if config.get("_class_name") not in TRANSFORMERS:
        raise ValueError(f"transformer must be one of {', '.join(TRANSFORMERS)}, {path} holds {config.get('_class_name')!r}")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ValueError(
            f"transformer must be text-to-video weights, {path} has image embeddings (image_dim {config.get('image_dim')}): "
            "streaming takes the image as a clean first latent frame instead"
        )
    for name in ("in_channels", "out_channels", "text_dim", "patch_size"):
        stated(config, name, path)
    patch = config["patch_size"]
    if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1 or not all(isinstance(side, int) for side in patch):
        raise ValueError(f"transformer must have a patch_size of [1, rows, columns], {path} has {patch}")


def check_shapes(config: Mapping[str, Any], shapes: Shapes, path: Path) -> None:
    """That the transformer's weights are those that its configuration speaks of."""
    if not shapes:
        return
    with torch.device("meta"):
        wanted = CausalWan.from_config(dict(config)).state_dict()
    for name, tensor in wanted.items():
        if shapes.get(name) != tuple(tensor.shape):
            stored = f"[{', '.join(map(str, shapes[name]))}]" if name in shapes else "nothing"
            raise ValueError(f"transformer must hold {name} {list(tensor.shape)} by its configuration, found {stored} in {path}")


def stated(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    """What a folder's configuration says of a name. Raises ValueError where it says nothing."""
    if name not in config:
        raise ValueError(f"{folder / 'config.json'} must state {name}, and does not")
    return config[name]


def weight_files(folder: Path, *stems: str) -> list[Path]:
    """The files of a part's weights. Raises FileNotFoundError or ValueError where one is missing or is Git LFS's note of it."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin")]
    shards = [folder / name for name in names if (folder / name).is_file()][:1]
    for index in (folder / f"{name}.index.json" for name in names):
        if not shards and index.is_file():
            shards = [folder / name for name in sorted(set(stated(read_json(index), "weight_map", folder).values()))]
    if not shards:
        raise FileNotFoundError(f"{folder.name} must hold weights ({names[0]} or its shards), found none in {folder}")
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{folder.name} must hold every shard of its weights, {shard} is missing")
        with shard.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise ValueError(f"{folder.name} must hold weights, {shard} is a Git LFS pointer: fetch it with `git lfs pull`")
    return shards


def find_weights(folder: Path, *stems: str) -> Weights:
    """A part's weights, every shard of them there, none of them twice, and more than Git LFS's notes of them."""
    weights = Weights({}, {})
    for shard in weight_files(folder, *stems):
        if shard.suffix == ".safetensors":
            try:
                with safetensors.safe_open(shard, framework="pt") as held:  # reads the header, and holds the file's length to it
                    for name in held.keys():  # noqa: SIM118 (no mapping)
                        if name in weights.files:
                            twice = f"{weights.files[name].name} and {shard.name} of {folder} hold {name}"
                            raise ValueError(f"{folder.name} must hold each weight once, {twice}")
                        weights.files[name], weights.shapes[name] = shard, tuple(held.get_slice(name).get_shape())
            except safetensors.SafetensorError as error:
                raise ValueError(f"{folder.name} must hold whole weights, {shard} is broken or cut off: {error}") from error
    return weights


def facts(path: Path) -> dict[str, Any]:
    """What ``run.json`` in a network's folder says; nothing where there is none. Raises ValueError where it cannot be read."""
    file = path / "run.json"
    try:
        return read_json(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; {ANEW}") from None


def export(
    path: Path,
    net: nn.Module,
    processes: Processes,
    run_facts: Mapping[str, Any],
    tensors: Iterator[tuple[str, Tensor]] | None = None,
    adapter: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a sharded network as a folder, whole or absent, tensor by tensor: no process holds more of it than the file that the
    main one is filling. ``tensors`` are written in place of its own, gathered one after another, and ``adapter`` beside them.
    Every rank calls it; an error of the main one is raised on all."""
    tensors, failed = _gathered(net) if tensors is None else tensors, None
    if processes.is_main:
        try:
            write_folder(path, net, tensors, run_facts, adapter)
        except Exception as error:
            failed = error
    for _ in tensors:  # gathering takes all ranks to the end
        pass

    def outcome() -> None:
        if failed is not None:
            raise failed

    processes.on_main(outcome)


def _gathered(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole tensors, one after another."""
    for name, tensor in get_model_state_dict(net).items():
        yield name, whole(tensor.detach())


def write_folder(
    path: Path,
    net: Any,
    tensors: Iterable[tuple[str, Tensor]],
    run_facts: Mapping[str, Any],
    adapter: Mapping[str, Tensor] | None = None,
) -> None:
    """The folder of a network from its tensors, whole or absent; ``run_facts`` becomes run.json, ``adapter`` a file of its own. It
    replaces a folder at ``path``."""
    waiting, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old.tmp")
    try:
        _fill(waiting, net, tensors, run_facts)
        if adapter is not None:
            with naming(waiting / ADAPTER):
                save_tensors(adapter, waiting / ADAPTER, metadata={"format": "pt"})
                sync(waiting / ADAPTER)
    except BaseException:
        shutil.rmtree(waiting, ignore_errors=True)  # a full disk's, or Ctrl-C's
        raise
    if path.is_dir():
        path.rename(old)
    waiting.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(waiting: Path, net: Any, tensors: Iterable[tuple[str, Tensor]], run_facts: Mapping[str, Any]) -> None:
    shutil.rmtree(waiting, ignore_errors=True)
    waiting.mkdir(parents=True)
    with naming(waiting / "config.json"):
        net.save_config(waiting)
    config = read_json(waiting / "config.json")
    config.pop("_name_or_path", None)  # where its first weights came from, here: it would tell runs in two places apart
    config["_class_name"] = config["_class_name"].removeprefix("FSDP")  # fully_shard gives the class another name
    replace_file(waiting / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    held: list[list[str]] = []
    filling: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        held.append(list(filling))
        # One entry of metadata: safetensors writes several in an order that changes from process to process.
        with naming(waiting / f"{len(held)}.safetensors"):
            save_tensors(filling, waiting / f"{len(held)}.safetensors", metadata={"format": "pt"})
            sync(waiting / f"{len(held)}.safetensors")
        filling.clear()

    for name, tensor in tensors:
        bytes_here = tensor.numel() * tensor.element_size()
        if filling and size + bytes_here > SHARD_BYTES:
            close()
            size = 0
        filling[name] = tensor.cpu().clone().contiguous()
        size, total = size + bytes_here, total + bytes_here
    close()
    finals = [f"{STEM}-{i:05d}-of-{len(held):05d}.safetensors" for i in range(1, len(held) + 1)]
    finals = finals if len(held) > 1 else [f"{STEM}.safetensors"]
    for i, final in enumerate(finals, start=1):
        (waiting / f"{i}.safetensors").rename(waiting / final)
    if len(held) > 1:
        places = {name: final for final, names in zip(finals, held, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        replace_file(waiting / f"{STEM}.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    replace_file(waiting / "run.json", json.dumps(dict(run_facts), indent=1) + "\n")
