"""Wan's VAE for streaming: latents to pixels chunk by chunk, and images and videos to clean latents. Imports diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, patchify, unpatchify
from torch import Tensor


def pixels_per_latent(vae: AutoencoderKLWan) -> int:
    """Rows of pixels that one row of latents stands for: 8 for Wan 2.1's VAE, 16 for Wan 2.2's."""
    config: Any = vae.config
    return int(2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1))


class _Streaming:
    """One half of a VAE, with what its causal convolutions look back at."""

    def __init__(self, vae: AutoencoderKLWan, half: str) -> None:
        self.vae = _whole_frames(vae)
        self._convolutions = sum(isinstance(module, WanCausalConv3d) for module in getattr(vae, half).modules())
        self.reset()

    def reset(self) -> None:
        """Forget the video; the next frame is a first one."""
        self._features: list[Any] = [None] * self._convolutions
        self._shape: tuple[int, ...] | None = None  # of a frame, once there was one

    @property
    def nbytes(self) -> int:
        """Memory of the features kept: the same from the third latent frame on."""
        return sum(features.nbytes for features in self._features if isinstance(features, Tensor))


class StreamingDecoder(_Streaming):
    """Decodes a video's latents chunk by chunk, with the same result as decoding the whole clip at once.

    ::

        decoder = StreamingDecoder(vae)
        for latents in generator.chunks(noise):
            show(decoder.decode(latents))

    ``vae`` is diffusers' ``AutoencoderKLWan``, Wan 2.1's or 2.2's, not tiled. Its causal convolutions look back at two
    frames of features; those are kept here, so memory does not grow with the video, and the VAE may encode and decode other things
    in between. A clean first frame is a chunk too, and decoded before the others. ``reset`` begins another video.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, "decoder")

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, f, h, w], normalised as the transformer makes them, to pixels [B, 3, F, 8h, 8w] in [-1, 1] (Wan 2.2:
        16h, 16w) in the VAE's dtype. The video's first latent frame gives one frame, each later one four.

        Raises ValueError for another number of channels, no frame, or other sizes than the chunks before had.
        """
        config: Any = self.vae.config
        shape = chunk_shape(latents, config.z_dim, self._shape)
        latents = self.vae.post_quant_conv(denormalised(latents, self.vae))
        frames = []
        for frame in latents.split(1, dim=2):  # one by one, as in training: the first of a video is upsampled otherwise
            frames.append(self.vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=self._shape is None))
            self._shape = shape
        pixels = torch.cat(frames, dim=2)
        if config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=config.patch_size)
        return pixels.clamp(-1, 1)


class StreamingEncoder(_Streaming):
    """Encodes a video to clean latents chunk by chunk, with the same result as encoding the whole clip at once.

    ::

        encoder = StreamingEncoder(vae)
        for frames in video:  # the first chunk 4f - 3 frames, each later one 4f
            source = encoder.encode(frames)

    As ``StreamingDecoder``: Wan 2.1's or 2.2's VAE, not tiled; what its causal convolutions look back at is kept here. ``reset``
    begins another video. Raises TypeError or ValueError naming the argument.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        super().__init__(vae, "encoder")

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The next frames [B, 3, T, H, W] in [-1, 1] to latents [B, C, f, h, w], normalised as ``encode_video``'s: the posterior's
        mode. The video's first frame gives one latent frame, each four after it another: T is 4f - 3 for the first chunk, then 4f.

        Raises ValueError for another T, no frame, sides that are no multiples of ``pixels_per_latent``, or other sizes than before.
        """
        _check_frames(video, pixels_per_latent(self.vae))
        batch, _, count, height, width = video.shape
        begins = self._shape is None
        if count % 4 != begins:
            raise ValueError(
                f"video must have {'4f - 3' if begins else '4f'} frames{'' if begins else ' after the first'}, got {count}"
            )
        if self._shape not in (None, (batch, height, width)):
            wanted = "[{}, 3, T, {}, {}]".format(*self._shape or ())
            raise ValueError(f"video must be {wanted} as before, got {list(video.shape)}; reset() begins another video")
        self._shape = (batch, height, width)
        config: Any = self.vae.config
        pixels = video.to(self.vae.device, self.vae.dtype)
        pixels = pixels if config.patch_size is None else patchify(pixels, patch_size=config.patch_size)
        modes = []
        for frames in pixels.split([1] * begins + [4] * (count // 4), dim=2):
            moments = self.vae.quant_conv(self.vae.encoder(frames, feat_cache=self._features, feat_idx=[0]))
            modes.append(moments.chunk(2, dim=1)[0])
        return _normalised(torch.cat(modes, dim=2), self.vae)


def _whole_frames(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """``vae``, if it is one that can stream."""
    if not isinstance(vae, AutoencoderKLWan):
        raise TypeError(f"vae must be diffusers' AutoencoderKLWan, got {type(vae).__name__}")
    if vae.use_tiling:
        raise ValueError("vae must not be tiled: a stream keeps features of whole frames; call vae.disable_tiling()")
    return vae


def _check_frames(video: Tensor, side: int) -> None:
    if not isinstance(video, Tensor) or not video.is_floating_point():
        got = video.dtype if isinstance(video, Tensor) else type(video).__name__
        raise TypeError(f"video must be a floating tensor in [-1, 1], got {got}")
    if video.dim() != 5 or video.shape[1] != 3 or 0 in video.shape or any(size % side for size in video.shape[3:]):
        raise ValueError(f"video must be [B, 3, T, H, W] with H and W multiples of {side}, got {list(video.shape)}")


def chunk_shape(latents: Tensor, channels: int, before: tuple[int, ...] | None) -> tuple[int, ...]:
    """(B, C, h, w) of a chunk's latents [B, ``channels``, f, h, w]; ``before``: of the chunks before, None for a video's first.

    Raises TypeError or ValueError for what cannot be decoded after them.
    """
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents must be a tensor, got {type(latents).__name__}")
    if latents.dim() != 5 or latents.shape[1] != channels or latents.shape[2] < 1:
        raise ValueError(f"latents must be [B, {channels}, f, h, w] with f at least 1, got {list(latents.shape)}")
    batch, _, _, height, width = latents.shape
    shape = (batch, channels, height, width)
    if before not in (None, shape):
        wanted = "[{}, {}, f, {}, {}]".format(*before or ())
        raise ValueError(f"latents must be {wanted} as before, got {list(latents.shape)}; reset() begins another video")
    return shape


@torch.no_grad()
def encode_image(vae: AutoencoderKLWan, image: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] to clean first latent frames [B, C, 1, h, w], normalised: the posterior's mode.

    In fp32 (an fp64 VAE: fp64). Raises ValueError for another shape, or sides that are no multiples of ``pixels_per_latent``.
    """
    if not isinstance(vae, AutoencoderKLWan):
        raise TypeError(f"vae must be diffusers' AutoencoderKLWan, got {type(vae).__name__}")
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a floating tensor in [-1, 1], got {got}")
    side = pixels_per_latent(vae)
    if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % side or image.shape[3] % side or 0 in image.shape:
        raise ValueError(f"image must be [B, 3, H, W] with H and W multiples of {side}, got {list(image.shape)}")
    if not image.abs().max() <= 1.01:  # a resize may overshoot a little
        raise ValueError(f"image must lie in [-1, 1], got [{image.min():.4g}, {image.max():.4g}]")
    return encode_video(vae, image[:, :, None])


