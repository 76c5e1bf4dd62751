"""Moving digits on a torus: real handwritten digits that jump one patch per frame by a known Markov law.

p_{t+1} = p_t + v_t  (mod torus),    v_{t+1} = v_t with probability keep, else uniform over the 8 neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from aadkern_train.diffusion.draws import Draws

if TYPE_CHECKING:
    from aadkern_train.worlds.digits_teacher import ExactTeacher

STEP = 4  # pixels per lattice step: one patch
DIGIT = 8  # pixels per side of scikit-learn's digits
# (dy, dx) in lattice steps; VELOCITIES[7 - i] is the opposite of VELOCITIES[i].
VELOCITIES = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
HELD_OUT = 1 / 8  # share of the (sprite, position) pairs that only test clips start from
TYPICAL = 0.5  # sprites come from the half of each class nearest its mean, so that a reader recognises them


@dataclass(frozen=True)
class DigitsWorld:
    """A law of videos x [B, F, 1, torus, torus]; each frame has zero mean and unit variance.

    sprites: how many different digits, 1 to 10 (a clip shows one). torus: pixels per side, a multiple of 4, at least
    12. keep: probability that a frame keeps its velocity; else it is drawn anew from all 8, so velocities repeat at
    `keep_rate`. seed: of the clips; sprites and the train/test split do not depend on it. real_clips: if given,
    "train" holds only so many clips (index modulo real_clips), to study what a discriminator memorises. Another law
    is `dataclasses.replace(world, keep=...)`.

    A position is y * lattice + x in units of 4 pixels, and says where the digit's top left corner is.
    Raises ValueError for values outside these ranges, TypeError for other types.
    """

    sprites: int = 4
    torus: int = 16
    keep: float = 0.75
    seed: int = 0
    real_clips: int | None = None

    def __post_init__(self) -> None:
        for name in ("sprites", "torus", "seed", "real_clips"):
            value = getattr(self, name)
            if name == "real_clips" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if not 1 <= self.sprites <= 10:
            raise ValueError(f"sprites must be 1 to 10 (one per digit class), got {self.sprites}")
        if self.torus % STEP or self.torus < 12:
            raise ValueError(f"torus must be a multiple of {STEP} pixels and at least 12, got {self.torus}")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep must be a probability in [0, 1], got {self.keep}")
        if self.real_clips is not None and self.real_clips < 1:
            raise ValueError(f"real_clips must be at least 1 or None, got {self.real_clips}")

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one frame."""
        return (1, self.torus, self.torus)

    @property
    def lattice(self) -> int:
        """Positions per side."""
        return self.torus // STEP

    @property
    def positions(self) -> int:
        """Positions in all, which is also the number of different displacements."""
        return self.lattice**2

    @property
    def keep_rate(self) -> float:
        """Probability that two consecutive velocities are equal: keep + (1 - keep) / 8."""
        return self.keep + (1 - self.keep) / len(VELOCITIES)

    @cached_property
    def renders(self) -> Tensor:
        """Every frame there is, fp32 [sprites, positions, 1, torus, torus]."""
        canvas = torch.zeros(self.sprites, self.torus, self.torus, dtype=torch.float64)
        canvas[:, :DIGIT, :DIGIT] = torch.from_numpy(chosen_digits(self.sprites, self.torus))
        canvas = (canvas - canvas.mean((1, 2), keepdim=True)) / canvas.std((1, 2), correction=0, keepdim=True)
        shifts = [(STEP * y, STEP * x) for y in range(self.lattice) for x in range(self.lattice)]
        return torch.stack([canvas.roll(shift, (1, 2)) for shift in shifts], 1)[:, :, None].float()

    @cached_property
    def moved(self) -> Tensor:
        """int64 [positions, 8]: where each velocity leads from each position."""
        here = torch.arange(self.positions)[:, None]
        y, x = here // self.lattice, here % self.lattice
        dy, dx = torch.tensor(VELOCITIES).T
        return (y + dy) % self.lattice * self.lattice + (x + dx) % self.lattice

    def first_pairs(self, split: str = "train") -> Tensor:
        """int64 [N, 2]: the (sprite, position) pairs that clips of this split start from; the two splits share none."""
        _check_split(split)
        order = Draws(0, "digits").uniform("held out", range(self.sprites), (self.positions,)).argsort(1)
        held_out = torch.zeros(self.sprites, self.positions, dtype=torch.bool)
        held_out.scatter_(1, order[:, : max(1, round(self.positions * HELD_OUT))], True)
        return (held_out if split == "test" else ~held_out).nonzero()

    def first_frames(self, split: str = "train") -> Tensor:
        """Every first frame of a split, [N, 1, torus, torus], in the order of `first_pairs`."""
        return self.render(*self.first_pairs(split).T)

    def render(self, sprite: Tensor | int, position: Tensor | int) -> Tensor:
        """The frames [..., 1, torus, torus] of sprites and positions, integers of any shapes that broadcast."""
        return self.renders[sprite, position]

    def paths(self, indices: Sequence[int], frames: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """What clips show: sprite int64 [B], position int64 [B, F]. A shorter clip is the beginning of a longer one."""
        _check_split(split)
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        if split == "train" and self.real_clips is not None:
            indices = [int(index) % self.real_clips for index in indices]
        numbers = Draws(self.seed, "digits", split).uniform("law", indices, (frames, 2))
        pairs = self.first_pairs(split)
        sprite, start = pairs[_pick(numbers[:, 0, 0], len(pairs))].T
        drawn = _pick(numbers[:, 1:, 1], len(VELOCITIES))
        fresh = numbers[:, 1:, 0] >= self.keep
        latest = torch.where(fresh, torch.arange(frames - 1), 0).cummax(1).values  # the first velocity is always fresh
        moves = torch.tensor(VELOCITIES)[drawn.gather(1, latest)].cumsum(1)
        first = torch.stack([start // self.lattice, start % self.lattice], -1)[:, None]
        y, x = ((torch.cat([torch.zeros_like(first), moves], 1) + first) % self.lattice).unbind(-1)
        return sprite, y * self.lattice + x

    def clips(self, indices: Sequence[int], frames: int, split: str = "train") -> Tensor:
        """Clips x [B, F, 1, torus, torus] fp32, a function of (seed, split, index) alone.

        Those of "train" never start from a pair of "test"; later frames may show any.
        """
        sprite, position = self.paths(indices, frames, split)
        return self.render(sprite[:, None], position)

    def static(self, clip: Tensor) -> Tensor:
        """The frozen video of a clip [B, F, C, H, W]: its first frame, F times."""
        return clip[:, :1].repeat(1, clip.shape[1], 1, 1, 1)

    def to_rgb(self, x: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] of x [B, F, 1, H, W]: the world's darkest and brightest pixel become 0 and 255."""
        low, high = self.renders.min(), self.renders.max()
        grey = ((x.detach().float() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        return grey[:, :, 0, :, :, None].repeat(1, 1, 1, 1, 3)

    @cached_property
    def teacher(self) -> ExactTeacher:
        """The exact teacher of this law, CPU, fp32; `ExactTeacher(world)` makes one for another device or precision."""
        from aadkern_train.worlds.digits_teacher import ExactTeacher  # its tables are built from this module's

        return ExactTeacher(self)

    def denoise(self, x_sigma: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_sigma] by the exact teacher; x_sigma [B, F, 1, H, W], sigma [B, F], 0 where a frame is known."""
        return self.teacher(x_sigma, sigma)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')


def _pick(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long().clamp(max=count - 1)  # fp32 rounds (1 - 2^-24) * count up to count


@lru_cache
def chosen_digits(count: int, torus: int) -> np.ndarray:
    """`count` of scikit-learn's handwritten digits, one per class, values in [0, 1], fp64 [count, 8, 8].

    Chosen to make the largest correlation of two different frames small: the first is the digit least like its own
    shifts, each next one the least like those before, then each is replaced by the best for the others until nothing
    improves. With 4 digits the largest correlation is 0.49 on a torus of 16 pixels, and 0.52 on one of 24.
    """
    images, labels = _typical_digits()
    canvas = np.zeros((len(images), torus, torus))
    canvas[:, :DIGIT, :DIGIT] = images
    canvas -= canvas.mean((1, 2), keepdims=True)
    canvas /= np.sqrt((canvas**2).sum((1, 2), keepdims=True))
    shifts = [(y, x) for y in range(0, torus, STEP) for x in range(0, torus, STEP)]
    shifted = np.stack([np.roll(canvas, shift, (1, 2)).reshape(len(images), -1) for shift in shifts])
    self_likeness = np.einsum("snd,nd->sn", shifted[1:], shifted[0]).max(0)

    def likeness(digit: int) -> np.ndarray:
        return (shifted[0] @ shifted[:, digit].T).max(1)

    def best(others: list[int]) -> tuple[int, np.ndarray]:
        worst = np.max([self_likeness, *(likeness(other) for other in others)], axis=0)
        worst[np.isin(labels, labels[others])] = np.inf
        return int(worst.argmin()), worst

    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(best(chosen)[0])
    improved = True
    while improved:
        improved = False
        for slot, digit in enumerate(chosen):
            better, worst = best(chosen[:slot] + chosen[slot + 1 :])
            if worst[better] < worst[digit] - 1e-9:
                chosen[slot], improved = better, True
    return images[chosen]


def _typical_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits nearest their class mean, in the data set's order: images [N, 8, 8] in [0, 1] and labels [N]."""
    from sklearn.datasets import load_digits  # 0.6 s to import: only those who use this world pay for it

    data = load_digits()
    images, labels = data.images / 16, data.target
    kept: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        distance = ((images[members] - images[members].mean(0)) ** 2).sum((1, 2))
        kept.extend(members[distance.argsort(kind="stable")[: int(len(members) * TYPICAL)]])
    kept.sort()
    return images[kept], labels[kept]
