"""Metrics for video that no exact decoder knows: movement, sharpness, drift, and distance of simple features.

Frechet distance: ``|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2))`` between the Gaussians of two feature sets (Heusel et
al. 2017, section 3; here on 8 plain features of a clip instead of a network's).
"""

from __future__ import annotations

import torch

from aadkern_train.worlds.base import Metric

METRICS = {
    "motion": Metric("Motion", "near real", 1, "100 times the mean absolute frame difference over that of real video."),
    "dynamic": Metric("Dynamic", "higher", 1, "Percentage of videos that move at least a quarter as much as the median real one."),
    "sharpness": Metric("Sharpness", "near real", 1, "100 times the mean spatial gradient over that of real video."),
    "drift": Metric("Drift", "lower", 1, "100 times the standard deviation of the sharpness over the parts of a video."),
    "frechet": Metric("Frechet", "lower", 2, "Frechet distance of 8 plain features of a clip: colour, contrast, movement."),
}

SEGMENT = 5  # frames: the segments of drift
BATCH = 32  # videos described at once, to bound memory
STILL = 0.25  # VBench's rule of thumb: a video moves if it has this share of the expected movement


def measure_generic(real: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """Metrics of videos ``x`` beside ``real`` ones, both uint8 RGB [N, T, H, W, 3]; N and T may differ, T >= 2.

    * ``motion``: 100 * mean absolute frame difference, over that of ``real`` (real 100).
    * ``dynamic``: percentage of videos that move at least a quarter as much as the median real one.
    * ``sharpness``: 100 * mean absolute spatial gradient, over that of ``real`` (real 100; blur below, noise above).
    * ``drift``: 100 * standard deviation over segments of 5 frames of sharpness / the clip's mean, mean over videos.
    * ``frechet``: Frechet distance of the clips' features (mean colour, contrast, sharpness, movement, their
      spreads), in units of the real standard deviations (real 0).
    """
    return compare(describe(real, "real"), describe(x, "x"))


def compare(real: Described, x: Described) -> dict[str, float]:
    """``measure_generic`` of videos that are described already."""
    real_features, real_motion, real_sharpness, _ = real
    features, motion, sharpness, segments = x
    still = STILL * real_motion.median()
    relative = segments / segments.mean(dim=1, keepdim=True).clamp_min(1e-6)
    return {
        "motion": 100 * float(motion.mean() / real_motion.mean().clamp_min(1e-6)),
        "dynamic": 100 * float((motion > still).double().mean()),
        "sharpness": 100 * float(sharpness.mean() / real_sharpness.mean().clamp_min(1e-6)),
        "drift": 100 * float(relative.std(dim=1, correction=0).mean()),
        "frechet": frechet_distance(real_features, features),
    }


Described = list[torch.Tensor]
"""Of N videos: features [N, 8], movement [N], sharpness [N] and it per segment [N, segments]; fp64."""


def describe(video: torch.Tensor, name: str = "video") -> Described:
    """What ``compare`` needs of uint8 RGB videos [N, T, H, W, 3]."""
    if video.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {video.dtype}")
    if video.ndim != 5 or video.shape[-1] != 3 or video.shape[1] < 2 or 0 in video.shape:
        raise ValueError(f"{name} must be RGB videos [N, T, H, W, 3] of at least two frames, got {list(video.shape)}")
    described = [_described(some) for some in video.split(BATCH)]
    return [torch.cat(parts) for parts in zip(*described, strict=True)]


def _described(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    pixels = video.float() / 255
    change = pixels.diff(dim=1).abs().mean(dim=(2, 3, 4))
    sharp = (pixels.diff(dim=2).abs().mean(dim=(2, 3, 4)) + pixels.diff(dim=3).abs().mean(dim=(2, 3, 4))) / 2
    contrast = pixels.std(dim=(2, 3), correction=0).mean(dim=(1, 2))
    spreads = change.std(dim=1, correction=0), sharp.std(dim=1, correction=0)
    plain = torch.stack([contrast, sharp.mean(dim=1), change.mean(dim=1), *spreads], dim=1)
    segments = torch.stack([part.mean(dim=1) for part in sharp.split(SEGMENT, dim=1)], dim=1)
    features = torch.cat([pixels.mean(dim=(1, 2, 3)), plain], dim=1)
    return features.double(), change.double().mean(dim=1), sharp.double().mean(dim=1), segments.double()


def frechet_distance(real: torch.Tensor, x: torch.Tensor) -> float:
    """Frechet distance of Gaussians fitted to features [N, D] and [M, D], in units of the real standard deviations."""
    scale = real.std(dim=0, correction=0).clamp_min(1e-3)
    real, x = real.double() / scale, x.double() / scale
    shift = (real.mean(dim=0) - x.mean(dim=0)).square().sum()
    real_cov, x_cov = _covariance(real), _covariance(x)
    values, vectors = torch.linalg.eigh(real_cov)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ x_cov @ root).clamp_min(0).sqrt().sum()
    return max(0.0, float(shift + real_cov.trace() + x_cov.trace() - 2 * cross))


def _covariance(features: torch.Tensor) -> torch.Tensor:
    centred = features - features.mean(dim=0)
    return centred.T @ centred / len(features)
