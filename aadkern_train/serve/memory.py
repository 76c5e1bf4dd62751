"""What sessions need in memory, told before any weight is read: the model's own code on tensors that have shapes alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from aadkern import StreamingGenerator
from aadkern_train.engine.files import read_json
from aadkern_train.generate.wan_model import latent_frame, wan_stream
from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.folders import facts, inspect
from aadkern_train.networks.rollout import streaming
from aadkern_train.networks.wan_parts import WanParts
from aadkern_train.planning.live import Live
from aadkern_train.recipes import recipe_of

CHUNKS = 3  # a first one, a merged one, and one that finds what that left
MB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes: ``weights`` of each part, shared by all sessions; ``cache`` and ``decoder`` (features kept between chunks) of each
    session; ``working``: the most that one chunk's tensors take, of one session at a time; ``graphs``: whether each session's CUDA
    graphs hold as much again."""

    weights: dict[str, int]
    cache: int
    geometry: str
    decoder: int
    working: int
    graphs: bool
    sessions: int

    @property
    def total(self) -> int:
        """Of all sessions."""
        own = self.cache + self.decoder + self.working * self.graphs
        return sum(self.weights.values()) + self.sessions * own + self.working

    def lines(self) -> list[str]:
        """A table."""
        times = "" if self.sessions == 1 else f" x {self.sessions} sessions"
        rows = [(f"weights: {name}", size, "") for name, size in self.weights.items()]
        rows.append(("cache", self.cache * self.sessions, self.geometry + times))
        if self.decoder:
            rows.append(("decoder", self.decoder * self.sessions, f"features between chunks{times}"))
        rows.append(("one chunk", self.working, "activations; without what operators hold within themselves"))
        if self.graphs:
            rows.append(("CUDA graphs", self.working * self.sessions, f"activations kept{times}; an estimate"))
        rows.append(("in all", self.total, ""))
        wide = max(len(name) for name, _, _ in rows)
        return [f"{name:<{wide}} {size / MB:>10.1f} MiB  {note}".rstrip() for name, size, note in rows]


@contextmanager
def shapes_alone() -> Iterator[Live]:
    """Tensors made within have no memory, and are counted. Tables that `aadkern` keeps are of one kind only, so they are forgotten
    before and after."""
    _forget()
    try:
        with FakeTensorMode(), Live() as live, torch.no_grad():
            yield live
    finally:
        _forget()


def _forget() -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "aadkern":
            for held in list(vars(module).values()):
                if hasattr(held, "cache_clear"):
                    held.cache_clear()


def _measured(
    live: Live,
    stream: Callable[[], tuple[StreamingGenerator, Tensor | None]],
    noise: Callable[[int, int], Tensor],
    decoder: Any = None,
) -> tuple[int, str, int, int]:
    """A session's cache in bytes and words, its decoder's features, and the most that its chunks take beside them."""
    generator, text = stream()
    cache = generator.cache
    before, live.peaks = live.now, {}
    generator.set_text(text)
    chunks = generator.chunks(noise, CHUNKS)
    for chunk in chunks:
        if decoder is not None:
            decoder.decode(chunk)
    kept = 0 if decoder is None else decoder.nbytes
    geometry = f"{cache.capacity_frames} frames of {cache.tokens_per_frame} tokens, {cache.layers} layers"
    geometry += ", in FP8" if cache.precision == "fp8" else ""
    return cache.nbytes, geometry, kept, max(live.peaks.values()) - before - kept


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What networks are made in: tensors without memory cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _bytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def of_run(weights: Path, sessions: int) -> Memory:
    """A run's, by its weights' folder."""
    from aadkern.wan import CausalWan

    stored = inspect(weights)
    run_facts = facts(weights)
    recipe = recipe_of(json.dumps(run_facts["recipe"]), weights / "run.json")
    sizes = recipe.data.sizes(recipe)
    with shapes_alone() as live:
        network = Denoiser(CausalWan.from_config(dict(stored.config)), stored.predicts).eval()
        frame = tuple(run_facts["frame"]) if sizes is None else sizes.frame
        text = None if sizes is None or sizes.text is None else torch.empty(1, *sizes.text)
        size = max(recipe.chunks)
        measured = _measured(
            live,
            lambda: (streaming(network, 1, frame, recipe.view, recipe.steps), text),
            lambda chunk, step: torch.empty(1, frame[0], size, *frame[1:]),
        )
        return Memory({"generator": _bytes(network)}, *measured, graphs=False, sessions=sessions)


def of_wan(parts: WanParts, settings: WanSettings, sessions: int) -> Memory:
    """A Wan model's, by its parts."""
    from diffusers import AutoencoderKLWan

    from aadkern.wan import CausalWan
    from aadkern.wan.text import TOKENS
    from aadkern.wan.tiny_vae import StreamingTinyDecoder, TinyDecoder
    from aadkern.wan.vae import StreamingDecoder

    device, dtype = settings.placement()
    config = transformer_config(parts, settings)
    encoder = text_encoder_bytes(parts, dtype)
    graphs = device.type == "cuda" if settings.cuda_graphs is None else settings.cuda_graphs
    with shapes_alone() as live, torch.device(device):
        with default_dtype(dtype):
            net: Any = CausalWan.from_config(config).eval()
            vae: Any = AutoencoderKLWan.from_config(read_json(parts.vae / "config.json")).eval()
            tiny = TinyDecoder() if settings.decoder == "tiny" else None
        channels, *sides = frame = latent_frame(parts, settings)
        text = torch.empty(1, TOKENS, config["text_dim"], dtype=dtype)
        measured = _measured(
            live,
            lambda: (wan_stream(net, frame, settings, False), text),
            lambda chunk, step: torch.empty(1, channels, settings.chunk_frames, *sides),
            StreamingDecoder(vae) if tiny is None else StreamingTinyDecoder(tiny),
        )
        weights = {"transformer": _bytes(net), "vae": _bytes(vae), "text encoder": encoder}
        if tiny is not None:
            weights["tiny decoder"] = _bytes(tiny)
    return Memory(weights, *measured, graphs=graphs, sessions=sessions)


def transformer_config(parts: WanParts, settings: WanSettings) -> dict[str, Any]:
    """The transformer's configuration, of a file as far as its weights tell it."""
    if parts.transformer.is_file():
        from aadkern.weights.checkpoints import infer_config, open_checkpoint

        config: dict[str, Any] = infer_config(open_checkpoint(parts.transformer).shapes)
    else:
        config = read_json(parts.transformer / "config.json")
    return config if settings.rope is None else {**config, "rope": settings.rope}


def text_encoder_bytes(parts: WanParts, dtype: torch.dtype) -> int:
    """The text encoder's weights, by its configuration."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5Config.from_pretrained(parts.text_encoder, local_files_only=True))
    return sum(parameter.numel() for parameter in encoder.parameters()) * dtype.itemsize
