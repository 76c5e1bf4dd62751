"""Streaming a video from a causal Wan model in local folders: prompt and image in, an mp4 that grows chunk by chunk out."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern import StreamingCache, StreamingGenerator, Window
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.processes import start
from aadkern_train.engine.video import GrowingVideo
from aadkern_train.generate.prompts import changes
from aadkern_train.generate.ranks import sequence_of
from aadkern_train.generate.wan_parts import WanParts, find_parts
from aadkern_train.networks.rollout import TURNS, turn_to

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_STEPS = 100


@dataclass(frozen=True)
class WanSettings:
    """How to stream. Frames of ``chunk_frames``, ``window`` and ``sink`` are latent frames, of four video frames each; the defaults
    are what Self-Forcing's models were trained with, but for ``steps``.

    ``size`` is (rows, columns) of pixels. ``steps`` and ``first_steps`` (None: the same) are noise levels as ``noise_levels``
    makes them. ``rope`` None: the checkpoint's. ``device`` None: the GPU if there is one. ``dtype`` None: bf16 on a GPU, fp32
    on a CPU. ``fp8`` quantises the large linear layers (docs/fp8.md), ``compile`` runs the blocks through torch.compile, and
    ``cuda_graphs`` (None: on a GPU) replays passes (docs/streaming.md). ``then`` and ``turn`` are prompts that take over on the
    way (``prompts.changes``, ``TURNS``).
    """

    chunks: int = 7
    chunk_frames: int = 3
    window: int = 21
    sink: int = 1
    steps: tuple[float, ...] = (1.0,)
    first_steps: tuple[float, ...] | None = None
    rope: str | None = None
    size: tuple[int, int] = (480, 832)
    fps: float = 16.0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    fp8: bool = False
    compile: bool = False
    cuda_graphs: bool | None = None
    then: Sequence[str] = ()
    turn: str = "kept"

    def __post_init__(self) -> None:
        changes(self.then, self.chunks)
        if self.turn not in TURNS:
            raise ValueError(f"turn must be one of {', '.join(TURNS)}, got {self.turn!r}")
        for name in ("chunks", "chunk_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sink < 0:
            raise ValueError(f"sink must be at least 0, got {self.sink}")
        least = self.sink + self.chunk_frames
        if self.window < least:
            raise ValueError(f"window must be at least {least}, to hold the sink and a chunk, got {self.window}")
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype to run with. Raises ValueError for a device that is not there."""
        found = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(self.device or found)
        except RuntimeError as error:
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}") from error
        if device.type not in ("cpu", found):
            raise ValueError(f"device must be cpu: torch finds no {device.type} device here, got {self.device!r}")
        if self.cuda_graphs and device.type != "cuda":
            raise ValueError(f"cuda_graphs must be left out on {device}: they need a GPU")
        return device, DTYPES[self.dtype or ("bf16" if device.type == "cuda" else "fp32")]


