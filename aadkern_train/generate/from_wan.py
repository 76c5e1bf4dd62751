"""Streaming a video from a causal Wan model in local folders: prompt and image in, an mp4 that grows chunk by chunk out."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from aadkern import SequenceGroup, StreamingCache, StreamingGenerator, Window
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.processes import Processes, start
from aadkern_train.engine.video import GrowingVideo, rgb_of
from aadkern_train.generate.prompts import changes
from aadkern_train.generate.ranks import sequence_of
from aadkern_train.generate.wan_decoder import check_decoder, decoders
from aadkern_train.generate.wan_settings import WanSettings, lora_of
from aadkern_train.networks.folders import facts
from aadkern_train.networks.rollout import turn_to
from aadkern_train.networks.wan_parts import FILES, WanParts, find_parts, load_part, transformer_shapes


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file as ``fitted_image`` makes it. Raises FileNotFoundError or ValueError for what is no image."""
    if not path.is_file():
        raise FileNotFoundError(f"image must be a file, found none at {path}")
    return fitted_image(path, size, str(path))


def fitted_image(file: Path | BinaryIO, size: tuple[int, int], name: str, formats: Sequence[str] | None = None) -> Tensor:
    """An image as [1, 3, H, W] in [-1, 1], scaled to cover ``size`` (rows, columns) and cropped to its centre; says so on
    stderr where that cuts something off. A rotation in the file is applied. ``formats``: Pillow's names of those accepted.

    Raises ValueError, which calls it ``name``, for what is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=formats) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = f": {error}" if isinstance(file, Path) else ""  # of what is no file it says where in memory that lies
        raise ValueError(f"image must be an image file, {name} is not{why}") from error
    rows, columns = size
    lost = 1 - min(image.width * rows, image.height * columns) / max(image.width * rows, image.height * columns)
    if lost > 0.005:
        _say(f"image: {image.height}x{image.width} scaled and cropped to {rows}x{columns}, which leaves out {lost:.0%} of it")
    fitted = ImageOps.fit(image, (columns, rows), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


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
    _say(f"prompt: {'; '.join(counts)}, embedded in {time.monotonic() - began:.1f} s; the text encoder is freed again")
    return texts


def prepare_model(parts: WanParts, settings: WanSettings) -> Any:
    """The transformer as a ``CausalWan``, ready to stream. What changes or compiles the model belongs here."""
    from aadkern import compat
    from aadkern.wan import CausalWan, lora
    from aadkern.wan.fp8 import quantise

    device, dtype = settings.placement()
    changes: dict[str, Any] = {} if settings.rope is None else {"rope": settings.rope}
    model: Any
    if parts.transformer.is_file():
        model = compat.load_model(parts.transformer, dtype=dtype, **changes)
    else:
        model = load_part(CausalWan, parts.transformer, dtype, **changes)
    for number, word in enumerate(settings.lora, 1):
        file, weight = lora_of(word)
        _say(f"lora: {lora.load(model, file, weight, name=f'{number} {file.stem}')!r}")
    lora.settle(model)  # before the GPU, which may have no room for the weights twice
    model = model.eval().requires_grad_(False).to(device)
    if settings.fp8:
        _say(str(quantise(model)))
    if settings.compile:
        model.compile_blocks()
    return model


@torch.no_grad()
def generate_wan(
    checkpoint: Path,
    out: Path,
    *,
    prompt: str | None,
    image: Path | None = None,
    parts: Path | None = None,
    settings: WanSettings | None = None,
) -> Path:
    """Stream a video from a causal Wan model and write it to ``out``, an mp4 that plays while it grows; returns ``out``.

    ``checkpoint`` and ``parts`` are ``find_parts``'s. With ``image`` the video starts from it, as a chunk of one latent frame;
    without, it is text to video. A line on stderr tells the seconds of each chunk. On Ctrl-C and on a full disk what is made so
    far stays as a file that plays, and the error is raised on.

    Under torchrun all processes share each frame's tokens (docs/scale.md), and the main one embeds, decodes and writes.

    Raises ValueError or FileNotFoundError, before any weights are loaded, for parts that are missing or do not fit, and for
    settings that they do not allow.
    """
    settings = settings or WanSettings()
    if out.suffix.lower() != ".mp4":
        raise ValueError(f"out must end in .mp4, which can grow, got {out}")
    settings.placement()
    if prompt is None:
        raise ValueError('prompt must be given for a Wan model (--prompt "" is the empty one)')
    found = fitting_parts(checkpoint, parts, settings)
    device, dtype = settings.placement()
    rows, columns = (found.pixels * side for side in found.patch)
    tokens = settings.size[0] // rows * (settings.size[1] // columns)
    with start(device.type) as processes, sequence_of(processes, tokens) as group:
        pixels = None if image is None or not processes.is_main else read_image(image, settings.size)
        video = GrowingVideo(out, settings.fps) if processes.is_main else None
        later = changes(settings.then, settings.chunks)
        prompts = [prompt, *later.values()]
        text, *others = processes.on_main(lambda: embed_prompts(found, prompts, device, dtype, kept="cpu"))
        streamer = WanStreamer(found, settings, processes, group)
        streamer.write(video, text, settings.seed, pixels=pixels, later=dict(zip(later, others, strict=True)))
    return out


def fitting_parts(checkpoint: Path, parts: Path | None, settings: WanSettings) -> WanParts:
    """``find_parts``, where settings and what is installed allow to stream them. Raises ValueError or FileNotFoundError."""
    from aadkern.wan import lora_file

    if importlib.util.find_spec("transformers") is None:
        raise ValueError("prompt needs transformers: pip install 'aadkern[wan]'")
    if not checkpoint.exists():
        raise FileNotFoundError(f"checkpoint must be a Wan folder, {FILES}, found nothing at {checkpoint}")
    found = find_parts(checkpoint, parts)
    predicts = facts(found.transformer).get("predicts", "flow")
    if predicts != "flow":
        raise ValueError(f"transformer must predict the flow, {found.transformer} predicts {predicts!r}")
    rows, columns = (found.pixels * side for side in found.patch)
    height, width = settings.size
    if min(settings.size) < 1 or height % rows or width % columns:
        raise ValueError(f"size must be rows x columns, multiples of {rows} and {columns}, got {height}x{width}")
    check_decoder(found, settings)
    for word in settings.lora:
        lora_file.read_lora(lora_of(word)[0], transformer_shapes(found.transformer))
    return found


def latent_frame(parts: WanParts, settings: WanSettings) -> tuple[int, int, int]:
    """(C, H, W) of a latent frame."""
    height, width = (side // parts.pixels for side in settings.size)
    return parts.channels, height, width


def wan_stream(model: Any, frame: tuple[int, int, int], settings: WanSettings, cuda_graphs: bool) -> StreamingGenerator:
    """A stream of a model's, with a cache of its own."""
    window, most = Window(settings.window, sink=settings.sink), settings.chunk_frames
    cache = StreamingCache.for_model(model, 1, *frame[1:], window, max_chunk_frames=most, merged=True, precision=settings.kv_cache)
    levels: dict[str, Any] = {"levels": settings.steps, "first_levels": settings.first_steps}
    return StreamingGenerator(model, cache, cuda_graphs=cuda_graphs, **levels)


