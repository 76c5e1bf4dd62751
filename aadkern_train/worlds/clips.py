"""A world of real videos: clips from a folder of files, as small patch-space latents [B, F, C, H/p, W/p]."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.decoding import decode
from aadkern_train.engine.recipe import Recipe, WorldSettings
from aadkern_train.engine.video import write_video
from aadkern_train.engine.work import Sizes
from aadkern_train.networks.conditions import Condition
from aadkern_train.worlds.base import SPLITS, Metric
from aadkern_train.worlds.generic_metrics import METRICS, measure_generic
from aadkern_train.worlds.patch_latents import PatchLatents
from aadkern_train.worlds.video_folder import VideoFolder

WHOLE_VIDEOS = 8  # from so many videos on, whole videos are held out; with fewer, the ends of the videos are
TEST_SHARE = 0.1
LONG = 3  # test videos are preferably as many times as long as a clip: rollouts are measured at that length too
FIT_FRAMES = 2048  # frames that the latents are fitted on, spread evenly over the training videos

Span = tuple[str, int, int]  # a video's name, and its frames [start, end)


Count = Annotated[int, Field(ge=1)]


@WorldSettings.member("clips")
class ClipsData(WorldSettings):
    """A folder of video files."""

    kind: str = "clips"
    path: str = ""
    height: Count = 32  # pixels, after resize and centre crop
    width: Count = 32
    fps: Annotated[float, Field(gt=0)] = 8.0  # frames per second that the model sees
    patch: Count = 4  # pixels per side of a latent's patch
    channels: Count = 16  # principal components kept of the 3 patch^2 numbers in a patch

    def sizes(self, recipe: Recipe) -> Sizes:
        return Sizes((self.channels, self.height // self.patch, self.width // self.patch), None)

    def check(self, recipe: Recipe) -> None:
        if recipe.models.teacher == "exact":
            raise ValueError("models.teacher can be exact only for digits; a folder of videos has no known law")
        if recipe.task == "t2v":
            raise ValueError("task must be i2v for a folder of videos: without captions nothing else says what to generate")

    def open(self, *, frames: int, seed: int, folder: Path, clips: bool = True) -> ClipsWorld | PictureWorld:
        if not clips:
            return PictureWorld(PatchLatents.load(folder / "latents.safetensors"), (self.height, self.width))
        if not self.path:
            raise ValueError("data.path must name a folder of videos")
        size, latents = (self.height, self.width), {"patch": self.patch, "channels": self.channels}
        return ClipsWorld(self.path, size, frames, self.fps, **latents, seed=seed, cache_dir=folder)


class PictureWorld:
    """What streaming needs of a folder of videos, from a run's latents alone: the shape of a frame, and pixels both ways."""

    null = None
    fps = 6.0  # slower than the model sees them, to be looked at
    fingerprint = None  # decoded frames are kept by each file's size and time

    def __init__(self, latents: PatchLatents, size: tuple[int, int]) -> None:
        self.latents, self.size = latents, size
        self.frame_shape = (latents.channels, size[0] // latents.patch, size[1] // latents.patch)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What ``measure`` gives."""
        return METRICS

    def picture(self, path: Path) -> torch.Tensor:
        """The first frame of an image or video file as a latent frame [1, C, H/p, W/p], scaled and cropped to the world's size."""
        return self.latents.encode(decode(path, self.size, None)[None, :1])[:, 0]

    def film(self, frames: np.ndarray) -> torch.Tensor:
        """Frames [F, H, W, 3] of the world's size as latent frames [F, C, H/p, W/p]."""
        return self.latents.encode(torch.from_numpy(frames))

    def to_rgb(self, x: torch.Tensor) -> torch.Tensor:
        """Latents x [B, F, C, H/p, W/p] as uint8 [B, F, H, W, 3]."""
        return self.latents.decode(x)

    def embed(self, captions: Sequence[str]) -> torch.Tensor:
        """Nothing has words here: raises ValueError."""
        raise ValueError(f"prompt must be left out: a folder of videos has no captions, got {list(captions)}")

    def describe(self, condition: Condition) -> None:
        """None: no captions."""

    def turned(self, condition: Condition) -> None:
        """None: no captions."""


class ClipsWorld(PictureWorld):
    """Clips of ``frames`` latent frames from the videos under ``path``, at ``size`` (height, width) and ``fps``.

    ``fps`` None takes all frames. A latent frame is one video frame in ``PatchLatents`` (``patch``, ``channels``),
    fitted on the training videos and kept in ``cache_dir``, as are the decoded frames, so that a resumed run sees the
    same latents. Of 8 videos or more a tenth, at least 2, is held out as "test"; of fewer, the last stretch of each.
    ``skipped`` lists (path, reason) of the files that cannot be used.

    Raises ValueError where the folder holds no usable video, nothing is long enough to hold out, or an argument does
    not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int] = (64, 64),
        frames: int = 13,
        fps: float | None = 8.0,
        patch: int = 4,
        channels: int = 16,
        seed: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        _check(size, frames, fps, patch, channels)
        self.size, self.frames, self.fps = (int(size[0]), int(size[1])), frames, fps
        cached_frames = None if cache_dir is None else Path(cache_dir) / "frames"
        self.folder = VideoFolder(path, self.size, fps, frames, cached_frames, cache_bytes)
        self.skipped = self.folder.skipped
        self._spans = _split(self.folder, frames, Draws(seed, "clips", "held out"))
        self._draws = Draws(seed, "clips")
        saved = None if cache_dir is None else Path(cache_dir) / "latents.safetensors"
        super().__init__(self._latents(patch, channels, saved), self.size)

    def _latents(self, patch: int, channels: int, saved: Path | None) -> PatchLatents:
        if saved is not None and saved.exists():
            latents = PatchLatents.load(saved)
            if (latents.patch, latents.channels) != (patch, channels):
                had = f"patch={latents.patch} and channels={latents.channels}"
                raise ValueError(f"patch={patch} and channels={channels} differ from the {had} that {saved} was fitted with")
            return latents
        spans = self._spans["train"]
        each = max(1, FIT_FRAMES // len(spans))
        chosen = [self.folder.frames(name)[torch.linspace(a, b - 1, min(each, b - a)).long()] for name, a, b in spans[:FIT_FRAMES]]
        latents = PatchLatents.fit(torch.cat(chosen), patch, channels)
        if saved is not None:
            latents.save(saved)
        return latents

    def longest(self, split: str = "train") -> int | None:
        """Frames in the longest stretch of a split: the most that ``clips`` can give."""
        return max(end - start for _, start, end in self._spans["train" if split == "curated" else split])

    def _room(self, split: str) -> int:
        """Frames that every start leaves room for."""
        long = [end - start >= LONG * self.frames for _, start, end in self._spans[split]]
        return LONG * self.frames if split == "test" and 2 * sum(long) >= len(long) else self.frames

    def rgb_clips(self, indices: Sequence[int], frames: int | None = None, split: str = "train") -> torch.Tensor:
        """The clips as uint8 [B, F, H, W, 3]: a pure function of the indices, each start equally likely.

        A shorter clip of an index is the beginning of its longer one, up to the world's ``frames`` (3 times that, where
        half the held-out videos are so long); beyond, clips start elsewhere. Raises ValueError beyond ``longest``.
        """
        frames = self.frames if frames is None else frames
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        split = "train" if split == "curated" else split
        if frames < 1 or frames > self.longest(split):
            raise ValueError(f"frames must lie in [1, {self.longest(split)}], the longest {split} video, got {frames}")
        room = max(frames, self._room(split))
        spans = [span for span in self._spans[split] if span[2] - span[1] >= room]
        ends = list(accumulate(end - start - room + 1 for _, start, end in spans))
        clips = []
        for draw in self._draws.integers(f"start {split}", list(indices), ends[-1]).tolist():
            which = int(np.searchsorted(ends, draw, side="right"))
            name, _, end = spans[which]
            start = end - room - (ends[which] - 1 - draw)
            clips.append(self.folder.frames(name)[start : start + frames])
        return torch.stack(clips) if clips else torch.empty(0, frames, *self.size, 3, dtype=torch.uint8)

    def clips(self, indices: Sequence[int], frames: int | None = None, split: str = "train") -> torch.Tensor:
        """Latent clips x [B, F, C, H/p, W/p], fp32: a pure function of the indices."""
        return self.latents.encode(self.rgb_clips(indices, frames, split))

    def condition(self, indices: Sequence[int], split: str = "train") -> Condition:
        """The clips' first frames."""
        return Condition(self.clips(indices, 1, split)[:, 0])

    def held_out(self, index: int, caption: str | None = None) -> Condition:
        """A held-out first frame."""
        if caption is not None:
            self.embed([caption])
        return self.condition([index], "test")

    def measure(self, x: torch.Tensor, condition: Condition, real: torch.Tensor) -> dict[str, float]:
        """``measure_generic`` of latents x against real latents, both [B, F, C, H/p, W/p]."""
        return measure_generic(self.to_rgb(real), self.to_rgb(x))