def noise_levels(steps: str, shift: float = 5.0) -> tuple[float, ...]:
    """Noise levels from a count ("4") or a falling list of timesteps ("1000,750,500,250"), both shifted: s -> shift s / (1 +
    (shift - 1) s).

    A count means timesteps evenly spaced from 1000. "4" and shift 5 give Self-Forcing's levels 1, 0.9375, 0.8333, 0.625. Raises
    ValueError naming ``steps`` or ``shift``.
    """
    wanted = f'steps must be a count of 1 to {MAX_STEPS} or falling timesteps in (0, 1000], say "1000,750,500,250", got {steps!r}'
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be above 0 and finite, got {shift}")
    try:
        if "," not in steps:
            count = int(steps)
            times = [1 - i / count for i in range(count)] if 1 <= count <= MAX_STEPS else []
        else:
            times = [float(word) / 1000 for word in steps.split(",")]
    except ValueError:
        raise ValueError(wanted) from None
    if not times or not all(0 < s <= 1 for s in times) or any(a <= b for a, b in itertools.pairwise(times)):
        raise ValueError(wanted)
    return tuple(shift * s / (1 + (shift - 1) * s) for s in times)


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file as [1, 3, H, W] in [-1, 1], scaled to cover ``size`` (rows, columns) and cropped to its centre; says so on
    stderr where that cuts something off. A rotation in the file is applied.

    Raises FileNotFoundError or ValueError for what is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if not path.is_file():
        raise FileNotFoundError(f"image must be a file, found none at {path}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image must be an image file, {path} is not: {error}") from error
    rows, columns = size
    lost = 1 - min(image.width * rows, image.height * columns) / max(image.width * rows, image.height * columns)
    if lost > 0.005:
        _say(f"image: {image.height}x{image.width} scaled and cropped to {rows}x{columns}, which leaves out {lost:.0%} of it")
    fitted = ImageOps.fit(image, (columns, rows), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


def embed_prompts(parts: WanParts, prompts: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Each prompt's embedding [1, 512, text_dim]. The text encoder, 11 GB for Wan in bf16, is loaded for them and freed again."""
    from aadkern.wan.text import TOKENS, embed, load_text_encoder, token_ids

    ids = [token_ids(parts.tokenizer, prompt) for prompt in prompts]
    began = time.monotonic()
    encoder = load_text_encoder(parts.text_encoder, dtype, device)
    texts = [embed(encoder, tokens) for tokens in ids]
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    counts = [f"{len(tokens)} tokens" + (", the most there can be" if len(tokens) == TOKENS else "") for tokens in ids]
    _say(f"prompt: {'; '.join(counts)}, embedded in {time.monotonic() - began:.1f} s; the text encoder is freed again")
    return texts


def prepare_model(parts: WanParts, settings: WanSettings) -> Any:
    """The transformer as a ``CausalWan``, ready to stream. What changes or compiles the model belongs here."""
    from aadkern import compat
    from aadkern.wan import CausalWan
    from aadkern.wan.fp8 import quantise

    device, dtype = settings.placement()
    changes: dict[str, Any] = {} if settings.rope is None else {"rope": settings.rope}
    model: Any
    if parts.transformer.is_file():
        model = compat.load_model(parts.transformer, dtype=dtype, **changes)
    else:
        model = load_part(CausalWan, parts.transformer, dtype, **changes)
    model = model.eval().requires_grad_(False).to(device)
    if settings.fp8:
        _say(str(quantise(model)))
    if settings.compile:
        model.compile_blocks()
    return model


def load_part(kind: Any, folder: Path, dtype: torch.dtype, **changes: Any) -> Any:
    """A model of diffusers' from its folder, on the CPU.

    Raises ValueError where weights are missing: diffusers would draw them at random.
    """
    model, loading = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True, **changes)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(f"{folder.name} must hold all its weights; {folder} lacks {', '.join(missing[:3])}")
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
    device, dtype = settings.placement()
    if prompt is None:
        raise ValueError('prompt must be given for a Wan model (--prompt "" is the empty one)')
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("prompt needs transformers: pip install 'aadkern[wan]'")
    found = find_parts(checkpoint, parts)
    rows, columns = (found.pixels * side for side in found.patch)
    height, width = settings.size
    if min(settings.size) < 1 or height % rows or width % columns:
        raise ValueError(f"size must be rows x columns, multiples of {rows} and {columns}, got {height}x{width}")
    tokens = height // rows * (width // columns)

    from diffusers import AutoencoderKLWan

    from aadkern.wan.vae import StreamingDecoder, encode_image

    later = changes(settings.then, settings.chunks)
    with start(device.type) as processes, sequence_of(processes, tokens) as group:
        pixels = None if image is None or not processes.is_main else read_image(image, settings.size)
        video = GrowingVideo(out, settings.fps) if processes.is_main else None
        vae: Any = None

        def conditions() -> tuple[list[Tensor], Tensor | None]:
            nonlocal vae
            texts = embed_prompts(found, [prompt, *later.values()], device, dtype)
            vae = load_part(AutoencoderKLWan, found.vae, dtype).eval().to(device)
            first = None if pixels is None else encode_image(vae, pixels)
            if group is None:
                return texts, first
            return [text.cpu() for text in texts], None if first is None else first.cpu()

        texts, first = processes.on_main(conditions)
        text, *others = (text.to(device) for text in texts)
        first = None if first is None else first.to(device)
        model = prepare_model(found, settings)
        model.sequence = group
        frame = (found.channels, height // found.pixels, width // found.pixels)
        stream = _stream(model, text, dict(zip(later, others, strict=True)), first, settings, frame)
        if video is None:
            deque(stream, maxlen=0)
        else:
            _write(stream, StreamingDecoder(vae), first, video, settings.chunks)
    return out


def _stream(
    model: Any, text: Tensor, later: dict[int, Tensor], first: Tensor | None, settings: WanSettings, frame: tuple[int, int, int]
) -> Iterator[Tensor]:
    """The latents of each chunk [1, C, f, h, w], from the prompt ``text`` and those that take over ``later``, by chunk."""
    channels, height, width = frame
    draws = Draws(settings.seed, "generate")

    def noise(chunk: int, step: int) -> Tensor:
        return draws.normal(f"noise {chunk} {step}", [0], (channels, settings.chunk_frames, height, width), text.device)

    window = Window(settings.window, sink=settings.sink)
    cache = StreamingCache.for_model(model, 1, height, width, window, max_chunk_frames=settings.chunk_frames, merged=True)
    # Collectives within a graph are not tried yet: only where they are asked for.
    graphs = text.is_cuda and model.sequence is None if settings.cuda_graphs is None else settings.cuda_graphs
    levels = {"levels": settings.steps, "first_levels": settings.first_steps}
    generator = StreamingGenerator(model, cache, text=text, cuda_graphs=graphs, **levels)
    for count in range(1, settings.chunks + 1):
        if count in later:
            turn_to(generator, later[count], settings.turn)
        yield from generator.chunks(noise, 1, first_frame=first if count == 1 else None)


def _write(stream: Iterator[Tensor], decoder: Any, first: Tensor | None, video: GrowingVideo, chunks: int) -> None:
    """Decode each chunk as it is made and append it to the video, telling how long it took."""
    count, stopped = 0, None
    with video:
        try:
            if first is not None:
                video.write(_uint8(decoder.decode(first)))
            for count in range(1, chunks + 1):
                began = time.monotonic()
                latents = next(stream)
                if latents.device.type == "cuda":
                    torch.cuda.synchronize(latents.device)
                made = time.monotonic()
                frames = _uint8(decoder.decode(latents))
                decoded = time.monotonic()
                video.write(frames)
                seconds = time.monotonic() - began
                share = (decoded - made) / seconds
                rate = f"{seconds:.2f} s ({share:.0%} of it VAE), {len(frames) / seconds:.1f} frames a second"
                print(f"\rchunk {count}/{chunks}: {rate}   ", end="", file=sys.stderr, flush=True)
        except (KeyboardInterrupt, OSError) as error:
            stopped = error
    if count:
        print(file=sys.stderr)
    if stopped is not None:
        _say(f"stopped in chunk {count or 1}; {video.holds()}")
        raise stopped
    _say(f"{video.path}: {video.count} frames, {video.count / float(video.rate):.1f} s")


def _uint8(pixels: Tensor) -> Tensor:
    """Pixels [1, 3, F, H, W] in [-1, 1] as uint8 frames [F, H, W, 3] on the CPU."""
    return pixels[0].float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
