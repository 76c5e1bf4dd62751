"""A CausalWan whose blocks' weights wait in the host's memory and are copied to the GPU one block ahead, for small cards.

diffusers' group offloading does the copying. What it lacks for a stream is done here: the embeddings, which are computed outside of
the model's forward too, stay on the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry, apply_group_offloading

from aadkern.wan.model import OFFLOADING, CausalWan


def offload_blocks(model: CausalWan, device: torch.device | str) -> None:
    """Keep the blocks' weights in pinned host memory; a pass copies them to ``device`` on a stream of its own, one block ahead, and
    lets go of each when it is done. The rest of the model, embeddings and head, stays there.

    Then give ``StreamingGenerator`` ``inference_mode=False``, and no CUDA graphs: weights are elsewhere in each pass. LoRA and FP8
    come before. Without a GPU nothing is copied, and the outputs are the same. The first pass, in which the order of the blocks
    is learned, copies without looking ahead.

    Raises TypeError for another model, ValueError for one that is offloaded, sharded or compiled already.
    """
    if not isinstance(model, CausalWan):
        raise TypeError(f"model must be a CausalWan, got {type(model).__name__}")
    if model.is_offloaded() or model._is_sharded():
        raise ValueError("model must have its weights in one place to be offloaded, got one that is offloaded or sharded already")
    if any(block.parts is not None for block in model.blocks):
        raise ValueError("model must not be compiled to be offloaded: its compiled parts would hold weights that have gone")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    apply_group_offloading(model, device, num_blocks_per_group=1, use_stream=device.type != "cpu")
    rest: Any = HookRegistry.check_if_exists_or_initialize(model).get_hook(OFFLOADING)
    rest.group.offload_device = device  # where it is copied after a pass: nowhere
    rest.group.onload_()
