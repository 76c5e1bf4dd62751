"""What one sort of clips has over another by the law of the digits: the exact log-ratio that a discriminator should learn."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aadkern_train.worlds.digits_captions import VELOCITIES
from aadkern_train.worlds.digits_law import DigitsLaw
from aadkern_train.worlds.digits_metrics import ILLEGAL_SHARE, decode, displacements


@torch.no_grad()
def log_ratio(law: DigitsLaw, x: Tensor, text: Tensor, of: str, against: str = "train") -> Tensor:
    """log p(moves | caption) under the law of split ``of`` less that under ``against``, in nats, fp64 [B].

    ``x`` [B, F, 1, H, W] is decoded; ``text`` [B, 3, 16] states a direction for each clip (else ValueError). Displacements that a
    law does not allow have ILLEGAL_SHARE of the uniform one, as in the measures. How frames look is not counted: the blur of a sort
    of clips is certain, and so its log-ratio without bounds.
    """
    _, direction = law.language.read(text)
    if bool((direction < 0).any()):
        raise ValueError("text must state a direction for each clip")
    steps = displacements(law, decode(law, x).position).cpu()
    stated_move = law.moved[0][direction.cpu()][:, None]
    legal = torch.zeros(law.positions, dtype=torch.bool).index_fill(0, law.moved[0], True)[steps]

    def chance(split: str) -> Tensor:
        by = replace(law, keep=law.keep_of(split))
        p = torch.where(steps == stated_move, by.obey_rate, (1 - by.keep) / len(VELOCITIES)).double()
        return (1 - ILLEGAL_SHARE) * torch.where(legal, p, 0.0) + ILLEGAL_SHARE / law.positions

    return (chance(of).log() - chance(against).log()).sum(1)
