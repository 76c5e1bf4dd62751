"""``aad convert``: a causal Wan's weights from one form into another, tensor by tensor.

FILE.pt             Self-Forcing's and CausVid's: {"generator": {"model.blocks.0.self_attn.q.weight": ...}}
FILE.safetensors    one file, in Wan's own names or diffusers'
FOLDER              diffusers' format: config.json, shards of 5 GB, their index
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from aadkern import compat
from aadkern.wan import CausalWan
from aadkern.weights.checkpoints import open_checkpoint, open_safetensors
from aadkern.weights.tensor_files import WIDE
from aadkern_train.engine.files import atomic_path, read_json, save_tensors
from aadkern_train.engine.video import check_place
from aadkern_train.networks.folders import STEM, TRANSFORMERS, check_shapes, facts, weight_files, write_folder
from aadkern_train.networks.hub import hub_folder
from aadkern_train.networks.wan_parts import PICKLES, transformer_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Weights:
    """A transformer as it lies on a disk. ``shapes`` are tensors on "meta" by diffusers' names, ``read`` gives the real one of a
    name, and ``predicts`` is what its run.json says (a run's own facts stay with the run)."""

    path: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, Tensor]
    predicts: str
    read: Callable[[str], Tensor]


def convert(
    source: Path, out: Path, *, key: str | None = None, dtype: str | None = None, rope: str | None = None, overwrite: bool = False
) -> Path:
    """Write the transformer of ``source`` to ``out``, whole or absent, and return ``out``; its values are the same to the bit, but
    for a ``dtype``.

    Both are a folder in diffusers' format, a ``.pt`` or a ``.safetensors``. ``key``: the entry of a ``.pt`` ("generator",
    "generator_ema"); None reads the averaged weights where there are any, and writes "generator". ``dtype`` None: as stored.
    ``rope``, of a folder alone: the positions that its model uses. Files are mapped, not read into memory, and a folder is written
    shard by shard; a file in another ``dtype`` is written from memory that holds the model once.

    Raises ValueError or FileNotFoundError, before anything is written, for what is no such model, for names that Wan's transformer
    does not have, and where something else lies at ``out`` (the same model there is left as it is) without ``overwrite``.
    """
    file = out.suffix.lower()
    if file in PICKLES and file != ".pt":
        raise ValueError(f"out must be a folder, or a file that ends in .pt or .safetensors, got {out}")
    is_file = file in (".pt", ".safetensors") and not out.is_dir()
    if rope is not None and is_file:
        raise ValueError(f"rope must be left out: {out.name} would hold no configuration; give it where the file is read")
    if key is not None and file != ".pt" and source.suffix.lower() not in PICKLES:
        raise ValueError(f"key must be left out: neither {source} nor {out} is a .pt, got {key!r}")
    source = hub_folder(source, "source")
    weights = open_weights(source, key if source.suffix.lower() in PICKLES else None)
    if out.resolve() in (weights.path.resolve(), *weights.path.resolve().parents):
        raise ValueError(f"out must be another place than the source, got {out}")
    check_place(out) if is_file else _check_folder(out)
    net = _network(weights.config, rope)
    entry = key or "generator"
    if out.exists() and not overwrite:
        different = _difference(weights, net, out, dtype, entry, is_file)
        if different:
            raise ValueError(f"out must be a new place, or overwrite given: {out} exists, and {different}")
        _say(f"{out} holds this model already")
        return out
    if not is_file:
        write_folder(out, net, _cast(weights, dtype), {"predicts": weights.predicts})
    else:
        if weights.predicts != "flow":
            raise ValueError(f"source must predict the flow to become a file: {source} predicts {weights.predicts!r}")
        # A tensor of a file that is mapped into memory may share its storage with others, which torch.save would write too.
        state = {n: t.clone() if t.untyped_storage().nbytes() != t.nbytes else t for n, t in _cast(weights, dtype)}
        if file == ".pt":
            compat.save_checkpoint(state, out, weights=entry)
        else:
            with atomic_path(out) as waiting:
                save_tensors({n: t.contiguous() for n, t in compat.to_wan_names(state).items()}, waiting, metadata={"format": "pt"})
        _tell_unwritten(net, weights.shapes, out)
    size = sum(tensor.numel() * (DTYPES[dtype] if dtype else tensor.dtype).itemsize for tensor in weights.shapes.values())
    _say(f"{out}: {len(weights.shapes)} tensors, {size / 1e9:.2f} GB")
    return out


