"""A causal Wan made ready to stream: its parts held to what is asked, prompts embedded, the transformer, its cache and noise."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern import StreamingGenerator, Window
from aadkern_train.diffusion.draws import Draws
from aadkern_train.generate.wan_decoder import check_decoder
from aadkern_train.generate.wan_settings import WanSettings, lora_of
from aadkern_train.networks.folders import facts
from aadkern_train.networks.hub import ENCODERS, hub_checkpoint, hub_folder
from aadkern_train.networks.wan_parts import FILES, WanParts, find_parts, load_part, transformer_shapes


def fitting_parts(checkpoint: Path, parts: Path | None, settings: WanSettings) -> WanParts:
    """``find_parts``, where settings and what is installed allow to stream them. Raises ValueError or FileNotFoundError."""
    from aadkern.wan import lora_file

    if importlib.util.find_spec("transformers") is None:
        raise ValueError("prompt needs transformers: pip install 'aadkern[wan]'")
    parts = None if parts is None else hub_folder(parts, "parts", ENCODERS)
    checkpoint = hub_checkpoint(checkpoint, parts)
    if not checkpoint.exists():
        raise FileNotFoundError(f"checkpoint must be a Wan folder, {FILES}, found nothing at {checkpoint}")
    wan_parts = find_parts(checkpoint, parts)
    predicts = facts(wan_parts.transformer).get("predicts", "flow")
    if predicts != "flow":
        raise ValueError(f"transformer must predict the flow, {wan_parts.transformer} predicts {predicts!r}")
    check_size(settings.size, wan_parts.pixels, wan_parts.patch)
    check_decoder(wan_parts, settings)
    for word in settings.lora:
        lora_file.read_lora(lora_of(word)[0], transformer_shapes(wan_parts.transformer))
    return wan_parts


def check_size(size: tuple[int, int], pixels: int, patch: Sequence[int]) -> None:
    """Raises ValueError for a size in pixels that whole patches of latents do not fill."""
    (height, width), (rows, columns) = size, (pixels * side for side in patch)
    if min(size) < 1 or height % rows or width % columns:
        raise ValueError(f"size must be rows x columns, multiples of {rows} and {columns}, got {height}x{width}")


def latent_frame(parts: WanParts, settings: WanSettings) -> tuple[int, int, int]:
    """(C, H, W) of a latent frame."""
    height, width = (side // parts.pixels for side in settings.size)
    return parts.channels, height, width


def wan_stream(model: Any, frame: tuple[int, int, int], settings: WanSettings, cuda_graphs: bool) -> StreamingGenerator:
    """A stream of a model's, with a cache of its own."""
    window, most = Window(settings.window, sink=settings.sink), settings.chunk_frames
    cache = model.new_cache(1, *frame[1:], window, max_chunk_frames=most, merged=True, precision=settings.kv_cache)
    levels: dict[str, Any] = {"levels": settings.steps, "first_levels": settings.first_steps}
    # Weights that come and go under inference mode would be tensors of that mode ever after.
    return StreamingGenerator(model, cache, cuda_graphs=cuda_graphs, inference_mode=not model.is_offloaded(), **levels)


def wan_noise(seed: int, frame: tuple[int, int, int], size: int, device: torch.device) -> Callable[[int, int], Tensor]:
    """The noise of a stream's chunks of ``size`` latent frames, as ``StreamingGenerator`` takes it."""
    draws, (channels, height, width) = Draws(seed, "generate"), frame

    def noise(chunk: int, step: int) -> Tensor:
        return draws.normal(f"noise {chunk} {step}", [0], (channels, size, height, width), device)

    return noise


def embed_prompts(
    parts: WanParts, prompts: Sequence[str], device: torch.device, dtype: torch.dtype, *, kept: str | None = None
) -> list[Tensor]:
    """Each prompt's embedding [1, 512, text_dim], on the device ``kept`` (None: ``device``). The text encoder, 11 GB for Wan in
    bf16, is loaded for them and freed again."""
    from aadkern.wan.text import TOKENS, embed, load_text_encoder, token_ids

    ids = [token_ids(parts.tokenizer, prompt) for prompt in prompts]
    began = time.monotonic()
    encoder = load_text_encoder(parts.text_encoder, dtype, device)
    texts = [embed(encoder, tokens).to(kept or device) for tokens in ids]
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    counts = [f"{len(tokens)} tokens" + (", the most there can be" if len(tokens) == TOKENS else "") for tokens in ids]
    if len(ids) > 8:
        full = sum(len(tokens) == TOKENS for tokens in ids)
        counts = [f"{len(ids)} prompts of {min(map(len, ids))} to {max(map(len, ids))} tokens, {full} with the most there can be"]
    say(f"prompt: {'; '.join(counts)}, embedded in {time.monotonic() - began:.1f} s; the text encoder is freed again")
    return texts


def prepare_model(parts: WanParts, settings: WanSettings) -> Any:
    """The transformer as a ``CausalWan``, ready to stream. What changes or compiles the model belongs here."""
    from aadkern import compat
    from aadkern.wan import CausalWan, lora
    from aadkern.wan.fp8 import quantise
    from aadkern.wan.offload import offload_blocks

    device, dtype = settings.placement()
    changes: dict[str, Any] = {} if settings.rope is None else {"rope": settings.rope}
    model: Any
    if parts.transformer.is_file():
        model = compat.load_model(parts.transformer, dtype=dtype, **changes)
    else:
        model = load_part(CausalWan, parts.transformer, dtype, **changes)
    for number, word in enumerate(settings.lora, 1):
        file, weight = lora_of(word)
        say(f"lora: {lora.load(model, file, weight, name=f'{number} {file.stem}')!r}")
    lora.settle(model)  # before the GPU, which may have no room for the weights twice
    model = model.eval().requires_grad_(False)
    if not settings.offload:
        model = model.to(device)
    if settings.fp8:
        say(str(quantise(model)))
    if settings.offload:
        offload_blocks(model, device)
    if settings.compile:
        model.compile_blocks()
    return model


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
