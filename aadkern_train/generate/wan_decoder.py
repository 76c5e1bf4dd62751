"""What turns a stream's latents into pixels: the VAE's own decoder, or a tiny one out of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.wan_parts import PIXELS, WanParts

TINY_FILES = ("taew2_1.safetensors", "taew2_1.pth")


def tiny_file(parts: WanParts, settings: WanSettings) -> Path | None:
    """The tiny decoder's file, where ``settings`` ask for one: theirs, or the one in the folder that the VAE lies in.

    Raises FileNotFoundError where there is none, ValueError for a VAE that is not Wan 2.1's.
    """
    if settings.decoder == "full":
        return None
    if (parts.channels, parts.pixels) != (16, PIXELS):
        raise ValueError(f"decoder must be full for {parts.vae}: tiny is for Wan 2.1's VAE, of 16 channels and {PIXELS} pixels")
    if settings.tiny_decoder is not None:
        return settings.tiny_decoder
    folder = parts.vae.parent
    file = next((folder / name for name in TINY_FILES if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"tiny_decoder must be given, or {' or '.join(TINY_FILES)} lie in {folder}; found neither")
    return file


def check_decoder(parts: WanParts, settings: WanSettings) -> None:
    """Reads a tiny decoder, of some 20 MB, before the heavy parts. Raises ValueError or FileNotFoundError as its loading does."""
    from aadkern.wan.tiny_vae import load_tiny_decoder

    file = tiny_file(parts, settings)
    if file is not None:
        load_tiny_decoder(file)


def decoders(parts: WanParts, settings: WanSettings, vae: Any) -> Callable[[], Any]:
    """What makes a decoder for each stream, all of one set of weights: ``vae``'s, or the tiny ones."""
    from aadkern.wan.tiny_vae import StreamingTinyDecoder, load_tiny_decoder
    from aadkern.wan.vae import StreamingDecoder

    file = tiny_file(parts, settings)
    if file is None:
        return lambda: StreamingDecoder(vae)
    device, dtype = settings.placement()
    tiny = load_tiny_decoder(file).to(device, dtype)
    return lambda: StreamingTinyDecoder(tiny)
