"""Captions of moving digits: English, what it states, and three embedded words.

    "a three moving up left"  <->  (sprite, direction)  <->  [vector("three"), vector("up"), vector("left")]

A word's vector is its row of the Hadamard matrix of order 16: entries 1 and -1, so that different words are orthogonal
and each has root mean square 1. A word that is not there is all zeros, and so is each word of the null caption "".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# (dy, dx) in lattice steps; VELOCITIES[7 - i] is the opposite of VELOCITIES[i].
VELOCITIES = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
VERTICAL = ("up", "", "down")  # by dy + 1
HORIZONTAL = ("left", "", "right")  # by dx + 1
DIRECTIONS = tuple(f"{VERTICAL[dy + 1]} {HORIZONTAL[dx + 1]}".strip() for dy, dx in VELOCITIES)
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = (*DIGIT_WORDS, "up", "down", "left", "right")
FILLERS = ("a", "an", "the", "and", "moving")
TOKENS = 3  # digit, vertical, horizontal
TEXT_DIM = 16
NO_WORD = 0.1  # root mean square distance from the nearest word at which a vector is none; words are 1 from nothing, 1.4 apart


def vector(word: str) -> Tensor:
    """A word's vector, fp32 [16]; zeros for the word "", which stands for none."""
    if not word:
        return torch.zeros(TEXT_DIM)
    row = 1 + VOCABULARY.index(word)  # row 0 is a constant
    return torch.tensor([1.0 - 2.0 * ((row & column).bit_count() % 2) for column in range(TEXT_DIM)])


@dataclass(frozen=True)
class Captions:
    """The language of a world whose sprites are digits of the classes `labels`. -1 stands for what a caption leaves open."""

    labels: tuple[int, ...]

    @property
    def digits(self) -> tuple[str, ...]:
        """The sprites' words."""
        return tuple(DIGIT_WORDS[label] for label in self.labels)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors of the words that can stand in each place, none of them last or (in the middle) at dy, dx = 0."""
        return tuple(torch.stack([vector(w) for w in words]) for words in ((*self.digits, ""), VERTICAL, HORIZONTAL))

    def parse(self, caption: str) -> tuple[int, int]:
        """(sprite, direction) of "a three moving up left", "a three", "moving up", or "" (the null caption).

        Capitals, punctuation and the order of words do not matter. Raises ValueError for words that this world does not
        have and for words that contradict one another, TypeError for what is no string.
        """
        if not isinstance(caption, str):
            raise TypeError(f"caption must be a string, got {caption!r}")
        places = {"digit": self.digits, "vertical": ("up", "down"), "horizontal": ("left", "right")}
        known = [word for words in places.values() for word in words]
        slots = dict.fromkeys(places, "")
        for word in re.findall(r"\w+", caption.lower()):
            if word in FILLERS:
                continue
            place = next((place for place, words in places.items() if word in words), None)
            if place is None:
                raise ValueError(f"caption {caption!r} has the word {word!r}; this world's words are {', '.join(known)}")
            if slots[place] not in ("", word):
                one_of = ", ".join(places[place])
                raise ValueError(f"caption {caption!r} says {slots[place]!r} and {word!r}; it can say one of {one_of}")
            slots[place] = word
        sprite = self.digits.index(slots["digit"]) if slots["digit"] else -1
        return sprite, _direction(VERTICAL.index(slots["vertical"]) - 1, HORIZONTAL.index(slots["horizontal"]) - 1)

    def say(self, sprite: int, direction: int) -> str:
        """The caption in English of a sprite and an index of `VELOCITIES`, each -1 if left open."""
        sprite, direction = int(sprite), int(direction)
        if not -1 <= sprite < len(self.labels):
            raise ValueError(f"sprite must be -1 to {len(self.labels) - 1}, got {sprite}")
        if not -1 <= direction < len(VELOCITIES):
            raise ValueError(f"direction must be -1 to {len(VELOCITIES) - 1}, got {direction}")
        digit = "" if sprite < 0 else self.digits[sprite]
        named = digit and f"{'an' if digit == 'eight' else 'a'} {digit}"
        return f"{named} {'' if direction < 0 else 'moving ' + DIRECTIONS[direction]}".strip()

    def embed(self, captions: Sequence[str]) -> Tensor:
        """fp32 [B, 3, 16] of captions in English."""
        if isinstance(captions, str):
            raise TypeError(f"captions must be a list of strings, got the string {captions!r}")
        stated = torch.tensor([self.parse(caption) for caption in captions], dtype=torch.int64).reshape(-1, 2)
        return self.vectors(*stated.T)

    def vectors(self, sprite: Tensor, direction: Tensor) -> Tensor:
        """fp32 [B, 3, 16] of sprites and directions, int64 [B], -1 where left open."""
        digits, vertical, horizontal = self._tables
        dy, dx = torch.tensor([*VELOCITIES, (0, 0)])[direction].T
        return torch.stack([digits[sprite], vertical[dy + 1], horizontal[dx + 1]], 1)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(sprite, direction), int64 [B], -1 where left open, of embedded captions [B, 3, 16].

        Raises ValueError for another shape, and for a vector that is no word of this world in its place.
        """
        if not isinstance(text, Tensor):
            raise TypeError(f"text must be a tensor, got {text!r}")
        if text.ndim != 3 or tuple(text.shape[1:]) != (TOKENS, TEXT_DIM):
            raise ValueError(f"text must be [B, {TOKENS}, {TEXT_DIM}], got {list(text.shape)}")
        indices = []
        places = (self.digits, VERTICAL, HORIZONTAL)
        for place, (token, table) in enumerate(zip(text.detach().float().unbind(1), self._tables, strict=True)):
            distance, index = (token[:, None] - table.to(token)).square().mean(2).min(1)
            if not bool((distance < NO_WORD**2).all()):
                row = int((~(distance < NO_WORD**2)).nonzero()[0])
                words = ", ".join(word for word in places[place] if word)
                raise ValueError(f"text row {row}, word {place}, is no word of this world; it can be {words}, or zeros for none")
            indices.append(index)
        sprite, row, column = indices
        table = torch.tensor([[_direction(dy, dx) for dx in (-1, 0, 1)] for dy in (-1, 0, 1)], device=text.device)
        return torch.where(sprite < len(self.labels), sprite, -1), table[row, column]


def _direction(dy: int, dx: int) -> int:
    return VELOCITIES.index((dy, dx)) if (dy, dx) in VELOCITIES else -1
