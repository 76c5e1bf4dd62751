"""A network's folder in diffusers' format, read and written: one of a hub's, or a stage's finished weights.

    config.json  diffusion_pytorch_model.safetensors (or shards of 5 GB and their index)  run.json

``run.json`` is ours: what the network predicts, and for a stage's weights the run's settings, so that such a folder alone streams.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from aadkern.wan import CausalWan
from aadkern_train.engine.files import naming, read_json, replace_file, sync
from aadkern_train.engine.processes import Processes, whole
from aadkern_train.networks.denoiser import Denoiser

STEM = "diffusion_pytorch_model"  # diffusers' name
SHARD_BYTES = 5_000_000_000
ANEW = "a stage's weights are made anew where their folder is removed and the run resumed"
# What diffusers raises for files that lack or a configuration that does not fit, and for weights of other shapes (RuntimeError).
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, safetensors.SafetensorError)


def load(path: Path) -> Denoiser:
    """A folder's network on the CPU.

    Raises ValueError where the folder is none, cannot be read, or lacks weights, which diffusers would draw at random.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} must be a network's folder in diffusers' format, it has no config.json; {ANEW}")
    try:
        read_json(path / "config.json")
        net, told = CausalWan.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except UNREADABLE as error:
        raise ValueError(f"{path} must be a network's folder in diffusers' format, it cannot be read: {error}; {ANEW}") from None
    if told["missing_keys"]:
        lacks = ", ".join(sorted(told["missing_keys"])[:3])
        raise ValueError(f"{path} must hold all weights of its network, it lacks {lacks}; {ANEW}")
    return Denoiser(net.train(), facts(path).get("predicts", "flow"))


def facts(path: Path) -> dict[str, Any]:
    """What ``run.json`` in a network's folder says; nothing where there is none. Raises ValueError where it cannot be read."""
    file = path / "run.json"
    try:
        return read_json(file) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{error}; {ANEW}") from None


def export(path: Path, net: nn.Module, processes: Processes, told: Mapping[str, Any]) -> None:
    """Writes a sharded network as a folder, whole or absent, tensor by tensor: no process holds more of it than the file that the
    main one is filling. Every rank calls it; an error of the main one is raised on all."""
    tensors, failed = _gathered(net), None
    if processes.is_main:
        try:
            write_folder(path, net, tensors, told)
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


def write_folder(path: Path, net: Any, tensors: Iterable[tuple[str, Tensor]], told: Mapping[str, Any]) -> None:
    """The folder of a network from its tensors, whole or absent; ``told`` becomes run.json. It replaces a folder at ``path``."""
    waiting, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old.tmp")
    try:
        _fill(waiting, net, tensors, told)
    except BaseException:
        shutil.rmtree(waiting, ignore_errors=True)  # a full disk's, or Ctrl-C's
        raise
    if path.is_dir():
        path.rename(old)
    waiting.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fill(waiting: Path, net: Any, tensors: Iterable[tuple[str, Tensor]], told: Mapping[str, Any]) -> None:
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
            save_file(filling, waiting / f"{len(held)}.safetensors", metadata={"format": "pt"})
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
    replace_file(waiting / "run.json", json.dumps(dict(told), indent=1) + "\n")
