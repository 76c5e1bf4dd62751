"""Where a Wan model's parts lie on disk, and whether they fit each other: read off configurations and names, before any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aadkern.checks import finite_weights
from aadkern.wan import CausalWan
from aadkern_train.engine.files import read_json
from aadkern_train.networks.folders import STEM, TRANSFORMERS, Shapes, check_shapes, check_transformer, facts, find_weights, stated

PIXELS = 8  # rows of pixels in a row of latents: Wan 2.1's VAE
PICKLES = (".pt", ".pth", ".ckpt", ".bin")
SINGLE = ".safetensors"
FILES = "a .pt file or a .safetensors"


@dataclass(frozen=True)
class Encoders:
    """What captions and videos are prepared with. ``pixels``: rows of pixels in a row of latents; ``channels`` and ``text_dim``: of
    latents and texts."""

    vae: Path
    text_encoder: Path
    tokenizer: Path
    channels: int
    text_dim: int
    pixels: int


@dataclass(frozen=True)
class WanParts:
    """Folders in diffusers' format (``transformer``: or a file), and what their configurations say.

    ``pixels``: rows of pixels in a row of latents; ``patch``: rows of latents in a row of tokens.
    """

    transformer: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    channels: int
    pixels: int
    patch: tuple[int, int]


def is_wan(checkpoint: Path) -> bool:
    """Whether ``checkpoint`` is Wan's (a folder of diffusers, a file, or the weights of a run on Wan's latents), and not a run
    of this package on latents of its own.

    Raises FileNotFoundError where there is nothing, ValueError for other files and a weights file out of a folder of diffusers.
    """
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"checkpoint must be a Wan folder, a .pt file, a .safetensors or a run; found nothing at {checkpoint}"
        )
    if checkpoint.is_file():
        beside = checkpoint.parent / "config.json"
        if checkpoint.suffix == SINGLE and beside.is_file() and read_json(beside).get("_class_name") in TRANSFORMERS:
            raise ValueError(f"checkpoint must be a folder with its configuration, say {checkpoint.parent}, got {checkpoint}")
        if checkpoint.suffix.lower() not in (*PICKLES, SINGLE):
            raise ValueError(f"checkpoint must be a Wan folder, {FILES}, a run or its RUN/weights/STAGE, got {checkpoint}")
        return True
    run_facts = facts(checkpoint)
    if "recipe" in run_facts:
        return trained_parts(run_facts) is not None
    return any((checkpoint / name).exists() for name in ("model_index.json", "config.json", "transformer"))


def trained_parts(run_facts: Mapping[str, Any]) -> Path | None:
    """The Wan folder whose latents a run was trained on, by its weights' run.json; None: latents of another kind."""
    recipe = run_facts.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    parts = data.get("parts") if isinstance(data, dict) else None
    return Path(parts) if isinstance(parts, str) and parts else None


def find_parts(checkpoint: Path, parts: Path | None = None) -> WanParts:
    """The parts for ``checkpoint``: a pipeline's folder, a transformer's folder, a ``.pt`` file of Self-Forcing's kind, or
    a single ``.safetensors``.

    ``parts`` is the pipeline's folder that vae, text_encoder and tokenizer are taken from; None: ``checkpoint`` itself.
    Raises FileNotFoundError or ValueError naming what is missing or does not fit.
    """
    rest, transformer = parts or checkpoint, checkpoint
    if checkpoint.is_dir() and not (checkpoint / "config.json").is_file():
        transformer = checkpoint / "transformer"
        _check_index(checkpoint)
    elif parts is None:
        raise ValueError(f"parts must be given: {checkpoint} is a transformer alone. Wan2.1-T2V-1.3B-Diffusers has the other parts")
    if not rest.is_dir():
        raise FileNotFoundError(f"parts must be a folder with vae, text_encoder and tokenizer, found none at {rest}")
    config, shapes = _transformer(transformer)
    encoders = _encoders(rest)
    _check_fits(config, encoders)
    check_shapes(config, shapes, transformer)
    rows, columns = (int(side) for side in config["patch_size"][1:])
    folders = (encoders.vae, encoders.text_encoder, encoders.tokenizer)
    return WanParts(transformer, *folders, encoders.channels, encoders.pixels, (rows, columns))


