"""The law of moving digits: real handwritten digits that jump one patch per frame over a torus by known chances.

Without captions:  p_{t+1} = p_t + v_t  (mod torus),   v_{t+1} = v_t with probability keep, else uniform over the 8 neighbours.
With captions:     p_{t+1} = p_t + v_t  (mod torus),   v_t = the captioned direction with probability keep, else uniform over
the 8 neighbours, each frame for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.worlds.base import SPLITS
from aadkern_train.worlds.digits_captions import VELOCITIES, Captions
from aadkern_train.worlds.digits_sprites import DIGIT, STEP, chosen_digits

HELD_OUT = 1 / 8  # share of the (sprite, position) pairs that only test clips start from
KEEP = {False: 0.75, True: 0.9}  # by captions: at .75 a network did not learn them within 750 steps


@dataclass(frozen=True)
class DigitsLaw:
    """A law of videos x [B, F, 1, torus, torus]; each sharp frame has zero mean and unit variance.

    sprites: how many different digits, 1 to 10 (a clip shows one). torus: pixels per side, a multiple of 4, at least
    12. keep: probability that a frame keeps its velocity, or with captions that it moves in the captioned direction; else
    it is drawn anew from all 8. None is 0.75, and 0.9 with captions. seed: of the clips; sprites and the train/test split
    do not depend on it. real_clips: if given, "train" and "curated" hold only so many clips (index modulo real_clips), to
    study what a discriminator memorises.

    captions: every clip is made under a caption, a digit and one of the 8 directions, all equally likely. Then the sorts of
    clips differ: those of "train" are like a web's, blurred by `blur` in every frame but the first, (1 - blur) x + blur (mean
    of x shifted by one pixel in 8 ways), while "curated" and "test" clips are sharp and keep by `curated_keep`. Without
    captions, `blur` and `curated_keep` do not count, and "curated" has the clips of "train".

    A position is y * lattice + x in units of 4 pixels, and says where the digit's top left corner is; a direction is an index
    of `VELOCITIES`. Another law is `dataclasses.replace(law, keep=...)`.
    Raises ValueError for values outside these ranges, TypeError for other types.
    """

    sprites: int = 4
    torus: int = 16
    keep: float | None = None
    seed: int = 0
    real_clips: int | None = None
    captions: bool = False
    blur: float = 0.7
    curated_keep: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.captions, bool):
            raise TypeError(f"captions must be True or False, got {self.captions!r}")
        if self.keep is None:
            object.__setattr__(self, "keep", KEEP[self.captions])
        for name in ("sprites", "torus", "seed", "real_clips"):
            value = getattr(self, name)
            if name == "real_clips" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        for name in ("keep", "blur", "curated_keep"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if not 1 <= self.sprites <= 10:
            raise ValueError(f"sprites must be 1 to 10 (one per digit class), got {self.sprites}")
        if self.torus % STEP or self.torus < 12:
            raise ValueError(f"torus must be a multiple of {STEP} pixels and at least 12, got {self.torus}")
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
    def obey_rate(self) -> float:
        """keep + (1 - keep) / 8: probability of the last velocity, or with captions of the captioned direction ("train")."""
        return self.keep + (1 - self.keep) / len(VELOCITIES)

    @property
    def keep_rate(self) -> float:
        """Probability that two consecutive velocities are equal ("train"); with captions both obey or both stray alike."""
        stray = (1 - self.keep) / len(VELOCITIES)
        return self.obey_rate**2 + (len(VELOCITIES) - 1) * stray**2 if self.captions else self.obey_rate

    @cached_property
    def transitions(self) -> Tensor:
        """fp64 [8, 8], rows sum to 1: chances of each velocity after one, or with captions under each captioned direction."""
        n = len(VELOCITIES)
        return self.keep * torch.eye(n, dtype=torch.float64) + (1 - self.keep) / n

    def keep_of(self, split: str) -> float:
        """The probability of keeping in clips of a split."""
        _check_split(split)
        return self.curated_keep if self.captions and split != "train" else self.keep

    def blur_of(self, split: str) -> float:
        """How blurred the frames after the first are in clips of a split, 0 to 1."""
        _check_split(split)
        return self.blur if self.captions and split == "train" else 0.0

    @cached_property
    def language(self) -> Captions:
        """The words of the captions."""
        return Captions(chosen_digits(self.sprites, self.torus)[1])

    @cached_property
    def renders(self) -> Tensor:
        """Every sharp frame there is, fp32 [sprites, positions, 1, torus, torus]."""
        canvas = torch.zeros(self.sprites, self.torus, self.torus, dtype=torch.float64)
        canvas[:, :DIGIT, :DIGIT] = torch.from_numpy(chosen_digits(self.sprites, self.torus)[0])
        canvas = (canvas - canvas.mean((1, 2), keepdim=True)) / canvas.std((1, 2), correction=0, keepdim=True)
        shifts = [(STEP * y, STEP * x) for y in range(self.lattice) for x in range(self.lattice)]
        return torch.stack([canvas.roll(shift, (1, 2)) for shift in shifts], 1)[:, :, None].float()

    @cached_property
    def blurred_renders(self) -> Tensor:
        """The same frames as "train" clips show them after their first, [sprites, positions, 1, torus, torus]."""
        around = sum(self.renders.roll(shift, (-2, -1)) for shift in VELOCITIES) / len(VELOCITIES)
        blur = self.blur_of("train")
        return (1 - blur) * self.renders + blur * around

    @cached_property
    def moved(self) -> Tensor:
        """int64 [positions, 8]: where each velocity leads from each position."""
        here = torch.arange(self.positions)[:, None]
        y, x = here // self.lattice, here % self.lattice
        dy, dx = torch.tensor(VELOCITIES).T
        return (y + dy) % self.lattice * self.lattice + (x + dx) % self.lattice

    def first_pairs(self, split: str = "train") -> Tensor:
        """int64 [N, 2]: the (sprite, position) pairs that clips of this split start from; "test" shares none with the others."""
        _check_split(split)
        order = Draws(0, "digits").uniform("held out", range(self.sprites), (self.positions,)).argsort(1)
        held_out = torch.zeros(self.sprites, self.positions, dtype=torch.bool)
        held_out.scatter_(1, order[:, : max(1, round(self.positions * HELD_OUT))], True)
        return (held_out if split == "test" else ~held_out).nonzero()

    def render(self, sprite: Tensor | int, position: Tensor | int) -> Tensor:
        """The sharp frames [..., 1, torus, torus] of sprites and positions, integers of any shapes that broadcast."""
        return self.renders[sprite, position]

    def stories(self, indices: Sequence[int], frames: int, split: str = "train") -> tuple[Tensor, Tensor, Tensor]:
        """What clips show: sprite int64 [B], direction int64 [B] (-1 without captions), position int64 [B, F].

        A function of (seed, split, index) alone; a shorter clip is the beginning of a longer one.
        """
        _check_split(split)
        if frames < 1:
            raise ValueError(f"frames must be at least 1, got {frames}")
        if split == "curated" and not self.captions:
            split = "train"
        if split != "test" and self.real_clips is not None:
            indices = [int(index) % self.real_clips for index in indices]
        scope = "captioned digits" if self.captions else "digits"
        numbers = Draws(self.seed, scope, split).uniform("law", indices, (frames, 2))
        pairs = self.first_pairs(split)
        sprite, start = pairs[_pick(numbers[:, 0, 0], len(pairs))].T
        drawn = _pick(numbers[:, 1:, 1], len(VELOCITIES))
        fresh = numbers[:, 1:, 0] >= self.keep_of(split)
        if self.captions:
            direction = _pick(numbers[:, 0, 1], len(VELOCITIES))
            velocity = torch.where(fresh, drawn, direction[:, None])
        else:
            direction = torch.full_like(sprite, -1)
            latest = torch.where(fresh, torch.arange(frames - 1), 0).cummax(1).values  # the first velocity is always fresh
            velocity = drawn.gather(1, latest)
        moves = torch.tensor(VELOCITIES)[velocity].cumsum(1)
        first = torch.stack([start // self.lattice, start % self.lattice], -1)[:, None]
        y, x = ((torch.cat([torch.zeros_like(first), moves], 1) + first) % self.lattice).unbind(-1)
        return sprite, direction, y * self.lattice + x

    def paths(self, indices: Sequence[int], frames: int, split: str = "train") -> tuple[Tensor, Tensor]:
        """Sprite int64 [B] and position int64 [B, F] of `stories`."""
        sprite, _, position = self.stories(indices, frames, split)
        return sprite, position

    def clips(self, indices: Sequence[int], frames: int, split: str = "train") -> Tensor:
        """Clips x [B, F, 1, torus, torus] fp32, a function of (seed, split, index) alone.

        Those of "train" and "curated" never start from a pair of "test"; later frames may show any.
        """
        sprite, position = self.paths(indices, frames, split)
        x = self.render(sprite[:, None], position)
        if self.blur_of(split):
            x[:, 1:] = self.blurred_renders[sprite[:, None], position[:, 1:]]
        return x


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")


def _pick(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long().clamp(max=count - 1)  # fp32 rounds (1 - 2^-24) * count up to count
