"""Files of one transformer, in diffusers' names: single ``.safetensors``, and Self-Forcing's and CausVid's ``.pt``, which are
written too. What a pickle may carry is not run."""

from __future__ import annotations

import inspect
import logging
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from aadkern.checks import dtype as checked_dtype
from aadkern.checks import finite_weights, shown, whole
from aadkern.weights.names import bare, in_diffusers_names, translated
from aadkern.weights.tensor_files import open_tensors

log = logging.getLogger("aadkern.weights")
State = dict[str, Tensor]
Model = TypeVar("Model", bound=torch.nn.Module)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # that a model may be loaded in
CONTAINERS = ("generator_ema", "generator", "model")  # what the family's files keep weights under, the best first


@dataclass(frozen=True)
class Checkpoint:
    """A transformer on a disk. ``shapes`` are tensors on "meta" by diffusers' names, in the dtype that ``read`` gives them in."""

    shapes: State
    read: Callable[[str], Tensor]


def open_checkpoint(
    path: str | os.PathLike[str], *, weights: str | None = None, fp8_as: torch.dtype = torch.bfloat16
) -> Checkpoint:
    """A file as ``load_checkpoint`` takes it, of which no weights are read yet. FP8 weights are given in ``fp8_as``."""
    path = _path(path)
    if path.suffix.lower() == ".safetensors":
        if weights is not None:
            raise ValueError(f"weights must be None for a .safetensors, which holds one state dict, got {shown(weights)}")
        return open_safetensors([_file(path)], "path", fp8_as)
    state = _load_pickle(path, weights)
    return Checkpoint({name: tensor.to("meta") for name, tensor in state.items()}, state.__getitem__)


def open_safetensors(files: Sequence[Path], name: str, fp8_as: torch.dtype = torch.bfloat16) -> Checkpoint:
    """Files that hold one transformer together. Raises ValueError, calling them ``name``, as ``open_tensors`` does, and as
    ``from_wan_names``."""
    held = open_tensors(files, name, fp8_as)
    shapes = from_wan_names(held.shapes)
    stored = dict(zip(shapes, held.shapes, strict=True))  # renaming keeps the order
    return Checkpoint(shapes, lambda tensor: held.read(stored[tensor]))


def load_checkpoint(path: str | os.PathLike[str], *, weights: str | None = None) -> State:
    """A ``.pt`` or ``.safetensors`` file's transformer as a state dict in diffusers' names, on the CPU.

    ``weights`` is the entry of a ``.pt`` to take ("generator", "generator_ema", "critic", ...); None takes the first there of
    generator_ema, generator and model, or the file itself where it is one flat state dict. Prefixes of wrappers (FSDP,
    checkpointing, torch.compile) and of outer modules ("model.", "model.diffusion_model.") are dropped. Tensors are as in the file,
    to the bit; FP8 weights of a ``.safetensors`` are dequantised to bfloat16.

    Raises ValueError for what is no such file, and for pickles that hold other things than tensors and plain
    containers: they are never run (``weights_only=True``).
    """
    opened = open_checkpoint(path, weights=weights)
    return {name: opened.read(name) for name in opened.shapes}


def _load_pickle(path: Path, weights: str | None) -> State:
    if weights is not None and not isinstance(weights, str):
        raise TypeError(f"weights must be a name or None, got {shown(weights)}")
    content = read_pickle(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"path must hold a dictionary, got {type(content).__name__} in {path}")
    if weights is None:
        weights = next((name for name in CONTAINERS if isinstance(content.get(name), Mapping)), None)
        log.info("%s: taking %s", path, "the whole file" if weights is None else repr(weights))
    elif not isinstance(content.get(weights), Mapping):
        held = ", ".join(str(name) for name, value in content.items() if isinstance(value, Mapping)) or "one flat state dict"
        raise ValueError(f"weights must name a state dict in {path}, which holds {held}, got {weights!r}")
    state = content if weights is None else content[weights]
    wrong = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if wrong is not None or not state:
        what = "nothing" if wrong is None else f"{type(state[wrong]).__name__} under {wrong!r}"
        raise ValueError(f"path must hold a state dict of tensors, got {what} in {path}")
    return from_wan_names(state)


def _path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be the path of a .pt file, got {shown(path)}")
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, not to be read, or with a NUL
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"path must be the path of a .pt file, got {shown(path)}: {reason}") from error
    return Path(path)


def _state(state: Any) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a state dict, names to tensors, got {shown(state)}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"state must be a state dict, names to tensors, got {shown(value)} under {shown(name)}")
    return state


def _file(path: Path) -> Path:
    if not path.is_file():
        got = shown(str(path))
        wanted = "a .pt file or a .safetensors"
        raise FileNotFoundError(f"path must be {wanted}, got {got}; for a diffusers folder use CausalWan.from_pretrained")
    return path


def read_pickle(path: Path, name: str = "path") -> Any:
    """What a ``.pt`` holds, tensors and plain containers. Raises ValueError, which calls it ``name``, for anything else in it."""
    with _file(path).open("rb") as file:
        if file.read(4) == b"GGUF":
            raise ValueError(f"{name} must be a .safetensors or a .pt, {path} is a GGUF file, whose quantised forms are not served")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{name} must hold tensors and plain containers only; {path} is no pickle of that kind and was not run. torch says: "
            f"{next((line.strip() for line in reason if 'GLOBAL' in line), reason[0] if reason else 'unreadable')}"
        ) from error
    except Exception as error:  # the unpickler meets junk with errors of any kind
        raise ValueError(
            f"{name} must be a file that torch.save wrote, and {path} cannot be read: {type(error).__name__} {error}"
        ) from error


