"""How many videos move: VBench's rule for its dynamic degree, on a pyramid Lucas-Kanade flow instead of RAFT's network.

Flow: Lucas and Kanade, "An iterative image registration technique" (1981), coarse to fine after Bouguet, "Pyramidal implementation
of the Lucas Kanade feature tracker" (2001), at every pixel. The rule: Huang et al., "VBench" (2024), and its public code.
It is not VBench's number: compare stages and runs with it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern_train.worlds.base import Metric

DYNAMIC_LK = Metric(
    "Dynamic (LK)",
    "higher",
    1,
    "Percentage of videos that move by VBench's rule, on Lucas-Kanade flow: at 8 frames a second, in a quarter of the pairs the "
    "largest 5 % of flow are on average above 6/256 of the shorter side. VBench's own number takes RAFT's flow.",
)

RATE = 8  # frames a second that are compared
SIDE = 256  # the shorter side that larger frames are reduced to
MOVES = 6 / 256  # of the shorter side: how far pixels go between two frames that move
LARGEST = 0.05  # share of the pixels that is looked at
COARSEST = 16  # pixels on the shorter side of the smallest level of the pyramid
ITERATIONS, STEP = 3, 1.0  # steps at each level (5 doubled the error), and the longest one in pixels
WEAK = 81 * 4.0  # a window's gradients, squared, in grey levels: weaker ones are noise, and move nothing
BATCH = 8  # pairs at once: few, so that they stay in a CPU's cache


def dynamic_lk(video: Tensor, fps: float) -> float:
    """Percentage of uint8 RGB videos [N, T, H, W, 3] that move; ``moving_lk`` tells the rule and what is refused."""
    return 100 * float(moving_lk(video, fps).double().mean())


@torch.no_grad()
def moving_lk(video: Tensor, fps: float) -> Tensor:
    """Which of uint8 RGB videos [N, T, H, W, 3] at ``fps`` frames a second move, bool [N].

    Every round(fps / 8)-th frame is taken, as VBench does. A pair of frames moves where the mean of the largest 5 % of its flow is
    above 6 min(H, W) / 256 pixels, a video where at least a quarter of its pairs do. Frames with a shorter side above 256 are first
    reduced to that, and the flow then counts in pixels of the reduced frame: the same share of the side, with less detail.

    Raises TypeError for what is not uint8, ValueError for other shapes, an ``fps`` that is not above 0, and fewer than two frames
    to compare.
    """
    if video.dtype != torch.uint8:
        raise TypeError(f"video must be uint8, got {video.dtype}")
    if video.ndim != 5 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be RGB videos [N, T, H, W, 3], got {list(video.shape)}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be above 0, got {fps!r}")
    frames = video[:, :: max(1, round(fps / RATE))]
    if frames.shape[1] < 2:
        raise ValueError(f"video must have two frames at {RATE} a second, got {video.shape[1]} at {fps}")
    return torch.stack([_moves(one) for one in frames])


def _moves(frames: Tensor) -> Tensor:
    grey = reduced(frames)
    side, count = min(grey.shape[-2:]), max(1, int(LARGEST * grey.shape[-2] * grey.shape[-1]))
    levels = pyramid(grey)
    pairs = []
    for start in range(0, len(grey) - 1, BATCH):
        end = min(start + BATCH, len(grey) - 1)
        flow = flow_between([level[start:end] for level in levels], [level[start + 1 : end + 1] for level in levels])
        pairs.append(flow.norm(dim=1).flatten(1).topk(count, sorted=False).values.mean(dim=1))
    return (torch.cat(pairs) > MOVES * side).double().mean() >= 0.25


def reduced(frames: Tensor) -> Tensor:
    """Luma [T, 1, h, w] in [0, 255] of uint8 RGB frames [T, H, W, 3], the shorter side at most 256."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=frames.device)
    grey = torch.stack([(frame.float() @ weights) for frame in frames])[:, None]
    share = SIDE / min(grey.shape[-2:])
    if share >= 1:
        return grey
    size = [round(share * side) for side in grey.shape[-2:]]
    return F.interpolate(grey, size, mode="bilinear", antialias=True, align_corners=False)


def optical_flow(first: Tensor, second: Tensor) -> Tensor:
    """Where the pixels of grey images ``first`` [B, 1, H, W], in [0, 255], went in ``second``: [B, 2, H, W] pixels to the right and
    down. Nothing to hold on to counts as still."""
    return flow_between(pyramid(first), pyramid(second))


