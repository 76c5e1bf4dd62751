"""A causal Wan model in local folders to a video file: prompt, image or video in, an mp4 that grows chunk by chunk out."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern import SequenceGroup
from aadkern_train.engine.processes import Processes, start
from aadkern_train.engine.video import GrowingVideo, frame_rate, rgb_of
from aadkern_train.generate.pictures import SourceVideo, in_chunks, read_image, tell_cropping, whole_chunks
from aadkern_train.generate.prompts import changes
from aadkern_train.generate.ranks import sequence_of
from aadkern_train.generate.wan_model import embed_prompts, fitting_parts, say, wan_noise
from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.wan_parts import WanParts


@torch.no_grad()
def generate_wan(
    checkpoint: Path,
    out: Path,
    *,
    prompt: str | None,
    image: Path | None = None,
    video: Path | None = None,
    parts: Path | None = None,
    settings: WanSettings | None = None,
) -> Path:
    """Stream a video from a causal Wan model and write it to ``out``, an mp4 that plays while it grows; returns ``out``.

    ``checkpoint`` and ``parts`` are ``find_parts``'s. With ``image`` the video starts from it, as a chunk of one latent frame;
    without, it is text to video. With ``video`` it is made from that one, whose frames are noised to the first of the settings'
    levels (``WanSettings.started``), and is no longer. A line on stderr tells the seconds of each chunk. On Ctrl-C and on a full
    disk what is made so far stays as a file that plays, and the error is raised on.

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
    source = None
    if video is not None:
        if image is not None:
            raise ValueError("image must be left out with a video, whose own frames this one is made from")
        frame_rate(settings.fps)
        source = SourceVideo.open(video, settings.fps, out)
        chunks = min(settings.chunks, whole_chunks(source.count, settings.chunk_frames))
        settings = replace(settings, chunks=chunks, fps=source.fps)
    wan_parts = fitting_parts(checkpoint, parts, settings)
    device, dtype = settings.placement()
    rows, columns = (wan_parts.pixels * side for side in wan_parts.patch)
    tokens = settings.size[0] // rows * (settings.size[1] // columns)
    with start(device.type) as processes, sequence_of(processes, tokens) as group:
        pixels = None if image is None or not processes.is_main else read_image(image, settings.size)
        file = GrowingVideo(out, settings.fps) if processes.is_main else None
        if source is not None:
            tell_cropping("video", source.sides, settings.size)
        later = changes(settings.then, settings.chunks)
        prompts = [prompt, *later.values()]
        text, *others = processes.on_main(lambda: embed_prompts(wan_parts, prompts, device, dtype, kept="cpu"))
        streamer = WanStreamer(wan_parts, settings, processes, group)
        taking_over = dict(zip(later, others, strict=True))
        streamer.write(file, text, settings.seed, pixels=pixels, later=taking_over, source=source)
    return out


class WanStreamer:
    """A pipeline, loaded once, that streams one video after another into files: each as if it were the first."""

    def __init__(
        self, parts: WanParts, settings: WanSettings, processes: Processes | None = None, group: SequenceGroup | None = None
    ) -> None:
        """``group``: what ``processes`` share each frame's tokens in, the main one of which alone encodes, decodes and writes."""
        from aadkern_train.generate.pipeline import CausalWanPipeline

        self.settings, self._processes = settings, processes
        is_main = processes is None or processes.is_main
        self._pipe = CausalWanPipeline.from_parts(parts, settings, vae=is_main)
        self._pipe.transformer.sequence = group
        self._pipe.stream_of(settings)
        self._decoder: Any = self._pipe.new_decoder() if is_main else None
        self._device, self._frame = settings.placement()[0], self._pipe.frame_of(settings)

    @torch.no_grad()
    def write(
        self,
        video: GrowingVideo | None,
        text: Tensor,
        seed: int,
        *,
        pixels: Tensor | None = None,
        later: Mapping[int, Tensor] | None = None,
        source: SourceVideo | None = None,
    ) -> None:
        """Stream a video from the embedded prompt ``text`` and those that take over ``later``, by chunk, into ``video``, which is
        whole in the end even where Ctrl-C or a full disk ends it; both are raised on. ``pixels`` [1, 3, H, W] in [-1, 1]: the image
        that it starts from, as a chunk of one latent frame; ``source``: the video that it is made from. A line on stderr tells the
        seconds of each chunk. ``video`` None: of processes that share the work, one that does not write."""
        settings = self.settings
        pictures = iter([] if pixels is None else [self._pipe.encoded_image(pixels)])
        first = next(self._shared(pictures), None)
        noise = wan_noise(seed, self._frame, settings.chunk_frames, self._device)
        later = {chunk: other.to(self._device) for chunk, other in (later or {}).items()}
        sources = None if source is None else self._shared(self._encoded(source))
        latents = self._pipe.latents(text, noise, settings, settings.chunks, first=first, later=later, source=sources)
        if video is None:  # another process writes
            deque(latents, maxlen=0)
            return
        self._decoder.reset()
        _write(latents, self._decoder, first, video, settings.chunks)

    def _encoded(self, source: SourceVideo) -> Iterator[Tensor]:
        size = self.settings.chunk_frames
        return self._pipe.encoded(in_chunks(source.frames(self.settings.size), 4 * size - 3, 4 * size))

    def _shared(self, latents: Iterator[Tensor]) -> Iterator[Tensor]:
        """What the main process encodes, on every process."""
        if self._processes is None:
            yield from latents
            return
        while True:
            chunk = self._processes.on_main(lambda: None if (one := next(latents, None)) is None else one.cpu())
            if chunk is None:
                return
            yield chunk.to(self._device)


def _write(stream: Iterator[Tensor], decoder: Any, first: Tensor | None, video: GrowingVideo, chunks: int) -> None:
    """Decode each chunk as it is made and append it to the video, telling how long it took."""
    count, stopped = 0, None
    with video:
        try:
            if first is not None:
                video.write(rgb_of(decoder.decode(first)))
            for count in range(1, chunks + 1):
                began = time.monotonic()
                latents = next(stream, None)
                if latents is None:
                    say(f"\nthe source video ended before chunk {count}")
                    break
                if latents.device.type == "cuda":
                    torch.cuda.synchronize(latents.device)
                generated = time.monotonic()
                frames = rgb_of(decoder.decode(latents))
                decoded = time.monotonic()
                video.write(frames)
                seconds = time.monotonic() - began
                share = (decoded - generated) / seconds
                rate = f"{seconds:.2f} s ({share:.0%} of it decoding), {len(frames) / seconds:.1f} frames a second"
                print(f"\rchunk {count}/{chunks}: {rate}   ", end="", file=sys.stderr, flush=True)
        except (KeyboardInterrupt, OSError) as error:
            stopped = error
    if count:
        print(file=sys.stderr)
    if stopped is not None:
        say(f"stopped in chunk {count or 1}; {video.holds()}")
        raise stopped
    say(f"{video.path}: {video.count} frames, {video.count / float(video.rate):.1f} s")
