"""The contenders of the streaming benchmark at Wan's sizes: one after another on the same weights, each timed only once its video
agrees with that of the lineage's protocol."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import aadkern
from aadkern import StreamingGenerator, runtime
from aadkern.streaming.graphs import PassGraphs
from aadkern.wan.fp8 import quantise
from aadkern.wan.vae import StreamingDecoder
from benchmarks.streaming_lineage import ClonedCache, lineage, sdpa
from benchmarks.streaming_shapes import LEVELS, PIXEL_FRAMES, VAE_FRAME_FLOPS, WINDOW, Size, floor_seconds, model_of, vae_of

# Two right videos in bf16 differ by 0.007 to 0.009 (8 and 30 layers of 256 channels, 64 and 16 tokens a frame, on a CPU), by 0.11
# or more where the sink is not seen or not kept; what that costs does not depend on the tokens of a frame (16 to 484).
MOST_DIFFERENCE = 0.05
MOST_FP8_DIFFERENCE = 0.5  # its error is stated, not judged: only what is no such video is refused
LEAST_SECONDS = 2.0  # of timed chunks
SM90_VERIFIED = runtime.VERIFIED["sm90"]

# Operators by name, with part of their names; whatever is none of these is "rest".
PARTS = {"attention": ("range_attention", "scaled_dot_product", "attention_forward"), "linear": ("mm", "linear")}

Start = Callable[[], Iterator[Tensor]]


class Way(NamedTuple):
    """How a video is made: by the lineage's protocol, or by StreamingGenerator."""

    ours: bool = True
    merged: bool = True
    graphs: bool = False
    compiled: bool = False
    fp8: bool = False
    cudnn: bool = False
    sm90: bool = False


WAYS = {
    "lineage": Way(ours=False),
    "lineage, cuDNN": Way(ours=False, cudnn=True),
    "two passes": Way(merged=False),
    "merged": Way(),
    "merged + graphs": Way(graphs=True),
    "merged + graphs, sm90": Way(graphs=True, sm90=True),
    "merged + compile": Way(compiled=True),
    "merged + compile + graphs": Way(compiled=True, graphs=True),
    "merged + FP8": Way(fp8=True),
    "merged + FP8 + graphs": Way(fp8=True, graphs=True),
    "merged + FP8 + compile + graphs": Way(compiled=True, fp8=True, graphs=True),
}
# What videos are compared with, and what tells how far rounding alone takes a right one from it.
REFERENCES = ("lineage", "two passes")


class WrongVideo(Exception):
    """A contender's video is not that of the lineage's protocol; it is not timed."""


class Missing(Exception):
    """The contender cannot be had here; the message says why."""


