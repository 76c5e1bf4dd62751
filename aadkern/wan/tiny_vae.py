"""A tiny decoder of Wan 2.1's latents for streaming: TAEHV's architecture, in its public weights' names (taew2_1).

Layers, names and ranges are those of github.com/madebyollin/taehv (MIT), read there at commit 115aaa7.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aadkern.wan.vae import chunk_shape

CHANNELS = 16  # of Wan 2.1's latents
WIDTHS = (256, 128, 64, 64)  # of features, at each of the sides 1, 2, 4 and 8
GROWTHS = (1, 2, 2)  # frames from one, at each doubling of the sides
TRIMMED = 3  # frames of the first latent frame, which stands for one


class Clamp(nn.Module):
    """Bounds latents softly to [-3, 3]."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """A residual block that sees the frame before each frame: zeros before a video's first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))

    def forward(self, frames: Tensor, last: Tensor | None, batch: int) -> Tensor:
        """Frames [f B, C, h, w] and the ``last`` [B, C, h, w] before them."""
        last = torch.zeros_like(frames[:batch]) if last is None else last
        before = torch.cat([last, frames[:-batch]])
        return torch.relu(self.conv(torch.cat([frames, before], dim=1)) + frames)


class TGrow(nn.Module):
    """``growth`` frames from each."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.growth = growth
        self.conv = nn.Conv2d(width, width * growth, 1, bias=False)

    def forward(self, frames: Tensor, batch: int) -> Tensor:
        """Frames [f B, C, h, w] to [f growth B, C, h, w]."""
        grown: Tensor = self.conv(frames)
        return grown.unflatten(0, (-1, batch)).unflatten(2, (self.growth, -1)).transpose(1, 2).flatten(0, 2)


class TinyDecoder(nn.Module):
    """Latents to pixels in a few convolutions: a 25th of the arithmetic of the VAE's decoder, and less sharp.

    A chunk is decoded from itself and the memory that the chunk before has left: one frame of features for each ``MemBlock``.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [Clamp(), _conv(CHANNELS, WIDTHS[0]), nn.ReLU()]
        for width, after, growth in zip(WIDTHS, WIDTHS[1:], GROWTHS, strict=False):
            layers += [MemBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TGrow(width, growth), _conv(width, after, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), _conv(WIDTHS[-1], 3))

    def forward(self, latents: Tensor, memory: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Latents [B, 16, f, h, w], normalised, to frames [B, 3, 4f, 8h, 8w] in [0, 1], and the memory for the next ones.
        ``memory`` None: these are a video's first, whose first three frames are to be left out."""
        batch, left = latents.shape[0], iter(memory or ())
        kept: list[Tensor] = []
        x = latents.permute(2, 0, 1, 3, 4).flatten(0, 1)  # time outside: a chunk's last frame lies in one piece
        for layer in self.decoder:
            if isinstance(layer, MemBlock):
                kept.append(x[-batch:].clone())
                x = layer(x, next(left, None), batch)
            elif isinstance(layer, TGrow):
                x = layer(x, batch)
            else:
                x = layer(x)
        return x.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4).clamp(0, 1), kept


class StreamingTinyDecoder:
    """``aadkern.wan.vae.StreamingDecoder``'s interface over a ``TinyDecoder``: a stream takes either.

    Frames are decoded one by one, so any chunks give the same bits. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, decoder: TinyDecoder) -> None:
        if not isinstance(decoder, TinyDecoder):
            raise TypeError(f"decoder must be a TinyDecoder, got {type(decoder).__name__}")
        self.decoder = decoder
        self.reset()

    def reset(self) -> None:
        """Forget the video; the next latent frame is a first one."""
        self._memory: list[Tensor] | None = None
        self._shape: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Memory of the features kept: the same from the first latent frame on."""
        return sum(features.nbytes for features in self._memory or ())

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 16, f, h, w], normalised as the transformer makes them, to pixels [B, 3, F, 8h, 8w] in [-1, 1] in the
        weights' dtype. The video's first latent frame gives one frame, each later one four.

        Raises ValueError for another number of channels, no frame, or other sizes than the chunks before had.
        """
        self._shape = chunk_shape(latents, CHANNELS, self._shape)
        weight = next(self.decoder.parameters())
        frames = []
        for frame in latents.to(weight.device, weight.dtype).split(1, dim=2):
            trimmed = TRIMMED if self._memory is None else 0
            pixels, self._memory = self.decoder(frame, self._memory)
            frames.append(pixels[:, :, trimmed:])
        return torch.cat(frames, dim=2) * 2 - 1


def load_tiny_decoder(path: str | os.PathLike[str]) -> TinyDecoder:
    """The decoder in a file of TAEHV's for Wan 2.1 (taew2_1), a ``.safetensors`` or what ``torch.save`` wrote; on the CPU, in fp32.

    Pickles are never run (``weights_only=True``). Raises FileNotFoundError, TypeError or ValueError, naming
    ``tiny_decoder``, for no file, one that cannot be read, other names or shapes than the architecture's, and values that are not
    finite.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"tiny_decoder must be a file's path, got {type(path).__name__}")
    state = _read(Path(path))
    decoder = TinyDecoder().eval().requires_grad_(False)
    wanted = decoder.state_dict()
    held = {name: value for name, value in state.items() if str(name).startswith("decoder.")}
    first = held.get("decoder.7.conv.weight")
    if isinstance(first, Tensor) and first.shape[:1] == (2 * WIDTHS[0],):  # stored as a growth of 2, whose later frame counts
        held["decoder.7.conv.weight"] = first[WIDTHS[0] :]
    for name, weight in wanted.items():
        tensor = held.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != weight.shape:
            got = list(tensor.shape) or "a scalar" if isinstance(tensor, Tensor) else "nothing"
            raise ValueError(f"tiny_decoder must hold {name} {list(weight.shape)}, as taew2_1 does, found {got} in {path}")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"tiny_decoder must hold finite weights, {name} in {path} has others")
    more = next((name for name in held if name not in wanted), None)
    if more is not None:
        raise ValueError(f"tiny_decoder must have taew2_1's layers alone, found {more} in {path}")
    decoder.load_state_dict(held)
    return decoder


def _read(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"tiny_decoder must be a file, found none at {path}")
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets junk with errors of any kind
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"tiny_decoder must be tensors that safetensors or torch.save wrote, {path} is not: {why}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"tiny_decoder must be a state dict, got {type(state).__name__} in {path}")
    return state


def _conv(inner: int, outer: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, padding=1, bias=bias)
