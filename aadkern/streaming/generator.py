"""Endless generation chunk by chunk in constant memory, with one forward a chunk where one denoising step is enough."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aadkern.checks import boolean, choice, real, shown, tensor, whole
from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.graphs import PassGraphs

Noise = Callable[[int, int], Tensor]
Source = Callable[[int], Tensor]
After = Callable[[int, int, float, Tensor], "Tensor | None"]

PREDICTS = ("flow", "x0")


class StreamingGenerator:
    """Streams a video from a causal model: chunks of latents, each yielded as soon as it is made.

    ::

        cache = model.new_cache(1, 60, 104, Window(9, sink=1), max_chunk_frames=4, merged=True)
        generator = StreamingGenerator(model, cache, text=prompt_embeddings)
        noise = lambda chunk, step: torch.randn(1, 16, 4, 60, 104, device="cuda")
        decoder = aadkern.wan.vae.StreamingDecoder(vae)
        show(decoder.decode(image_latent))
        for chunk in generator.chunks(noise, first_frame=image_latent):  # endless
            show(decoder.decode(chunk))

    ``model`` is a ``CausalWan``, or any callable with its forward's arguments and, if text is given, its ``text_cache``.
    ``cache`` is empty and fits it. ``levels`` are the falling noise levels, in (0, 1], of a chunk's denoising passes and
    ``first_levels`` those of the first generated chunk (None: the same). ``predicts``: the model's output is "flow" (eps -
    x0) or "x0". ``text`` [B, T, text_dim] or None: its cross-attention keys and values are computed once. ``cuda_graphs``: passes
    are replayed from CUDA graphs once the ring has come round (``PassGraphs``), which spares the launches; GPUs only.
    ``inference_mode``: run under ``torch.inference_mode``, which spares a seventh of a small model's time on a CPU; False is
    ``torch.no_grad``. A model that FSDP shards wants that, and to be given as a function around its forward, without text. After
    changing weights in place, ``reset`` and ``set_text``: noise levels and text are embedded once. A change that the model counts
    in ``weights_version``, as LoRA's, is seen before the next chunk, which makes these anew.

    A chunk costs len(levels) passes, and one that writes its clean keys and values for later chunks; a cache made with
    ``merged=True`` has the latter done within the next chunk's first pass, with the same result.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        cache: StreamingCache,
        *,
        levels: Sequence[float] = (1.0,),
        first_levels: Sequence[float] | None = None,
        predicts: str = "flow",
        text: Tensor | None = None,
        cuda_graphs: bool = False,
        inference_mode: bool = True,
    ) -> None:
        if not callable(model) or isinstance(model, type):
            raise TypeError(f"model must be callable as a CausalWan is, got {shown(model)}")
        if not isinstance(cache, StreamingCache):
            raise TypeError(f"cache must be a StreamingCache, got {type(cache).__name__}")
        if cache.frame:
            raise ValueError(f"cache must be empty, got one at frame {cache.frame}: reset() it")
        choice(predicts, "predicts", PREDICTS)
        boolean(cuda_graphs, "cuda_graphs")
        boolean(inference_mode, "inference_mode")
        if cuda_graphs and cache.keys.device.type != "cuda":
            raise ValueError(f"cuda_graphs must be False for a cache on {cache.keys.device}, got {cuda_graphs}")
        self.model, self.cache, self.predicts = model, cache, predicts
        self._without_gradient = torch.inference_mode if inference_mode else torch.no_grad
        self._kept: list[tuple[int, Tensor]] = []  # the chunks in view, clean, and where each starts
        self._clean: Tensor | None = None  # the last chunk, whose clean keys and values are still to be written
        self._options: dict[str, Any] = {"cache": cache, "graphs": PassGraphs()} if cuda_graphs else {"cache": cache}
        self._times: dict[tuple[tuple[int, float], ...], Any] = {}
        self._levels = _falling("levels", levels)
        self._first_levels = self._levels if first_levels is None else _falling("first_levels", first_levels)
        self.reset()
        self.set_text(text)

    def set_text(self, text: Tensor | None, *, recache: bool = False, restart: bool = False) -> None:
        """From the next chunk on, generate from this text [B, T, text_dim]. What was made stays in view as it was made.

        With ``recache`` the keys and values of the chunks in view are made anew under this text, so that the video turns to it
        sooner: as LongLive's KV-recache, but chunk by chunk, each seeing the sink, made anew too, and the chunks in view before
        it. That costs a pass for each. A text that is given again, even the same one, costs the next chunk its merged pass.

        With ``restart`` the last frame made becomes the first frame of a video of its own, so that nothing in view speaks for the
        old text: the next chunk obeys at once, under ``first_levels``, and what lay before that frame is forgotten. Chunks go on
        being counted. Where a latent frame holds several video frames it is a frame in the middle of a video that now starts one.

        Raises ValueError, having changed nothing, for a text of another batch, for ``recache`` with ``restart``, and with
        ``recache`` for chunks of unequal sizes of which the ring has not kept all that are in view.
        """
        boolean(recache, "recache")
        boolean(restart, "restart")
        if recache and restart:
            raise ValueError("recache must be False with restart, which leaves nothing in view to make anew")
        if text is not None:
            tensor(text, "text")
        if text is not None and (text.dim() != 3 or text.shape[0] != self.cache.batch):
            raise ValueError(f"text must be [{self.cache.batch}, T, text_dim] for this cache, got {list(text.shape)}")
        if text is not None and not hasattr(self.model, "text_cache"):
            raise TypeError(f"text must be None for a model without text_cache, as {type(self.model).__name__} is")
        oldest, kept = self._in_view() if recache else (0, [])
        with self._without_gradient():
            try:
                self._text: Any = None if text is None else self.model.text_cache(text)  # type: ignore[attr-defined]
            except (ValueError, TypeError) as error:
                raise type(error)(f"text must be what the model's text_cache takes: {error}") from error
            here = self.cache.frame
            try:
                for start, clean in kept:
                    self.cache.revisit(start, oldest)
                    self._write(clean, self._text)
            finally:
                if kept:
                    self.cache.resume(here)
        self._given = None if text is None else text.detach().clone()
        self._times = {}  # made of weights that may have changed, as the text's
        self._version = getattr(self.model, "weights_version", 0)
        if recache:
            self._clean_text = self._text
        if restart and (self._clean is not None or self._kept):
            last = self._kept[-1][1] if self._clean is None else self._clean
            self.cache.reset()
            self._kept, self._first = [], True
            self._clean, self._clean_text = last[:, :, -1:].clone(), self._text

    def _in_view(self) -> tuple[int, list[tuple[int, Tensor]]]:
        """The written chunks that the next pass sees, and where beside the sink they begin.

        Raises ValueError where the ring has not kept all of them whole.
        """
        here, (held, _), window = self.cache.frame, self.cache.held, self.cache.window
        pending = 1 if self._clean is None else self._clean.shape[2]
        oldest = window.visible_frames(here, here + pending)[-1][0]
        seen = [(start, chunk) for start, chunk in self._kept if start < window.sink or start + chunk.shape[2] > oldest]
        begins = min((max(start, window.sink) for start, chunk in seen if start + chunk.shape[2] > oldest), default=here)
        if begins < held and begins < here:
            raise ValueError(f"recache must be False: frame {begins} is in view, and frames before {held} are overwritten")
        return begins, seen

    @property
    def graphs(self) -> PassGraphs | None:
        """The CUDA graphs captured so far; None without ``cuda_graphs``."""
        return self._options.get("graphs")

    def reset(self) -> None:
        """Forget the video; the next chunk is a first one. Graphs stay."""
        self.cache.reset()
        self._made = 0
        self._first = True  # whether the next chunk is the first of its video
        self._kept = []
        self._times = {}
        self._clean = None
        self._clean_text = None  # the text that the last chunk was made from

    def chunks(
        self,
        noise: Noise,
        count: int | None = None,
        *,
        first_frame: Tensor | None = None,
        source: Source | None = None,
        after: After | None = None,
    ) -> Iterator[Tensor]:
        """Yield the next ``count`` chunks [B, C, f, H, W], or chunks without end; a later call goes on where this one stopped.

        ``noise(chunk, step)`` gives standard normal noise [B, C, f, H, W] of chunk 1, 2, ... and its denoising step 0, 1,
        ...; chunks are as large as their noise. ``first_frame`` [B, C, 1, H, W], clean: the video starts with it, as a
        chunk of its own, and it is not yielded. It is copied when this is called, and the video starts with the first chunk that
        is asked for: chunks that nobody asks for leave no trace.

        ``source(chunk)``: the clean latents of another video that the chunk is made from, as large as its noise. They are noised to
        the first level, (1 - level) source + level noise: at level 1 nothing of them is left. ``after(chunk, step, level, x)`` is
        told the clean estimate x after each denoising pass, and may return another in its place.

        Raises ValueError for a negative count, a first frame of another length, after the start or for no chunk, and for noise of
        another shape than the chunk before it or the step before it, or than its source; TypeError for what is no floating-point
        tensor.
        """
        for name, function in (("noise", noise), ("source", source), ("after", after)):
            if not callable(function) and (function is not None or name == "noise"):
                raise TypeError(f"{name} must be a function{' of chunk and step' * (name == 'noise')}, got {shown(function)}")
        if count is not None:
            whole(count, "count")
        if first_frame is not None:
            self._check_latents(first_frame, "first_frame")
            if first_frame.shape[2] != 1:
                raise ValueError(f"first_frame must be [B, C, 1, H, W], got {list(first_frame.shape)}")
            self._check_start()
            if count == 0:
                raise ValueError("first_frame must be None for no chunk, got one with count 0")
            first_frame = first_frame.detach().clone()
        return self._chunks(noise, count, first_frame, source, after)

    def _chunks(
        self, noise: Noise, count: int | None, first_frame: Tensor | None, source: Source | None, after: After | None
    ) -> Iterator[Tensor]:
        for _ in itertools.count() if count is None else range(count):
            with self._without_gradient():
                chunk = self._next(noise, first_frame, source, after)
            first_frame = None
            yield chunk.clone()  # the caller's own, and no inference tensor

    def _check_start(self) -> None:
        if self._made:
            raise ValueError(f"first_frame must be None after the start, {self._made} chunks were made: reset() first")

    def _check_latents(self, x: Tensor, name: str) -> None:
        device = self.cache.keys.device
        if not tensor(x, name).is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if x.dim() != 5 or x.shape[0] != self.cache.batch or 0 in x.shape:
            raise ValueError(f"{name} must be [{self.cache.batch}, C, f, H, W] for this cache, got {list(x.shape)}")
        if x.device != device:
            raise ValueError(f"{name} must be on the cache's device {device}, got {x.device}")

    def _drawn(self, noise: Noise, chunk: int, step: int, like: Tensor | None) -> Tensor:
        """Noise for a step of a chunk: as large as ``like`` where that is a step, else with any number of frames."""
        with torch.inference_mode(False):  # the caller's tensors stay what they are elsewhere
            x = noise(chunk, step)
        self._check_latents(x, f"noise({chunk}, {step})")
        if like is not None and (x.shape[:2], x.shape[3:]) != (like.shape[:2], like.shape[3:]):
            before = [*like.shape[:2], "f", *like.shape[3:]]
            raise ValueError(f"noise must give {before} as the frames before, got {list(x.shape)}")
        if step and like is not None and x.shape[2] != like.shape[2]:
            raise ValueError(f"noise must give {like.shape[2]} frames in step {step} as in the steps before, got {x.shape[2]}")
        return x

    def _begun(self, source: Source, chunk: int, noise: Tensor, level: float) -> Tensor:
        """The chunk's source noised to its first level."""
        with torch.inference_mode(False):
            clean = source(chunk)
        self._check_latents(clean, f"source({chunk})")
        if clean.shape != noise.shape:
            raise ValueError(f"source must give {list(noise.shape)}, as noise does, got {list(clean.shape)} for chunk {chunk}")
        return _mix(clean, noise, level)

    def _result(self, after: After, chunk: int, step: int, level: float, x: Tensor) -> Tensor:
        """A pass's result, or what ``after`` gives in its place."""
        with torch.inference_mode(False):
            other = after(chunk, step, level, x.clone())
        if other is None:
            return x
        self._check_latents(other, f"after({chunk}, {step}, ...)")
        if other.shape != x.shape:
            raise ValueError(f"after must give {list(x.shape)} or None, got {list(other.shape)}")
        return other.to(x.dtype)

    def _next(self, noise: Noise, first_frame: Tensor | None, source: Source | None, after: After | None) -> Tensor:
        if self._version != getattr(self.model, "weights_version", 0):
            self.set_text(self._given)
        number = self._made + 1
        levels = self._first_levels if self._first else self._levels
        x = self._drawn(noise, number, 0, self._clean if first_frame is None else first_frame)
        x = x if source is None else self._begun(source, number, x, levels[0])
        if first_frame is not None:
            self._check_start()
            self._clean, self._clean_text = first_frame, self._text
        for step, level in enumerate(levels):
            if step:
                x = _mix(x, self._drawn(noise, number, step, x), level)
            out = self._first_pass(x, level) if step == 0 else self._denoise(x, level)
            x = out.to(x.dtype) if self.predicts == "x0" else _x0(x, out, level)
            x = x if after is None else self._result(after, number, step, level, x)
        self._made, self._first, self._clean, self._clean_text = number, False, x, self._text
        return x

    def _first_pass(self, x: Tensor, level: float) -> Tensor:
        """A chunk's first denoising pass, and the clean pass of the chunk before it."""
        clean = self._clean
        if clean is None:
            return self._denoise(x, level)
        frames = clean.shape[2]
        if self.cache.merged and self._clean_text is self._text:
            times = self._levels_of(x, (frames, 0.0), (x.shape[2], level))
            out = self.model(torch.cat((clean, x), dim=2), times, self._text, clean_frames=frames, **self._options)
            self.cache.commit()
            self._keep(clean)
            return out
        self._write(clean, self._clean_text)
        self._keep(clean)
        return self._denoise(x, level)

    def _write(self, clean: Tensor, text: Any) -> None:
        """The clean keys and values of the chunk at ``cache.frame``."""
        self.model(clean, self._levels_of(clean, (clean.shape[2], 0.0)), text, cache_only=True, **self._options)
        self.cache.commit()

    def _keep(self, clean: Tensor) -> None:
        """The chunk is written; remember it while the sink holds it or a next chunk may see it."""
        end, window = self.cache.frame, self.cache.window
        oldest = window.visible_frames(end, end + 1)[-1][0]
        kept = [*self._kept, (end - clean.shape[2], clean)]
        self._kept = [(start, chunk) for start, chunk in kept if start < window.sink or start + chunk.shape[2] > oldest]
        self._clean = None

    def _denoise(self, x: Tensor, level: float) -> Tensor:
        return self.model(x, self._levels_of(x, (x.shape[2], level)), self._text, **self._options)

    def _levels_of(self, x: Tensor, *parts: tuple[int, float]) -> Any:
        """The timesteps [B, f] of parts of a chunk, (frames, level) each; embedded once where the model offers that."""
        if parts not in self._times:
            rows = [1000 * level for frames, level in parts for _ in range(frames)]
            timestep = torch.tensor(rows, dtype=torch.float32, device=x.device).expand(x.shape[0], -1)
            embed = getattr(self.model, "time_cache", None)
            self._times[parts] = timestep if embed is None else embed(timestep)
        return self._times[parts]


def _falling(name: str, levels: Sequence[float]) -> tuple[float, ...]:
    if isinstance(levels, (str, bytes)) or not isinstance(levels, Sequence):
        raise TypeError(f"{name} must be a sequence of noise levels, got {shown(levels)}")
    levels = tuple(real(level, f"{name}[{i}]") for i, level in enumerate(levels))
    falling = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not falling or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"{name} must be falling noise levels in (0, 1], got {shown(levels)}")
    return levels


def _x0(x: Tensor, flow: Tensor, level: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - level * flow.to(wide)).to(x.dtype)


def _mix(x0: Tensor, noise: Tensor, level: float) -> Tensor:
    wide = torch.promote_types(x0.dtype, torch.float32)
    return ((1 - level) * x0.to(wide) + level * noise.to(wide)).to(x0.dtype)
