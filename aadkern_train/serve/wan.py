"""A Wan model as it is served: its parts stay loaded, and each player has a cache and a decoder of its own."""

from __future__ import annotations

import contextlib
import io
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadkern_train.engine.video import rgb_of
from aadkern_train.generate.pictures import fitted_image
from aadkern_train.generate.wan_decoder import decoders
from aadkern_train.generate.wan_model import latent_frame, prepare_model, wan_noise, wan_stream
from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.hub import repository
from aadkern_train.networks.rollout import turn_to
from aadkern_train.networks.wan_parts import WanParts, load_part
from aadkern_train.serve.models import About, Player, backend_on, place_of
from aadkern_train.serve.protocol import RingPlace

PICTURES = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 40_000_000
FRAMES = 4  # of video in a latent frame
REMEMBERED = 32  # prompts whose embeddings are kept: 8 MB each in bf16


class WanModel:
    """A causal Wan with all its parts, as ``fitting_parts`` found them."""

    def __init__(self, parts: WanParts, settings: WanSettings, turn: str | None = None) -> None:
        from diffusers import AutoencoderKLWan

        from aadkern.wan.text import load_text_encoder

        self.parts, self.settings, self.way = parts, settings, turn or "recached"
        self.device, dtype = settings.placement()
        self.encoder: Any = load_text_encoder(parts.text_encoder, dtype, self.device)
        self.vae: Any = load_part(AutoencoderKLWan, parts.vae, dtype).eval().to(self.device)
        self.decoder = decoders(parts, settings, self.vae)
        self.net: Any = prepare_model(parts, settings)
        self.frame = latent_frame(parts, settings)
        self.embedded = lru_cache(REMEMBERED)(self._embedded)
        height, width = settings.size
        place = parts.transformer
        self.about = About(
            name=place.name if place.is_file() else repository(place) or place.resolve().parent.name,
            backend=backend_on(self.device),
            height=height,
            width=width,
            chunk=FRAMES * settings.chunk_frames,
            fps=settings.fps,
            directions=False,
            prompts=True,
            pictures=True,
        )

    @property
    def graphs(self) -> bool:
        """Whether passes are replayed from CUDA graphs."""
        setting = self.settings.cuda_graphs
        return self.device.type == "cuda" if setting is None else setting

    def _embedded(self, prompt: str) -> Tensor:
        from aadkern.wan.text import embed, token_ids

        return embed(self.encoder, token_ids(self.parts.tokenizer, prompt)).to(self.device)

    def check(self, prompt: str | None) -> None:
        """Any words will do."""

    def toward(self, prompt: str, x: int, y: int) -> str:
        raise ValueError("direction must be left out: a prompt says what this model shows")

    def picture(self, file: bytes) -> Tensor:
        from PIL import Image

        pixels = 0
        unreadable = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # which is told of below
        with contextlib.suppress(*unreadable), Image.open(io.BytesIO(file), formats=PICTURES) as opened:
            pixels = opened.width * opened.height
        if pixels > MOST_PIXELS:  # a small file can unpack to gigabytes
            raise ValueError(f"picture must have at most {MOST_PIXELS} pixels, got {pixels}")
        return fitted_image(io.BytesIO(file), self.settings.size, "what was sent", PICTURES)

    def player(self) -> Player:
        return WanPlayer(self)


class WanPlayer:
    """A stream of a Wan model."""

    def __init__(self, model: WanModel) -> None:
        self.model, self.prompt = model, ""
        self._stream = wan_stream(model.net, model.frame, model.settings, model.graphs)
        self._decoder = model.decoder()
        self._first: Tensor | None = None

    def begin(self, seed: int, prompt: str | None, picture: Any) -> None:
        from aadkern.wan.vae import encode_image

        model, self.prompt = self.model, prompt or ""
        self._first = None if picture is None else encode_image(model.vae, picture.to(model.device))
        self._stream.reset()
        self._stream.set_text(model.embedded(self.prompt))
        self._decoder.reset()
        self._noise = wan_noise(seed, model.frame, model.settings.chunk_frames, model.device)

    def turn(self, prompt: str) -> None:
        turn_to(self._stream, self.model.embedded(prompt), self.model.way)
        self.prompt = prompt

    def next(self) -> np.ndarray:
        first, self._first = self._first, None
        latents = next(self._stream.chunks(self._noise, 1, first_frame=first))
        parts = [latents] if first is None else [first, latents]
        return torch.cat([rgb_of(self._decoder.decode(part)) for part in parts]).numpy()

    @property
    def place(self) -> RingPlace:
        return place_of(self._stream.cache)
