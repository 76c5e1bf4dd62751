"""Where a Wan model's parts lie on disk, and whether they fit each other: read off configurations and names, before any weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from aadkern_train.engine.files import read_json
from aadkern_train.networks.folders import STEM, facts

PICKLES = (".pt", ".pth", ".ckpt", ".bin")
TRANSFORMERS = ("WanTransformer3DModel", "CausalWan")


@dataclass(frozen=True)
class WanParts:
    """Folders in diffusers' format (``transformer``: or a ``.pt`` file), and what their configurations say.

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
    """Whether ``checkpoint`` is Wan's (a folder of diffusers or a .pt file), and not a run of this package or its weights.

    Raises FileNotFoundError where there is nothing, ValueError for a weights file out of a folder of diffusers.
    """
    if not checkpoint.exists():
        raise FileNotFoundError(f"checkpoint must be a Wan folder, a .pt file or a run; found nothing at {checkpoint}")
    if checkpoint.is_file():
        if checkpoint.suffix == ".safetensors" and (checkpoint.parent / "config.json").is_file():
            raise ValueError(f"checkpoint must be a folder with its configuration, say {checkpoint.parent}, got {checkpoint}")
        if checkpoint.suffix.lower() not in PICKLES:
            raise ValueError(f"checkpoint must be a Wan folder, a .pt file, a run or its RUN/weights/STAGE, got {checkpoint}")
        return True
    if "recipe" in facts(checkpoint):
        return False
    return any((checkpoint / name).exists() for name in ("model_index.json", "config.json", "transformer"))


def find_parts(checkpoint: Path, parts: Path | None = None) -> WanParts:
    """The parts for ``checkpoint``: a pipeline's folder, a transformer's folder, or a ``.pt`` file of Self-Forcing's kind.

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
    vae, text_encoder, tokenizer = rest / "vae", rest / "text_encoder", rest / "tokenizer"
    (config, shapes), vae_config, text_config = _transformer(transformer), _config(vae), _config(text_encoder)
    if vae_config.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"vae must be an AutoencoderKLWan, {vae} holds {vae_config.get('_class_name')!r}")
    if text_config.get("model_type") != "umt5":
        raise ValueError(f"text_encoder must be a UMT5 encoder, {text_encoder} holds {text_config.get('model_type')!r}")
    if not (tokenizer / "tokenizer.json").is_file():
        raise FileNotFoundError(f"tokenizer must be a folder with tokenizer.json, found none in {tokenizer}")
    _check_weights(vae, STEM)
    _check_weights(text_encoder, "model", "pytorch_model")
    channels, width = _get(vae_config, "z_dim", vae), _get(text_config, "d_model", text_encoder)
    for name in ("in_channels", "out_channels"):
        if config[name] != channels:
            raise ValueError(
                f"transformer must have {name} {channels}, the VAE's, got {config[name]}: a VAE must be its transformer's own, and "
                "image-to-video weights that take the image as more channels cannot stream"
            )
    if config["text_dim"] != width:
        raise ValueError(f"transformer must have text_dim {width}, the text encoder's, got {config['text_dim']}")
    check_shapes(config, shapes, transformer)
    pixels = 2 ** (len(_get(vae_config, "dim_mult", vae)) - 1) * (vae_config.get("patch_size") or 1)
    rows, columns = (int(side) for side in config["patch_size"][1:])
    return WanParts(transformer, vae, text_encoder, tokenizer, channels, pixels, (rows, columns))


def _check_index(folder: Path) -> None:
    file = folder / "model_index.json"
    if file.is_file() and (read_json(file).get("transformer_2") or [None])[0] is not None:
        raise ValueError(
            f"checkpoint must have one transformer, {folder} has two (Wan 2.2 A14B), one for each range of noise levels"
        )


Shapes = Mapping[str, tuple[int, ...]]


def _transformer(path: Path) -> tuple[Mapping[str, Any], Shapes]:
    """The transformer's configuration, checked to be one that ``CausalWan`` takes; its weights' shapes, where the files tell."""
    if path.is_file():
        from aadkern.compat import infer_config, load_checkpoint

        state = load_checkpoint(path)  # maps the file, and reads no weights
        return infer_config(state), {name: tuple(tensor.shape) for name, tensor in state.items()}
    return transformer_config(path), _check_weights(path, STEM)


def transformer_config(path: Path) -> dict[str, Any]:
    """The configuration of a transformer's folder, checked to be one that ``CausalWan`` takes."""
    config = _config(path)
    if config.get("_class_name") not in TRANSFORMERS:
        raise ValueError(f"transformer must be one of {', '.join(TRANSFORMERS)}, {path} holds {config.get('_class_name')!r}")
    if config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None:
        raise ValueError(
            f"transformer must be text-to-video weights, {path} has image embeddings (image_dim {config.get('image_dim')}): "
            "streaming takes the image as a clean first latent frame instead"
        )
    for name in ("in_channels", "out_channels", "text_dim", "patch_size"):
        _get(config, name, path)
    patch = config["patch_size"]
    if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1 or not all(isinstance(side, int) for side in patch):
        raise ValueError(f"transformer must have a patch_size of [1, rows, columns], {path} has {patch}")
    return config


def check_shapes(config: Mapping[str, Any], shapes: Shapes, path: Path) -> None:
    """That the transformer's weights are those that its configuration speaks of."""
    from aadkern.wan import CausalWan

    if not shapes:
        return
    with torch.device("meta"):
        wanted = CausalWan.from_config(dict(config)).state_dict()
    for name, tensor in wanted.items():
        if shapes.get(name) != tuple(tensor.shape):
            found = f"[{', '.join(map(str, shapes[name]))}]" if name in shapes else "nothing"
            raise ValueError(f"transformer must hold {name} {list(tensor.shape)} by its configuration, found {found} in {path}")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder.name} must be a folder with config.json, found none at {folder}")
    return read_json(file)


def _get(config: Mapping[str, Any], name: str, folder: Path) -> Any:
    if name not in config:
        raise ValueError(f"{folder / 'config.json'} must state {name}, and does not")
    return config[name]


def _check_weights(folder: Path, *stems: str) -> Shapes:
    """That a part's weights are there, every shard of them, and are more than Git LFS's notes of them. Their shapes, as far as
    safetensors tell them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in weight_files(folder, *stems):
        if shard.suffix == ".safetensors":
            try:
                with safetensors.safe_open(shard, framework="pt") as held:  # reads the header, and holds the file's length to it
                    shapes |= {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118 (no mapping)
            except safetensors.SafetensorError as error:
                raise ValueError(f"{folder.name} must hold whole weights, {shard} is broken or cut off: {error}") from error
    return shapes


def weight_files(folder: Path, *stems: str) -> list[Path]:
    """The files of a part's weights. Raises FileNotFoundError or ValueError where one is missing or is Git LFS's note of it."""
    names = [f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".bin")]
    shards = [folder / name for name in names if (folder / name).is_file()][:1]
    for index in (folder / f"{name}.index.json" for name in names):
        if not shards and index.is_file():
            shards = [folder / name for name in sorted(set(_get(read_json(index), "weight_map", folder).values()))]
    if not shards:
        raise FileNotFoundError(f"{folder.name} must hold weights ({names[0]} or its shards), found none in {folder}")
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(f"{folder.name} must hold every shard of its weights, {shard} is missing")
        with shard.open("rb") as file:
            if file.read(24).startswith(b"version https://git-lfs"):
                raise ValueError(f"{folder.name} must hold weights, {shard} is a Git LFS pointer: fetch it with `git lfs pull`")
    return shards
