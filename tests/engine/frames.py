"""Frames for video files."""

from __future__ import annotations

import numpy as np
import torch


def smooth_frames(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    phase = rng.uniform(0, 6, 3)
    frames = [[np.sin(x / width * 3 + y / height * 2 + t * 0.4 + p) for p in phase] for t in range(count)]
    return torch.from_numpy((127.5 * (1 + np.array(frames))).astype(np.uint8)).permute(0, 2, 3, 1).contiguous()