@torch.no_grad()
def encode_video(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Videos [B, 3, T, H, W] in [-1, 1] to clean latents [B, C, (T + 3) / 4, h, w], normalised: the posterior's mode.

    In fp32 (an fp64 VAE: fp64). Raises ValueError for another shape, a T that is not 4k + 1, or sides that are no multiples of
    ``pixels_per_latent``.
    """
    if not isinstance(vae, AutoencoderKLWan):
        raise TypeError(f"vae must be diffusers' AutoencoderKLWan, got {type(vae).__name__}")
    _check_frames(video, pixels_per_latent(vae))
    if video.shape[2] % 4 != 1:
        raise ValueError(f"video must have 4k + 1 frames, got {video.shape[2]}")
    return _normalised(vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode(), vae)


def _normalised(latents: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """The VAE's latents as the transformer takes them: ``denormalised``'s inverse, in fp32 or wider."""
    latents = latents.to(torch.promote_types(latents.dtype, torch.float32))
    mean, std = _statistics(vae, latents.dtype)
    return (latents - mean) / std


def denormalised(latents: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """The transformer's latents as ``vae`` made them, in its dtype and on its device."""
    latents = latents.to(vae.device, torch.promote_types(latents.dtype, torch.float32))
    mean, std = _statistics(vae, latents.dtype)
    return (latents * std + mean).to(vae.dtype)


def _statistics(vae: AutoencoderKLWan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels, [C, 1, 1, 1]."""
    config: Any = vae.config
    mean, std = (torch.tensor(values, device=vae.device, dtype=dtype) for values in (config.latents_mean, config.latents_std))
    return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)
