"""``CausalWanPipeline``: a causal Wan with its parts, used as a pipeline of diffusers is, and streamed. ``aad generate`` runs on
it.

A subclass of ``DiffusionPipeline``, whose ``to``, ``enable_model_cpu_offload`` and ``progress_bar`` are what people know. Only
loading is our own: diffusers would draw weights that are missing at random, and read Wan's tokenizer through transformers, which
drops its normaliser (``aadkern.wan.text``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from aadkern import StreamingGenerator
from aadkern.checks import choice, whole
from aadkern.streaming.generator import After
from aadkern.wan import lora
from aadkern.wan.offload import offload_blocks
from aadkern.wan.text import embed, load_text_encoder, load_tokenizer, tokens_of
from aadkern.wan.vae import StreamingDecoder, StreamingEncoder, encode_image, pixels_per_latent
from aadkern_train.generate.options import wan_settings
from aadkern_train.generate.pictures import latent_frames, pixels_of
from aadkern_train.generate.request import FRAMES, VideoRequest, video_request
from aadkern_train.generate.streams import stream_chunks
from aadkern_train.generate.wan_decoder import decoders
from aadkern_train.generate.wan_model import fitting_parts, prepare_model, wan_stream
from aadkern_train.generate.wan_settings import DTYPES, WanSettings
from aadkern_train.networks.folders import facts
from aadkern_train.networks.hub import hub_checkpoint
from aadkern_train.networks.rollout import Noise, turn_to
from aadkern_train.networks.wan_parts import PIXELS, WanParts, load_part, trained_parts

OUTPUTS = ("pil", "np", "pt", "latent")
Callback = Callable[[Any, int, float, dict[str, Tensor]], "dict[str, Tensor] | None"]


class CausalWanPipeline(DiffusionPipeline):
    """::

        pipe = CausalWanPipeline.from_pretrained("my-causal-wan", torch_dtype=torch.bfloat16).to("cuda")
        frames = pipe("A cat walks.", num_frames=81, num_inference_steps=4).frames[0]
        for frames in pipe.stream("A cat walks.", num_inference_steps=4):  # without end
            show(frames)

    ``settings`` say the rest: window, sink, chunks, size (``WanSettings``); replace them between videos. One video at a time.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, transformer: Any, vae: Any, text_encoder: Any, tokenizer: Any, settings: WanSettings | None = None) -> None:
        """``vae``, ``text_encoder`` and ``tokenizer`` may be None: for latents alone, and for embedded prompts."""
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.settings = settings or WanSettings()
        self.new_decoder: Callable[[], Any] = lambda: StreamingDecoder(self.vae)
        self.pixels = PIXELS if vae is None else pixels_per_latent(vae)
        self.run_facts: Mapping[str, Any] = {}
        self._held: tuple[Any, StreamingGenerator] | None = None
        self._interrupt = False

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        checkpoint: str | os.PathLike[str],
        *,
        parts: str | os.PathLike[str] | None = None,
        torch_dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> CausalWanPipeline:
        """The model and its parts as ``aad generate`` finds them, on the CPU: a folder of diffusers or its id on the Hub, or with
        ``parts`` a transformer's folder, a ``.pt`` or a single ``.safetensors``. ``settings`` are fields of ``WanSettings``;
        weights of a run bring their own.

        Raises ValueError or FileNotFoundError, before weights are loaded, for what is missing or does not fit.
        """
        names = {dtype: name for name, dtype in DTYPES.items()}
        if torch_dtype not in names:
            raise ValueError(f"torch_dtype must be torch.float32 or torch.bfloat16, got {torch_dtype}")
        rest = None if parts is None else Path(parts)
        model = hub_checkpoint(Path(checkpoint), rest)
        run_facts = facts(model)
        chosen = replace(wan_settings({}, run_facts), **{"device": "cpu", **settings, "dtype": names[torch_dtype]})
        wan_parts = fitting_parts(model, rest or trained_parts(run_facts), chosen)
        encoder = load_text_encoder(wan_parts.text_encoder, torch_dtype, "cpu")
        pipe = cls.from_parts(wan_parts, chosen, encoder, load_tokenizer(wan_parts.tokenizer))
        pipe.run_facts = run_facts
        return pipe

    @classmethod
    def from_parts(
        cls, parts: WanParts, settings: WanSettings, text_encoder: Any = None, tokenizer: Any = None, *, vae: bool = True
    ) -> CausalWanPipeline:
        """Of the parts that ``fitting_parts`` found, where ``settings`` place them; ``vae`` False: without it."""
        device, dtype = settings.placement()
        pixels = load_part(AutoencoderKLWan, parts.vae, dtype).eval().to(device) if vae else None
        pipe = cls(prepare_model(parts, settings), pixels, text_encoder, tokenizer, settings)
        pipe.pixels = parts.pixels
        if vae:
            pipe.new_decoder = decoders(parts, settings, pixels)
        return pipe

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | None = None,
        *,
        num_frames: int | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        **options: Any,
    ) -> Any:
        """A whole video: ``frames[0]`` of the answer holds ``num_frames`` frames (81, or the source video's), the image's own
        counted.

        ``options``: ``image`` (a path, or Pillow's) to start from, or ``video`` (a path, Pillow's images, or an array [T, H, W, 3]
        of bytes or of numbers in [0, 1]) to make it from, noised to ``strength`` in (0, 1]; ``height``, ``width``;
        ``num_inference_steps``, shifted by ``shift``; ``generator``, torch's; ``prompt_embeds`` [1, T, text_dim] for the prompt.
        ``output_type``: "np" [F, H, W, 3] in [0, 1], "pt" [F, 3, H, W], "pil", or "latent", of which ``frames`` is [1, C, f, h, w].
        ``callback_on_step_end(pipe, step, timestep, {"latents": x})`` is told the clean estimate of a chunk after each pass, and
        may return another; ``pipe._interrupt = True`` ends the video with that chunk.

        Raises ValueError, TypeError or FileNotFoundError naming the argument.
        """
        choice(output_type, "output_type", OUTPUTS)
        frames = FRAMES if num_frames is None and "video" not in options else num_frames
        request = video_request(self, prompt, frames if frames is None else whole(frames, "num_frames", 1), **options)
        first, rest = (len(levels) for levels in (request.settings.first_steps or request.settings.steps, request.settings.steps))
        parts = [] if request.first is None else [request.first]
        with self.progress_bar(total=first + ((request.chunks or 1) - 1) * rest) as bar:
            passed = 0

            def after(_chunk: int, _step: int, level: float, x: Tensor) -> Tensor | None:
                nonlocal passed
                callback_outputs = callback_on_step_end and callback_on_step_end(self, passed, 1000 * level, {"latents": x})
                passed += 1
                bar.update()
                return callback_outputs.get("latents") if callback_outputs else None

            parts += self._made(request, after)
        if not parts:
            raise ValueError("video must hold as many frames as its file tells, it ended before the first chunk")
        if hasattr(self.transformer, "_hf_hook"):
            self._held = None  # the cache makes room for the VAE
        video: Any = torch.cat(parts, dim=2)[:, :, : latent_frames(request.frames or 1)]
        if output_type != "latent":
            self._ready(self.vae)
            decoder = self._decoder()
            pixels = torch.cat([decoder.decode(part) for part in parts], dim=2)[:, :, : request.frames]
            video = VideoProcessor(vae_scale_factor=self.pixels).postprocess_video(pixels.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return WanPipelineOutput(frames=video) if return_dict else (video,)

    def stream(self, prompt: str | None = None, *, output_type: str = "np", **options: Any) -> Iterator[Any]:
        """Yields the frames of each chunk as it is made, as ``__call__``'s ``frames[0]`` (with "latent" [1, C, f, h, w]), without
        end, or to the end of the source video. ``options`` are those of a call. ``set_prompt`` steers between two chunks."""
        choice(output_type, "output_type", OUTPUTS)
        with torch.no_grad():
            request = video_request(self, prompt, None, **options)
        return self._shown(request, output_type)

    def _shown(self, request: VideoRequest, output_type: str) -> Iterator[Any]:
        chunks, decoder = self._made(request, None), None if output_type == "latent" else self._decoder()
        processor, first_chunk = VideoProcessor(vae_scale_factor=self.pixels), request.first
        while True:
            with torch.no_grad():
                self._ready(self.transformer)
                chunk, first_chunk = (next(chunks, None), None) if first_chunk is None else (first_chunk, None)
                if chunk is None:
                    return
                if decoder is not None:
                    self._ready(self.vae)
                    chunk = processor.postprocess_video(decoder.decode(chunk).float(), output_type=output_type)[0]
            yield chunk

    def set_prompt(self, prompt: str, turn: str = "kept") -> None:
        """Another prompt from the next chunk of the stream on. ``turn`` tells what becomes of what is in view: "kept", "recached"
        or "restarted" (docs/generate.md)."""
        if self._held is None:
            raise ValueError("prompt must be set while there is a stream: ask it for a chunk first")
        text = self.encode_prompt(prompt)
        self._ready(self.transformer)
        turn_to(self._held[1], text, turn)

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """The prompt's embedding [1, 512, text_dim]. A text encoder elsewhere is on the pipeline's device for it alone."""
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a string, got {type(prompt).__name__}")
        if self.text_encoder is None:
            raise ValueError("prompt must be given as prompt_embeds to a pipeline without a text encoder")
        device, home = self._execution_device, self.text_encoder.device
        text = embed(self.text_encoder.to(device), tokens_of(self.tokenizer, prompt)[0])
        self.text_encoder.to(home)
        return text

    def _made(self, request: VideoRequest, after: After | None) -> Iterator[Tensor]:
        """The latents of the chunks that are asked for, less those after an interruption."""
        self._interrupt = False
        for chunk in self.latents(
            request.text, request.noise, request.settings, request.chunks, first=request.first, source=request.source, after=after
        ):
            yield chunk
            if self._interrupt:
                return

    def latents(
        self,
        text: Tensor,
        noise: Noise,
        settings: WanSettings,
        chunks: int | None = None,
        *,
        first: Tensor | None = None,
        later: Mapping[int, Tensor] | None = None,
        source: Iterator[Tensor] | None = None,
        after: After | None = None,
    ) -> Iterator[Tensor]:
        """The latents [1, C, f, h, w] of each of so many chunks (None: without end) under an embedded prompt, and those that take
        over ``later``, by chunk. ``first`` is a clean first latent frame, ``source`` gives the clean latents that each chunk is
        made from, and ends the video where it ends; ``noise`` and ``after`` are ``StreamingGenerator.chunks``'s."""
        if source is not None and hasattr(self.transformer, "_hf_hook"):
            source = iter(list(islice(source, chunks)))  # all of it now, and not the transformer out and in with every chunk
        self._ready(self.transformer)
        stream = self.stream_of(settings)
        stream.reset()
        stream.set_text(text.to(self._execution_device))
        return stream_chunks(stream, noise, chunks, first, later or {}, settings.turn, source, after)

    def stream_of(self, settings: WanSettings) -> StreamingGenerator:
        """The stream of such videos, made anew where the last one's was another: it holds its cache, and CUDA graphs."""
        weight = self.transformer.patch_embedding.weight
        graphs = settings.cuda_graphs
        if graphs is None:  # collectives within a graph are not tried yet, and weights that move away cannot be
            moved = self.transformer.is_offloaded() or hasattr(self.transformer, "_hf_hook")
            graphs = weight.device.type == "cuda" and self.transformer.sequence is None and not moved
        plain = replace(settings, then=(), turn="kept", chunks=1, seed=0, fps=1.0)
        key = (plain, graphs, weight.device, weight.dtype)
        if self._held is None or self._held[0] != key:
            self._held = None  # its cache goes before another's comes
            self._held = key, wan_stream(self.transformer, self.frame_of(settings), settings, graphs)
        return self._held[1]

    def frame_of(self, settings: WanSettings) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame."""
        height, width = (side // self.pixels for side in settings.size)
        return self.transformer.config["in_channels"], height, width

    def encoded_image(self, pixels: Tensor) -> Tensor:
        """The clean first latent frame of an image [1, 3, H, W] in [-1, 1]."""
        self._ready(self.vae)
        return encode_image(self.vae, pixels)

    def encoded(self, chunks: Iterator[np.ndarray]) -> Iterator[Tensor]:
        """Clean latents of a video's chunks, uint8 [T, H, W, 3], the first of 4f - 3 frames, as each is asked for."""
        encoder = StreamingEncoder(self.vae)
        for frames in chunks:
            self._ready(self.vae)
            yield encoder.encode(pixels_of(frames))

    def _decoder(self) -> Any:
        decoder = self.new_decoder()
        if hasattr(decoder, "decoder"):  # a tiny one, which is no component
            decoder.decoder.to(self._execution_device)
        return decoder

    @staticmethod
    def _ready(part: Any) -> None:
        """On its device, where ``enable_model_cpu_offload`` has it wait elsewhere: its hook sees whole forwards alone."""
        hook = getattr(part, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(part)

    def enable_block_offload(self, device: torch.device | str = "cuda") -> None:
        """For cards that the transformer does not fit on: its blocks' weights wait in the host's memory and are copied one ahead
        (docs/generate.md). The VAE goes to the device, the text encoder for each prompt."""
        self._held = None
        offload_blocks(self.transformer, device)
        if self.vae is not None:
            self.vae.to(device)

    def load_lora_weights(self, file: str | os.PathLike[str], adapter_name: str | None = None, weight: float = 1.0) -> None:
        """A LoRA file into the transformer's weights (docs/generate.md#lora). Raises ValueError for one that does not fit."""
        if self.transformer.is_offloaded():
            raise ValueError("lora must be loaded before the transformer's weights are offloaded")
        lora.load(self.transformer, file, weight, name=adapter_name)

    def set_adapters(self, names: str | list[str], weights: float | list[float] = 1.0) -> None:
        """These files' weights, from the next video on; other files that are loaded are as if they were not there."""
        held, names = lora.loaded(self.transformer), [names] if isinstance(names, str) else names
        if unknown := [name for name in names if name not in held]:
            raise ValueError(f"names must be LoRA files that are loaded, {', '.join(held) or 'none is'}, got {unknown[0]!r}")
        numbers = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        wanted = dict(zip(names, numbers, strict=True))
        for name, one in held.items():
            one.weight = wanted.get(name, 0.0)

    def unload_lora_weights(self) -> None:
        """All LoRA files out of the transformer, whose weights are its own again to the bit."""
        for one in list(lora.loaded(self.transformer).values()):
            one.remove()