def difference(video: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference of a latent frame [B, C, H, W], in terms of the other's size, while both last."""

    def of(a: Tensor, b: Tensor) -> float:
        a, b = (x.double().transpose(1, 2).flatten(2) for x in (a, b))
        return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()

    errors = [of(a, b) for a, b in zip(video, other, strict=False)]
    return max(errors) if all(error == error for error in errors) else float("nan")


class Bench:
    """One size on one device: the model, its inputs, and the warm-up videos that others are compared with."""

    def __init__(self, size: Size, device: torch.device, seed: int = 0) -> None:
        self.size, self.device, self.seed = size, device, seed
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model: Any = None
        self.state: tuple[bool, bool] | None = None  # compiled, FP8
        self.fp8: dict[str, str] = {}  # what the conversion says of its error
        self.graphs: PassGraphs | None = None  # of the contender started last
        self.videos: dict[tuple[str, int], list[Tensor]] = {}
        torch.manual_seed(seed + 1)
        shape = (1, 16, size.chunk, size.height, size.width)
        self.noises = [torch.randn(shape, device=device, dtype=self.dtype) for _ in range(5)]
        self.first = torch.randn(1, 16, 1, *shape[3:], device=device, dtype=self.dtype)
        self.text = torch.randn(1, size.text_tokens, size.text_dim, device=device, dtype=self.dtype)

    def noise(self, chunk: int, step: int) -> Tensor:
        return self.noises[(chunk + step) % len(self.noises)]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prepare(self, way: Way) -> None:
        """The model as the way needs it. What cannot be undone is built anew: the seed gives the same weights."""
        if way.sm90 and (reason := aadkern.backends(self.device.type)["sm90"]) != runtime.AVAILABLE:
            raise Missing(reason)
        runtime.VERIFIED["sm90"] = ("this benchmark",) if way.sm90 else SM90_VERIFIED  # what "auto" asks
        wanted = (way.compiled, way.fp8)
        if self.state == wanted:
            return
        self.model, self.state, self.fp8 = None, None, {}
        release()
        self.model = model_of(self.size, self.device, self.dtype, self.seed)
        if way.fp8:
            self.fp8 = {"fp8_report": str(quantise(self.model))}
        if way.compiled:
            self.model.compile_blocks()
        self.state = wanted

    def start(self, way: Way, nfe: int) -> Start:
        """What begins the video anew at every call: chunks of latents without end."""
        if self.device.type != "cuda" and (way.graphs or way.cudnn):
            raise Missing("needs a CUDA device")
        self.graphs = None  # and their memory
        self.prepare(way)
        size, model = self.size, self.model
        if not way.ours:
            attend = cudnn if way.cudnn else sdpa
            cache: Any = ClonedCache(model, 1, size.height, size.width, WINDOW, attend)
            with torch.no_grad():
                text = model.text_cache(self.text)
            return lambda: lineage(model, cache, self.noise, self.first, text, LEVELS[nfe])
        cache = model.new_cache(1, size.height, size.width, WINDOW, max_chunk_frames=size.chunk, merged=way.merged)
        options: dict[str, Any] = {"cuda_graphs": True} if way.graphs else {}
        generator = StreamingGenerator(model, cache, levels=LEVELS[nfe], text=self.text, **options)
        self.graphs = generator.graphs

        def begin() -> Iterator[Tensor]:
            generator.reset()
            return generator.chunks(self.noise, first_frame=self.first)

        return begin

    def warm(self, name: str, nfe: int, start: Start | None = None) -> tuple[Iterator[Tensor], list[Tensor]]:
        """A contender's video until everything about it is steady: the rest of it, and the chunks so far.

        A graph is captured when its phase of the ring comes for the second time. So that the third, a replay, is compared too,
        what is compared with lasts as long.
        """
        way = WAYS[name]
        turns = 3 if way.graphs or name in REFERENCES else 1
        video = (start or self.start(way, nfe))()
        chunks = [chunk.clone() for chunk in islice(video, self.size.warm_chunks(turns))]
        self.wait()
        return video, chunks

    def video(self, name: str, nfe: int) -> list[Tensor]:
        """The warm-up chunks of a contender that others are compared with; made if it has not run yet."""
        if (name, nfe) not in self.videos:
            self.videos[name, nfe] = self.warm(name, nfe)[1]
            release()
        return self.videos[name, nfe]

    def judge(self, name: str, nfe: int, chunks: list[Tensor]) -> dict[str, float]:
        """How far a video is from the lineage's, and what is allowed: in terms of a latent frame, twice the distance of two plain
        passes, since that is rounding alone. Raises ``WrongVideo``."""
        way, allowed = WAYS[name], MOST_DIFFERENCE
        if way.fp8:
            allowed = MOST_FP8_DIFFERENCE
        elif nfe == 1 and name not in REFERENCES:
            plain = difference(self.video("two passes", 1), self.video("lineage", 1))
            allowed = min(allowed, 2 * plain + torch.finfo(self.dtype).eps / 4)
        error = 0.0 if name == "lineage" else difference(chunks, self.video("lineage", nfe))
        if not error <= allowed:
            raise WrongVideo(f"a latent frame differs from the lineage's by {error:.2%} of its size, allowed {allowed:.2%}")
        return {"difference": error, "allowed": allowed}

    def timed(self, video: Iterator[Tensor], then: Callable[[Tensor], object] = lambda chunk: None) -> list[float]:
        """Seconds of each chunk, until it and what is done with it are finished on the device: whole turns of the ring."""
        seconds: list[float] = []
        while len(seconds) < 2 * self.size.phases or (sum(seconds) < LEAST_SECONDS and len(seconds) < 8 * self.size.phases):
            for _ in range(self.size.phases):
                began = time.perf_counter()
                then(next(video))
                self.wait()
                seconds.append(time.perf_counter() - began)
        return seconds

    def contender(self, name: str, nfe: int) -> dict[str, Any]:
        """Check it, then time it. Raises ValueError for a name that is none of ``WAYS``."""
        if name not in WAYS:
            raise ValueError(f"contender must be one of {'; '.join(WAYS)}, got {name!r}")
        for other in REFERENCES[: REFERENCES.index(name)] if name in REFERENCES else REFERENCES[: 2 if nfe == 1 else 1]:
            self.video(other, nfe)  # now, as it may need the model in another state
        start = self.start(WAYS[name], nfe)
        peak = self.peak()
        video, chunks = self.warm(name, nfe, start)
        peak_bytes = peak()
        if name in REFERENCES:
            self.videos[name, nfe] = chunks
        checked = self.judge(name, nfe, chunks)
        seconds = self.timed(video)
        if WAYS[name].graphs and not self.graphs:  # PassGraphs warns and goes on without, where a capture fails
            raise RuntimeError("no CUDA graph was captured")
        first = 1e3 * self.first_chunk(start)
        return {**checked, **self.fp8, **self.rates(seconds, nfe), "first_chunk_ms": first, "peak_bytes": peak_bytes}

    def peak(self) -> Callable[[], int | None]:
        """Begins to note the most memory in use, the weights and all; what is returned tells it. None where it is not counted."""
        if self.device.type != "cuda":
            return lambda: None
        torch.cuda.reset_peak_memory_stats(self.device)
        return lambda: torch.cuda.max_memory_allocated(self.device)

    def first_chunk(self, start: Start) -> float:
        """Median seconds from an empty cache, the clean first frame and the text's keys and values to the first chunk."""
        taken = []
        for _ in range(3):
            video = start()
            self.wait()
            began = time.perf_counter()
            next(video)
            self.wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    def rates(self, seconds: list[float], nfe: int) -> dict[str, Any]:
        """Milliseconds a chunk, pixel frames a second, and the share of the floor."""
        median = statistics.median(seconds)
        share = floor_seconds(self.size, nfe) / median if self.device.type == "cuda" else None
        rounds = [round(1e3 * one, 4) for one in seconds]
        return {
            "ms_per_chunk": 1e3 * median,
            "fps": PIXEL_FRAMES * self.size.chunk / median,
            "floor_share": share,
            "rounds_ms": rounds,
        }

    def vae(self, name: str) -> dict[str, Any]:
        """The VAE's time, and the rates of contender ``name`` with each chunk decoded before the next is begun."""
        vae = vae_of(self.size, self.device, self.dtype)
        decoder = StreamingDecoder(vae)
        with torch.no_grad():
            video, _ = self.warm(name, 1)
            decoder.decode(self.first)
            latents = [next(video).clone() for _ in range(2)]
            for chunk in latents:
                pixels = decoder.decode(chunk)
            expected = PIXEL_FRAMES * self.size.chunk
            if pixels.shape[2] != expected or not bool(pixels.isfinite().all()):
                raise WrongVideo(f"a decoded chunk must be {expected} finite frames, got {list(pixels.shape)}")
            self.wait()
            alone = statistics.median(self.timed(repeat(latents[0]), decoder.decode))
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # cuDNN tries its convolutions out
                decoder.decode(latents[0])
                tuned = statistics.median(self.timed(repeat(latents[0]), decoder.decode))
            peak = self.peak()
            together = self.timed(video, decoder.decode)
        figures = {
            "contender": name,
            "vae_ms_per_chunk": 1e3 * alone,
            "vae_tuned_ms_per_chunk": 1e3 * tuned,
            "peak_bytes": peak(),
            **self.rates(together, 1),
        }
        rate = None if self.size.vae_width else self.size.chunk * VAE_FRAME_FLOPS / alone / 1e12
        return {**figures, "vae_tflops": rate, "pixels": list(pixels.shape)}

    def split(self, name: str) -> dict[str, Any]:
        """Where the time of an eager contender goes, by CUDA events around its products and its attention in a run of their own;
        the rest (norms, rotary positions, gates, copies, waiting) is what is left of a chunk timed without them."""
        video, _ = self.warm(name, 1)
        whole = statistics.median(self.timed(video))
        chunks = []
        for _ in range(2 * self.size.phases):
            with Parts(self.device) as parts:
                next(video)
            self.wait()
            chunks.append(parts.milliseconds())
        milliseconds = {part: statistics.median(chunk[part] for chunk in chunks) for part in PARTS}
        return {"ms_per_chunk": 1e3 * whole, **milliseconds, "rest": 1e3 * whole - sum(milliseconds.values())}


class Parts(TorchDispatchMode):
    """Adds up the time of matrix products and of attention, by the operators' names."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.marks: dict[str, list[tuple[Any, Any]]] = {part: [] for part in PARTS}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        part = next((part for part, words in PARTS.items() if any(word in name for word in words)), None)
        if part is None:
            return func(*args, **(kwargs or {}))
        first = self._mark()
        output = func(*args, **(kwargs or {}))
        self.marks[part].append((first, self._mark()))
        return output

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self) -> dict[str, float]:
        """Of each part, once the device has finished."""
        cuda = self.device.type == "cuda"
        return {part: sum(a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairs) for part, pairs in self.marks.items()}


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on cuDNN, which is fast where the lineage's own choice falls to FlashAttention 2."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q, k, v)


def release() -> None:
    """Give the device's unused memory back, so that a peak is of the contender at hand."""
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()
