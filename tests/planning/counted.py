"""What planning is held to: a stage's clip, and the FLOPs of its real second step as torch counts them."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from aadkern import VideoLayout
from aadkern_train.planning.formulas import Clip
from aadkern_train.planning.plan import WAN
from aadkern_train.trainer import make_stage

SIZED = ["network={heads: 4, head_dim: 32, layers: 3, ffn: 320, patch: 2}", "chunks=[1,2,2]", "data.torus=16"]


def clip_of(recipe):
    sizes = recipe.data.sizes(recipe) or WAN
    patch, (_, height, width) = recipe.network.patch, sizes.frame
    layout = VideoLayout(recipe.chunks, (height // patch) * (width // patch))
    return Clip(layout, recipe.view, recipe.given_frames, recipe.steps, sizes)


def keys_behind_a_tap(x, query, w, *others, out_val=None, **options):
    return 2 * x[0] * x[1] * w[0] * w[1]


def and_back(dscores, x, query, w, *others, out_val=None, **options):
    return 2 * keys_behind_a_tap(x, query, w)


def counted(run, name):
    """FLOPs of the real second step of a stage, as torch counts them, and the keys of a discriminator's heads."""
    stage = make_stage(run, name)
    pooling = {torch.ops.aadkern.key_scores: keys_behind_a_tap, torch.ops.aadkern.key_scores_backward: and_back}
    with FlopCounterMode(display=False, custom_mapping=pooling) as counter:
        stage.train_step(1)
    return counter.get_total_flops(), stage