def open_weights(path: Path, key: str | None = None) -> Weights:
    """What ``convert`` reads, its names, shapes and configuration checked; no weights are read yet."""
    predicts = "flow"
    config: Mapping[str, Any] | None = None
    if not path.exists():
        raise FileNotFoundError(f"source must be a folder, a .pt or a .safetensors; found nothing at {path}")
    if path.is_dir():
        path = path / "transformer" if not (path / "config.json").is_file() and (path / "transformer").is_dir() else path
        files, predicts = weight_files(path, STEM), facts(path).get("predicts", "flow")
        own = (path / "config.json").is_file() and read_json(path / "config.json").get("_class_name")
        if own in TRANSFORMERS or not own:  # Wan's own folders hold a WanModel: their shapes tell as much
            config = transformer_config(path)
    else:
        files = [path]
    if files[0].suffix.lower() in PICKLES:
        if len(files) > 1:
            raise ValueError(f"source must be one file or hold safetensors, {path} holds {len(files)} {files[0].suffix} files")
        opened = open_checkpoint(files[0], weights=key)
    elif files[0].suffix.lower() == ".safetensors":
        opened = open_safetensors(files, "source")
    else:
        raise ValueError(f"source must be a folder, a .pt or a .safetensors, got {path}")
    shapes = opened.shapes
    odd = next((f"{name} {like.dtype}" for name, like in shapes.items() if like.dtype not in WIDE.values()), None)
    if odd is not None:
        raise ValueError(f"source must hold weights in fp64, fp32, bf16 or fp16, {path} holds {odd}")
    if config is None:
        config = compat.infer_config(shapes)
        _say(f"{path}: configuration read off the shapes; heads of 128 and eps 1e-6 are assumed")
    check_shapes(config, {name: tuple(like.shape) for name, like in shapes.items()}, path)
    unknown = sorted(set(shapes) - set(_network(config, None).state_dict()))
    if unknown:
        raise ValueError(f"source must hold no more than its transformer, {path} has {', '.join(unknown[:3])}")
    return Weights(path, config, shapes, predicts, opened.read)


def _cast(weights: Weights, dtype: str | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in ``dtype``. Raises ValueError for a value that it cannot hold."""
    for name in weights.shapes:
        tensor = weights.read(name)
        if dtype is None or tensor.dtype == DTYPES[dtype]:
            yield name, tensor
            continue
        cast = tensor.to(DTYPES[dtype])
        if bool((tensor.isfinite() & ~cast.isfinite()).any()):
            raise ValueError(f"dtype must hold all weights: {name} of {weights.path} goes beyond {dtype}")
        yield name, cast


def _network(config: Mapping[str, Any], rope: str | None) -> Any:
    """The model on "meta": diffusers' own class, so that its folder is read by all; ours where positions are not Wan's."""
    ours = {"rope": rope or config.get("rope", "absolute"), "rope_periods": config.get("rope_periods")}
    plain = {name: value for name, value in config.items() if name not in (*ours, "_class_name", "_name_or_path")}
    with torch.device("meta"):
        if ours == {"rope": "absolute", "rope_periods": None}:
            return WanTransformer3DModel.from_config(plain)
        return CausalWan.from_config(plain | ours)


def _check_folder(out: Path) -> None:
    """That ``out`` may become a folder: nothing but such a folder's own files is there to be replaced."""
    if not out.is_dir():
        check_place(out)
    if out.is_file():
        raise ValueError(f"out must be a folder, or a file that ends in .pt or .safetensors; {out} is another file")
    own = ("config.json", "run.json")
    foreign = next((p for p in (out.iterdir() if out.is_dir() else ()) if p.name not in own and not p.name.startswith(STEM)), None)
    if foreign is not None:
        raise ValueError(f"out must be a folder of its own, {out} holds {foreign.name} too")


def _difference(weights: Weights, net: Any, out: Path, dtype: str | None, entry: str, is_file: bool) -> str:
    """What ``out`` differs in from what would be written there; "" where it is the same."""
    if out.is_dir() and not any(out.iterdir()):
        return "is empty"
    try:
        there = open_weights(out, entry if out.suffix.lower() == ".pt" else None)
    except (ValueError, FileNotFoundError) as error:
        return f"holds something else ({error})"
    if not is_file and _facts(read_json(out / "config.json")) != _facts(json.loads(json.dumps(dict(net.config)))):
        return "has another configuration"
    if not is_file and facts(out) != {"predicts": weights.predicts}:
        return "has another run.json"
    if there.shapes.keys() != weights.shapes.keys():
        return "holds other tensors"
    for name, like in weights.shapes.items():
        wanted = DTYPES[dtype] if dtype else like.dtype
        if (there.shapes[name].shape, there.shapes[name].dtype) != (like.shape, wanted):
            return f"holds {name} in another shape or dtype"
    return next((f"holds another {name}" for name, tensor in _cast(weights, dtype) if not _same(tensor, there.read(name))), "")


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _tell_unwritten(net: Any, shapes: Mapping[str, Tensor], out: Path) -> None:
    """Says what a file cannot hold of the configuration, and is taken for otherwise when it is read."""
    taken = compat.infer_config(shapes, head_dim=net.config.attention_head_dim)
    width = taken["num_attention_heads"] * taken["attention_head_dim"]
    taken |= {"num_attention_heads": width // 128, "attention_head_dim": 128, "rope": "absolute", "rope_periods": None}
    net_settings = {"rope": "absolute", "rope_periods": None, **_facts(net.config)}
    lost = [f"{name}={net_settings[name]!r}" for name in taken if json.dumps(net_settings[name]) != json.dumps(taken[name])]
    if lost:
        _say(f"{out} holds no configuration; whoever reads it must know {', '.join(lost)}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