def _check(size: tuple[int, int], frames: int, fps: float | None, patch: int, channels: int) -> None:
    if len(size) != 2 or any(side < 1 or side % patch for side in size):
        raise ValueError(f"size must be (height, width) in pixels, both divisible by patch={patch}, got {tuple(size)}")
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    if fps is not None and not 0 < fps <= 240:
        raise ValueError(f"fps must lie in (0, 240] or be None, got {fps!r}")
    if not 1 <= channels <= 3 * patch * patch:
        raise ValueError(f"channels must lie in [1, {3 * patch * patch}] for patch={patch}, got {channels}")


def _split(folder: VideoFolder, frames: int, draws: Draws) -> dict[str, list[Span]]:
    videos = list(zip(folder.names, folder.lengths, strict=True))
    if len(videos) >= WHOLE_VIDEOS:
        whole = [(name, 0, length) for name, length in videos]

        def rank(video: Span) -> tuple[bool, float]:
            return video[2] < LONG * frames, float(draws.uniform(video[0], [0]))

        test = sorted(whole, key=rank)[: max(2, round(TEST_SHARE * len(whole)))]
        return {"train": [video for video in whole if video not in test], "test": sorted(test)}
    train: list[Span] = []
    test = []
    for name, length in videos:
        least = LONG * frames if length >= 3 * LONG * frames else frames
        held = max(least, round(TEST_SHARE * length)) if length >= 2 * frames else 0
        train.append((name, 0, length - held))
        if held:
            test.append((name, length - held, length))
    if not test and len(train) > 1:
        test.append(train.pop())
    if not test:
        name, length = videos[0]
        raise ValueError(f"path holds one usable video, {name} of {length} frames; to hold some out it must have {2 * frames}")
    return {"train": train, "test": test}