def from_wan_names(state: Mapping[str, Tensor]) -> State:
    """A state dict in diffusers' names, from Wan's names or diffusers', with or without the prefixes of wrappers.

    Raises ValueError for a name that Wan's transformer does not have, or two names that mean one tensor.
    """
    plain = _renamed(_state(state), {name: bare(name) for name in state})
    return plain if in_diffusers_names(plain) else _renamed(plain, translated(list(plain), "diffusers"))


def to_wan_names(state: Mapping[str, Tensor]) -> State:
    """A state dict in Wan's own names, from diffusers'. Raises ValueError for a name that Wan's transformer does not have."""
    return _renamed(_state(state), translated(list(state), "wan"))


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    renamed: State = {}
    for name, tensor in state.items():
        if names[name] in renamed:
            raise ValueError(
                f"state dict must name each tensor once, but {name!r} means {names[name]!r}, which stands there already"
            )
        renamed[names[name]] = tensor
    return renamed


def save_checkpoint(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    weights: str = "generator",
    prefix: str = "model.",
) -> None:
    """Write a state dict in diffusers' names (``CausalWan.state_dict()``) as a ``.pt`` file that Self-Forcing and
    CausVid load.

    The file is ``{weights: {prefix + Wan's name: tensor}}``, on the CPU. It appears whole or not at all. Raises
    ValueError, having written nothing, for names that Wan's transformer does not have.
    """
    path = _path(path)
    if not path.name or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"path must be a file in a folder that there is, got {shown(str(path))}")
    for argument, value in (("weights", weights), ("prefix", prefix)):
        if not isinstance(value, str):
            raise TypeError(f"{argument} must be a name, got {shown(value)}")
    content = {prefix + name: tensor.detach().cpu() for name, tensor in to_wan_names(state).items()}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save({weights: content}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def infer_config(state: Mapping[str, Tensor], *, head_dim: int = 128) -> dict[str, Any]:
    """``CausalWan``'s configuration from the shapes of a state dict in diffusers' names.

    Shapes tell all but three things, which are taken as in every public Wan: ``head_dim`` 128, eps 1e-6, and RMSNorm
    across heads. Raises ValueError for a state dict that is not a whole transformer, or image-to-video weights, which
    have no causal form.
    """

    _state(state)

    def shape(name: str, dimensions: int = 2) -> tuple[int, ...]:
        if name not in state:
            raise ValueError(f"state dict must hold a whole Wan transformer in diffusers' names, and lacks {name!r}")
        if state[name].dim() != dimensions:
            raise ValueError(f"state dict must hold {name!r} with {dimensions} dimensions, got {list(state[name].shape)}")
        return tuple(state[name].shape)

    if any("image_embedder" in name or "add_k_proj" in name for name in state):
        raise ValueError("state dict must be text-to-video weights; these have image embeddings, which CausalWan does not take")
    dim, channels, *patch = shape("patch_embedding.weight", 5)
    if dim % whole(head_dim, "head_dim", 1):
        raise ValueError(f"head_dim must divide the model's width {dim}, got {head_dim}")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shape("proj_out.weight")[0] // math.prod(patch),
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in state,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    }


def read_model(
    make: Callable[..., Model],
    path: str | os.PathLike[str],
    *,
    weights: str | None = None,
    head_dim: int = 128,
    dtype: torch.dtype | None = None,
    **config: Any,
) -> Model:
    """A ``make`` (``CausalWan``, or a class made of it) from a ``.pt`` or ``.safetensors`` file.

    Shapes are checked before weights are read.

    ``config`` overrides what ``infer_config`` found (say ``rope="relative"``); the outcome stands in ``model.config`` and is
    logged. ``dtype`` None keeps the file's, and makes bfloat16 of FP8.

    Raises ValueError as ``load_checkpoint`` and ``infer_config`` do, where weights and configuration do not fit, and where a weight
    is not finite.
    """
    if dtype is not None:
        checked_dtype(dtype, "dtype", DTYPES)
    whole(head_dim, "head_dim", 1)
    accepted = [name for name in inspect.signature(make).parameters]
    unknown = sorted(set(config) - set(accepted))
    if unknown:
        raise ValueError(f"config must be of {', '.join(accepted)}, got {', '.join(unknown)}")
    opened = open_checkpoint(path, weights=weights, fp8_as=dtype or torch.bfloat16)
    inferred = infer_config(opened.shapes, head_dim=head_dim)
    log.info("%s: inferred %s; head_dim and eps are assumed, not in the file", path, inferred)
    # Of the time embedder and the tables of modulation, which diffusers keeps in float32, the model takes any.
    apart = ("time_embedder", "scale_shift_table")
    kinds = {str(x.dtype) for n, x in opened.shapes.items() if x.dim() > 1 and not any(word in n for word in apart)}
    if dtype is None and len(kinds) > 1:
        raise ValueError(f"dtype must be given for matrices in several, path holds {', '.join(sorted(kinds))}")
    with torch.device("meta"):
        model = make(**{**inferred, **config})
    try:
        model.load_state_dict(opened.shapes, assign=True)
    except RuntimeError as error:
        raise ValueError(f"path must hold the weights of the inferred model: {' '.join(str(error).split())}") from error
    tensors = ((name, opened.read(name)) for name in opened.shapes)
    model.load_state_dict({name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors}, assign=True)
    finite_weights(model, "path", path)
    return model