def pyramid(images: Tensor) -> list[Tensor]:
    """Images [B, 1, H, W] from the smallest to themselves, each half as large as the next."""
    levels = [images]
    while min(levels[-1].shape[-2:]) >= 2 * COARSEST:
        size = [(side + 1) // 2 for side in levels[-1].shape[-2:]]
        levels.append(F.interpolate(levels[-1], size, mode="bilinear", antialias=True, align_corners=False))
    return levels[::-1]


def flow_between(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """``optical_flow`` of two pyramids."""
    batch, _, *size = first[0].shape
    flow = first[0].new_zeros(batch, 2, *size)
    for a, b in zip(first, second, strict=True):
        flow = _finer(flow, a.shape[-2:])
        flow = _refined(flow, a, b)
    return flow


def _finer(flow: Tensor, size: torch.Size) -> Tensor:
    if flow.shape[-2:] == size:
        return flow
    ratio = flow.new_tensor([size[1] / flow.shape[-1], size[0] / flow.shape[-2]]).view(1, 2, 1, 1)
    return F.interpolate(flow, list(size), mode="bilinear", align_corners=False) * ratio


def _refined(flow: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Gauss-Newton steps from ``flow``: what moves b, drawn back by it, onto a within each pixel's window, up to a difference in
    brightness, which flicker makes: gradients and differences count from their means over the window."""
    gx, gy = _gradient(a)
    count, sx, sy = _sum(torch.ones_like(a[:1])), _sum(gx), _sum(gy)
    xx, xy, yy = _sum(torch.cat([gx * gx, gx * gy, gy * gy], dim=1)).split(1, 1)
    xx, xy, yy = xx - sx * sx / count + WEAK, xy - sx * sy / count, yy - sy * sy / count + WEAK
    inverse = 1 / (xx * yy - xy * xy)
    for _ in range(ITERATIONS):
        drawn, inside = _drawn_back(b, flow)
        d = (a - drawn) * inside
        u, v, s = _sum(torch.cat([gx * d, gy * d, d], dim=1)).split(1, 1)
        u, v = u - sx * s / count, v - sy * s / count
        step = torch.cat([yy * u - xy * v, xx * v - xy * u], dim=1) * inverse
        flow = flow + step.clamp(-STEP, STEP)
    return _median(flow)


def _gradient(a: Tensor) -> tuple[Tensor, Tensor]:
    wide = F.pad(a, (1, 1, 1, 1), mode="replicate")
    return (wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]) / 2, (wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]) / 2


def _sum(x: Tensor) -> Tensor:
    """The sum over each pixel's window of 9 x 9, as far as it lies in the image: of 2, 4, 8 and 9 pixels, one direction after the
    other, which costs a tenth of pooling's time on a CPU."""
    for dim, pad in ((-1, (4, 4, 0, 0)), (-2, (0, 0, 4, 4))):
        size = x.shape[dim]
        wide = F.pad(x, pad)
        two = wide.narrow(dim, 0, size + 7) + wide.narrow(dim, 1, size + 7)
        four = two.narrow(dim, 0, size + 5) + two.narrow(dim, 2, size + 5)
        x = four.narrow(dim, 0, size) + four.narrow(dim, 4, size) + wide.narrow(dim, 8, size)
    return x


def _drawn_back(b: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """b at each pixel's place moved by flow, and whether that lies in the image."""
    height, width = b.shape[-2:]
    y = torch.arange(height, device=b.device, dtype=b.dtype)[:, None] + flow[:, 1]
    x = torch.arange(width, device=b.device, dtype=b.dtype) + flow[:, 0]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    return F.grid_sample(b, grid, mode="bilinear", padding_mode="border", align_corners=True), inside[:, None]


def _median(flow: Tensor) -> Tensor:
    """The median of the 3 x 3 pixels around each: single pixels gone astray are put back among the others.

    Of three sorted columns it is the middle one of the largest of the least, the middle of the middle, and the least of the largest
    values, which costs a tenth of torch's own median.
    """
    height, width = flow.shape[-2:]
    wide = F.pad(flow, (1, 1, 1, 1), mode="replicate")
    a, b, c = (wide[..., i : i + height, :] for i in range(3))
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    least, middle, most = torch.minimum(low, c), torch.maximum(low, torch.minimum(high, c)), torch.maximum(high, c)
    columns = [[x[..., j : j + width] for j in range(3)] for x in (least, middle, most)]
    largest = torch.maximum(torch.maximum(*columns[0][:2]), columns[0][2])
    smallest = torch.minimum(torch.minimum(*columns[2][:2]), columns[2][2])
    return _middle(largest, _middle(*columns[1]), smallest)


def _middle(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