def wan_noise(seed: int, frame: tuple[int, int, int], size: int, device: torch.device) -> Callable[[int, int], Tensor]:
    """The noise of a stream's chunks of ``size`` latent frames, as ``StreamingGenerator`` takes it."""
    draws, (channels, height, width) = Draws(seed, "generate"), frame

    def noise(chunk: int, step: int) -> Tensor:
        return draws.normal(f"noise {chunk} {step}", [0], (channels, size, height, width), device)

    return noise


class WanStreamer:
    """A transformer and its VAE, loaded once, that stream one video after another: each as if it were the first."""

    def __init__(
        self, parts: WanParts, settings: WanSettings, processes: Processes | None = None, group: SequenceGroup | None = None
    ) -> None:
        """``group``: what ``processes`` share each frame's tokens in, the main one of which alone encodes, decodes and writes."""
        from diffusers import AutoencoderKLWan

        device, dtype = settings.placement()
        self.settings = settings
        self._processes = processes
        self._vae: Any = None
        self._decoder: Any = None
        if processes is None or processes.is_main:
            self._vae = load_part(AutoencoderKLWan, parts.vae, dtype).eval().to(device)
            self._decoder = decoders(parts, settings, self._vae)()
        model = prepare_model(parts, settings)
        model.sequence = group
        self._device = device
        self._frame = latent_frame(parts, settings)
        # Collectives within a graph are not tried yet: only where they are asked for.
        graphs = device.type == "cuda" and group is None if settings.cuda_graphs is None else settings.cuda_graphs
        self._generator = wan_stream(model, self._frame, settings, graphs)

    @torch.no_grad()
    def write(
        self,
        video: GrowingVideo | None,
        text: Tensor,
        seed: int,
        *,
        pixels: Tensor | None = None,
        later: Mapping[int, Tensor] | None = None,
    ) -> None:
        """Stream a video from the embedded prompt ``text`` and those that take over ``later``, by chunk, into ``video``, which is
        whole in the end even where Ctrl-C or a full disk ends it; both are raised on. ``pixels`` [1, 3, H, W] in [-1, 1]: the
        image that it starts from, as a chunk of one latent frame. A line on stderr tells the seconds of each chunk. ``video`` None:
        of processes that share the work, one that does not write."""
        from aadkern.wan.vae import encode_image

        def encoded() -> Tensor | None:
            return None if pixels is None else encode_image(self._vae, pixels).cpu()

        first = encoded() if self._processes is None else self._processes.on_main(encoded)
        first = None if first is None else first.to(self._device)
        self._generator.reset()
        self._generator.set_text(text.to(self._device))
        later = {chunk: other.to(self._device) for chunk, other in (later or {}).items()}
        latents = self._latents(first, later, seed)
        if video is None:  # another process writes
            deque(latents, maxlen=0)
            return
        self._decoder.reset()
        _write(latents, self._decoder, first, video, self.settings.chunks)

    def _latents(self, first: Tensor | None, later: Mapping[int, Tensor], seed: int) -> Iterator[Tensor]:
        """The latents of each chunk [1, C, f, h, w]."""
        settings, noise = self.settings, wan_noise(seed, self._frame, self.settings.chunk_frames, self._device)
        for count in range(1, settings.chunks + 1):
            if count in later:
                turn_to(self._generator, later[count], settings.turn)
            yield from self._generator.chunks(noise, 1, first_frame=first if count == 1 else None)