def find_encoders(folder: Path) -> Encoders:
    """The parts of a pipeline's folder that prepare data; its transformer need not be there, but where it is must fit them.

    Raises FileNotFoundError or ValueError naming what is missing or does not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"wan must be a folder with vae, text_encoder and tokenizer, found none at {folder}")
    _check_index(folder)
    encoders = _encoders(folder)
    if (folder / "transformer" / "config.json").is_file():
        _check_fits(_config(folder / "transformer"), encoders)
    return encoders


def _encoders(folder: Path) -> Encoders:
    vae, text_encoder, tokenizer = folder / "vae", folder / "text_encoder", folder / "tokenizer"
    vae_config, text_config = _config(vae), _config(text_encoder)
    if vae_config.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"vae must be an AutoencoderKLWan, {vae} holds {vae_config.get('_class_name')!r}")
    if text_config.get("model_type") != "umt5":
        raise ValueError(f"text_encoder must be a UMT5 encoder, {text_encoder} holds {text_config.get('model_type')!r}")
    if not (tokenizer / "tokenizer.json").is_file():
        raise FileNotFoundError(f"tokenizer must be a folder with tokenizer.json, found none in {tokenizer}")
    find_weights(vae, STEM)
    find_weights(text_encoder, "model", "pytorch_model")
    channels, width = stated(vae_config, "z_dim", vae), stated(text_config, "d_model", text_encoder)
    pixels = 2 ** (len(stated(vae_config, "dim_mult", vae)) - 1) * (vae_config.get("patch_size") or 1)
    return Encoders(vae, text_encoder, tokenizer, channels, width, pixels)


def _check_fits(config: Mapping[str, Any], encoders: Encoders) -> None:
    channels, width = encoders.channels, encoders.text_dim
    for name in ("in_channels", "out_channels"):
        count = config.get(name)
        if count != channels:
            raise ValueError(
                f"transformer must have {name} {channels}, the VAE's, got {count}: a VAE must be its transformer's own, and "
                "image-to-video weights that take the image as more channels cannot stream"
            )
    if config.get("text_dim") != width:
        raise ValueError(f"transformer must have text_dim {width}, the text encoder's, got {config.get('text_dim')}")


def load_part(kind: Any, folder: Path, dtype: torch.dtype, **changes: Any) -> Any:
    """A model of diffusers' from its folder, on the CPU.

    Raises ValueError where weights are missing, which diffusers would draw at random, and where one is not finite.
    """
    model, loading = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True, **changes)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{folder.name} must hold all its weights; {folder} lacks {', '.join(missing[:3])}")
    finite_weights(model, folder.name, folder)
    return model


def _check_index(folder: Path) -> None:
    file = folder / "model_index.json"
    if file.is_file() and (read_json(file).get("transformer_2") or [None])[0] is not None:
        raise ValueError(
            f"checkpoint must have one transformer, {folder} has two (Wan 2.2 A14B), one for each range of noise levels"
        )


def _transformer(path: Path) -> tuple[Mapping[str, Any], Shapes]:
    """The transformer's configuration, checked to be one that ``CausalWan`` takes; its weights' shapes, where the files tell."""
    if path.is_file():
        from aadkern.weights.checkpoints import infer_config, open_checkpoint

        shapes = open_checkpoint(path).shapes
        return infer_config(shapes), {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    return transformer_config(path), find_weights(path, STEM).shapes


def transformer_shapes(path: Path) -> Shapes:
    """The shapes of a transformer's parameters by its configuration, of a folder or a file."""
    with torch.device("meta"):
        net = CausalWan.from_config(dict(_transformer(path)[0]))
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def transformer_config(path: Path) -> dict[str, Any]:
    """The configuration of a transformer's folder, checked to be one that ``CausalWan`` takes."""
    config = _config(path)
    check_transformer(config, path)
    return config


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder.name} must be a folder with config.json, found none at {folder}")
    return read_json(file)
