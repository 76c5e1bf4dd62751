"""The handwritten digits that move: which of scikit-learn's are taken, so that no two frames look alike."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

STEP = 4  # pixels per lattice step: one patch
DIGIT = 8  # pixels per side of scikit-learn's digits
TYPICAL = 0.5  # sprites come from the half of each class nearest its mean, so that a reader recognises them


@lru_cache
def chosen_digits(count: int, torus: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """`count` of scikit-learn's handwritten digits, one per class: values in [0, 1], fp64 [count, 8, 8], and their classes.

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
    return images[chosen], tuple(int(labels[digit]) for digit in chosen)


def _typical_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits nearest their class mean, in the data set's order: images [N, 8, 8] in [0, 1] and labels [N]."""
    try:
        from sklearn.datasets import load_digits  # 0.6 s to import: only those who use this world pay for it
    except ImportError:
        raise ValueError("the digits' pictures need scikit-learn: pip install 'aadkern[train]'") from None

    data = load_digits()
    images, labels = data.images / 16, data.target
    kept: list[int] = []
    for label in range(10):
        members = np.flatnonzero(labels == label)
        distance = ((images[members] - images[members].mean(0)) ** 2).sum((1, 2))
        kept.extend(members[distance.argsort(kind="stable")[: int(len(members) * TYPICAL)]])
    kept.sort()
    return images[kept], labels[kept]