def make_example_videos(
    folder: str | os.PathLike[str],
    count: int = 12,
    frames: int = 64,
    size: tuple[int, int] = (72, 96),
    fps: float = 16,
    seed: int = 0,
) -> list[Path]:
    """Writes ``count`` small mp4 files of coloured balls that bounce over a drifting gradient, for tests and trials."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    paths = []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        colours, radius = rng.uniform(0.2, 1, (4, 3)), height * rng.uniform(0.1, 0.2, 2)
        position, velocity = rng.uniform(0, 1, (2, 2)), rng.uniform(-0.04, 0.04, (2, 2))
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(-0.15, 0.15)
        pictures = np.empty((frames, height, width, 3))
        for t in range(frames):
            wave = np.sin((np.cos(angle) * x + np.sin(angle) * y) * 6 / width + speed * t)[..., None] / 2 + 0.5
            pictures[t] = wave * colours[0] + (1 - wave) * colours[1] * 0.5
            for ball in range(2):
                turn = (position[ball] + velocity[ball] * t) % 2
                at = np.minimum(turn, 2 - turn) * (height - 1, width - 1)
                inside = np.clip(radius[ball] - np.hypot(y - at[0], x - at[1]), 0, 1)[..., None]
                pictures[t] += inside * (colours[2 + ball] - pictures[t])
        paths.append(write_video(Path(folder) / f"example-{i:03d}.mp4", (255 * pictures).astype(np.uint8), fps))
    return paths