def _write(stream: Iterator[Tensor], decoder: Any, first: Tensor | None, video: GrowingVideo, chunks: int) -> None:
    """Decode each chunk as it is made and append it to the video, telling how long it took."""
    count, stopped = 0, None
    with video:
        try:
            if first is not None:
                video.write(rgb_of(decoder.decode(first)))
            for count in range(1, chunks + 1):
                began = time.monotonic()
                latents = next(stream)
                if latents.device.type == "cuda":
                    torch.cuda.synchronize(latents.device)
                made = time.monotonic()
                frames = rgb_of(decoder.decode(latents))
                decoded = time.monotonic()
                video.write(frames)
                seconds = time.monotonic() - began
                share = (decoded - made) / seconds
                rate = f"{seconds:.2f} s ({share:.0%} of it decoding), {len(frames) / seconds:.1f} frames a second"
                print(f"\rchunk {count}/{chunks}: {rate}   ", end="", file=sys.stderr, flush=True)
        except (KeyboardInterrupt, OSError) as error:
            stopped = error
    if count:
        print(file=sys.stderr)
    if stopped is not None:
        _say(f"stopped in chunk {count or 1}; {video.holds()}")
        raise stopped
    _say(f"{video.path}: {video.count} frames, {video.count / float(video.rate):.1f} s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
