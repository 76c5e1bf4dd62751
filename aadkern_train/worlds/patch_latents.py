"""Small latents for real video without a VAE: patches of pixels in an orthonormal basis, each channel at unit variance.

``z = (B (patch - mean)) / std`` and back ``patch = B^T (std z) + mean``, with pixels in [-1, 1] and B the C leading
principal axes of the data's patches. Principal axes lose the least squared error that C linear channels can; 16 from
4 x 4 x 3 is the channel count of Wan's VAE, and all 48 lose nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file

from aadkern_train.engine.files import atomic_path, save_tensors

LEAST_STD = 1 / 255  # half a grey level: a flat channel is not blown up to unit variance


def _patches(rgb: torch.Tensor, patch: int) -> torch.Tensor:
    """uint8 [..., H, W, 3] to [..., H/p, W/p, p*p*3] in [-1, 1]."""
    pixels = rgb.to(torch.float32) / 127.5 - 1
    return rearrange(pixels, "... (h p) (w q) rgb -> ... h w (p q rgb)", p=patch, q=patch)


@dataclass(frozen=True, eq=False)
class PatchLatents:
    """An invertible linear map between RGB frames and latent frames of C channels, p times smaller on each side.

    ``basis`` [C, p*p*3] has orthonormal rows, ``mean`` [p*p*3] is the mean patch, ``std`` [C] the channels' standard
    deviations in pixel units ([-1, 1]), ``kept`` the share of the variance that the C channels hold.
    """

    patch: int
    basis: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    kept: float

    @property
    def channels(self) -> int:
        """C, the channels of a latent frame."""
        return self.basis.shape[0]

    @classmethod
    def fit(cls, rgb: torch.Tensor, patch: int = 4, channels: int = 16) -> PatchLatents:
        """The principal axes of the patches of ``rgb`` uint8 [N, H, W, 3], in fp64; an axis's largest entry is
        positive."""
        if patch < 1 or rgb.shape[-3] % patch or rgb.shape[-2] % patch:
            raise ValueError(f"patch must divide the frame size {tuple(rgb.shape[-3:-1])}, got {patch}")
        width = patch * patch * 3
        if not 1 <= channels <= width:
            raise ValueError(f"channels must lie in [1, {width}] for patch {patch}, got {channels}")
        samples = _patches(rgb, patch).reshape(-1, width).double()
        mean = samples.mean(dim=0)
        centred = samples - mean
        variances, axes = torch.linalg.eigh(centred.T @ centred / len(samples))
        variances, axes = variances.flip(0).clamp_min(0), axes.flip(1).T
        basis = axes[:channels]
        largest = basis.gather(1, basis.abs().argmax(dim=1, keepdim=True))
        kept = float(variances[:channels].sum() / variances.sum().clamp_min(1e-12))
        std = variances[:channels].sqrt().clamp_min(LEAST_STD)
        return cls(patch, (basis * largest.sign()).float(), mean.float(), std.float(), kept)

    def encode(self, rgb: torch.Tensor) -> torch.Tensor:
        """uint8 [B, F, H, W, 3] to latents x [B, F, C, H/p, W/p], fp32."""
        if rgb.dtype != torch.uint8:
            raise TypeError(f"rgb must be uint8, got {rgb.dtype}")
        if rgb.shape[-1] != 3 or rgb.shape[-3] % self.patch or rgb.shape[-2] % self.patch:
            raise ValueError(f"rgb must be [..., H, W, 3] with H and W divisible by {self.patch}, got {list(rgb.shape)}")
        z = (_patches(rgb, self.patch) - self.mean) @ self.basis.T / self.std
        return z.movedim(-1, -3).contiguous()

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents x [B, F, C, H/p, W/p] to uint8 [B, F, H, W, 3], clamped to the range of pixels."""
        if x.ndim < 3 or x.shape[-3] != self.channels:
            raise ValueError(f"x must be [B, F, C, H, W] with C = {self.channels}, got {list(x.shape)}")
        z = x.detach().float().cpu().movedim(-3, -1)
        patches = (z * self.std) @ self.basis + self.mean
        pixels = rearrange(patches, "... h w (p q rgb) -> ... (h p) (w q) rgb", p=self.patch, q=self.patch, rgb=3)
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the map as safetensors, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"basis": self.basis.contiguous(), "mean": self.mean, "std": self.std}
        numbers = {"patch": torch.tensor(self.patch), "kept": torch.tensor(self.kept, dtype=torch.float64)}
        with atomic_path(path) as partial:
            save_tensors(tensors | numbers, partial)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PatchLatents:
        """The map that ``save`` wrote: enough to encode a first frame and show a generated video without the videos."""
        saved = load_file(path)
        return cls(int(saved["patch"]), saved["basis"], saved["mean"], saved["std"], float(saved["kept"]))
