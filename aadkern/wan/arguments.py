"""What ``CausalWan`` takes: its configuration, and the arguments of a forward, looked at before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from aadkern.checks import MOST, boolean, choice, real, shown, tensor, three, whole
from aadkern.plans import AttentionPlan
from aadkern.rotary.tables import axis_dims
from aadkern.streaming.cache import ROPE_MODES
from aadkern.wan.block import TextCache

TIMESTEPS = (torch.float32, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_configuration(patch_size: Any, sizes: dict[str, Any], cross_attn_norm: Any, qk_norm: Any, eps: Any, rope: Any) -> None:
    """Raise ValueError or TypeError for a configuration that makes no model."""
    three(patch_size, "patch_size", "(1, rows, columns)")
    for i, size in enumerate(patch_size):
        whole(size, f"patch_size[{i}]", 1)
    if patch_size[0] != 1:
        raise ValueError(f"patch_size must be (1, rows, columns): frames have own timesteps, got {tuple(patch_size)}")
    for name, size in sizes.items():
        if not isinstance(size, int):  # an array's number could not be written into the configuration
            raise TypeError(f"{name} must be an int, got {shown(size)}")
        whole(size, name, 1)
    try:
        axis_dims(sizes["attention_head_dim"])
    except ValueError as error:
        raise ValueError(f"attention_{error}") from error
    if sizes["freq_dim"] % 2:
        raise ValueError(f"freq_dim must be even, got {sizes['freq_dim']}")
    boolean(cross_attn_norm, "cross_attn_norm")
    choice(qk_norm, "qk_norm", ("rms_norm_across_heads",))
    real(eps, "eps", 0.0)
    choice(rope, "rope", ROPE_MODES)


def tokens_of_frame(patch_size: Sequence[int], height: Any, width: Any) -> int:
    """Tokens of one latent frame of height x width. Raises ValueError where patches do not tile it."""
    _, rows, columns = patch_size
    height, width = whole(height, "height"), whole(width, "width")
    if height < rows or width < columns or height % rows or width % columns:
        raise ValueError(f"height and width must be multiples of ({rows}, {columns}), got ({height}, {width})")
    return (height // rows) * (width // columns)


def check_exact(timestep: Any) -> None:
    """Raise for what is no tensor of noise levels as exact as float32."""
    if tensor(timestep, "timestep").dtype in (torch.bfloat16, torch.float16):
        # FSDP's cast_forward_inputs does this unasked.
        raise ValueError(f"timestep must be float32: 937.5 would be 936 in bfloat16, got {timestep.dtype}")
    if timestep.dtype not in TIMESTEPS:
        raise TypeError(f"timestep must be float32, float64 or integer, got {timestep.dtype}")


def check_text(text: Any, dim: int, samples: int | None = None) -> None:
    """Raise for what is no text [samples, T, dim]; None is any number of samples."""
    if not tensor(text, "encoder_hidden_states").is_floating_point():
        raise TypeError(f"encoder_hidden_states must be floating point, got {text.dtype}")
    if text.dim() != 3 or text.shape[2] != dim or not text.shape[1] or samples not in (None, text.shape[0]):
        shape = f"[{'B' if samples is None else samples}, T, {dim}]"
        raise ValueError(f"encoder_hidden_states must be {shape}, got {list(text.shape)}")


def check_clip(
    model: WanTransformer3DModel, x: Any, timestep: Any, text: Any, condition_of: Sequence[int] | None
) -> tuple[int, int, int, int]:
    """The latents' batch, frames, height and width, if noise levels and text fit them."""
    if isinstance(text, TextCache) and text.text is not None:
        if len(text.layers) not in (0, len(model.blocks)):
            lengths = f"{len(model.blocks)} layers, got one that a model of {len(text.layers)} has filled"
            raise ValueError(f"encoder_hidden_states must be a lazy text cache of {lengths}")
        text = text.text
    channels = model.config["in_channels"]
    if not tensor(x, "hidden_states").is_floating_point():
        raise TypeError(f"hidden_states must be floating point, got {x.dtype}")
    if x.dim() != 5 or x.shape[1] != channels or x.shape[2] < 1:
        raise ValueError(f"hidden_states must be [B, {channels}, F, H, W] with F at least 1, got {list(x.shape)}")
    batch, _, frames, height, width = x.shape
    weight = model.patch_embedding.weight
    check_exact(timestep)
    for name, value in (("hidden_states", x), ("timestep", timestep), ("encoder_hidden_states", text)):
        if isinstance(value, Tensor) and value.device != weight.device and not weight.is_meta:  # meta: offloaded by accelerate
            raise ValueError(f"{name} must be on the model's device {weight.device}, got {value.device}")
    samples = batch
    if condition_of is not None:
        samples = timestep.shape[0] if timestep.dim() else 0
        rows = _indices(condition_of, "condition_of")
        if len(rows) != batch or not all(0 <= sample < samples for sample in rows):
            raise ValueError(f"condition_of must be {batch} rows of timestep, in [0, {samples}), got {shown(condition_of)}")
    tokens = frames * tokens_of_frame(model.config["patch_size"], height, width)
    if tuple(timestep.shape) not in ((samples,), (samples, frames), (samples, tokens)):
        shapes = f"[{samples}], [{samples}, {frames}] or [{samples}, {tokens}]"
        raise ValueError(f"timestep must be {shapes} for hidden_states {list(x.shape)}, got {list(timestep.shape)}")
    if isinstance(text, TextCache):
        shape = next((entry[0].shape for entry in text.layers if entry is not None), torch.Size((0, 0, 0, 0)))
        heads, head_dim = model.config["num_attention_heads"], model.config["attention_head_dim"]
        if len(text.layers) != len(model.blocks) or shape[0] != samples or shape[1::2] != (heads, head_dim):
            ours = f"{len(model.blocks)} layers, batch {samples}, {heads} heads of {head_dim}"
            theirs = f"{len(text.layers)}, {shape[0]}, {shape[1]} of {shape[3]}"
            raise ValueError(f"encoder_hidden_states must be a text cache of {ours}, got {theirs}")
    elif text is not None:
        check_text(text, model.config["text_dim"], samples)
    return batch, frames, height, width


def blocks_to_run(taps: Sequence[int] | None, layers: int) -> int:
    """The number of blocks that outputs of the blocks ``taps`` need; all of them for None."""
    if taps is None:
        return layers
    rows = _indices(taps, "taps")
    if not rows or rows != sorted(set(rows)) or not 0 <= rows[0] <= rows[-1] < layers:
        raise ValueError(f"taps must be ascending block indices in [0, {layers}), at least one, got {shown(tuple(rows))}")
    return rows[-1] + 1


def frame_indices(first_frame: int | Sequence[int], frames: int, plan: Any) -> range | tuple[int, ...]:
    """The frame index of each frame."""
    starts = [first_frame] if isinstance(first_frame, int) else _indices(first_frame, "first_frame")
    if isinstance(first_frame, int) and frames % 2 == 0 and isinstance(plan, AttentionPlan) and plan.is_teacher_forcing:
        starts *= 2
    if not starts or frames % len(starts):
        raise ValueError(f"first_frame must cut {frames} frames into equal segments, got {len(starts)} starts")
    length = frames // len(starts)
    if len(starts) == 1:
        return range(starts[0], starts[0] + frames)
    return tuple(start + i for start in starts for i in range(length))


def _indices(value: Any, name: str) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise TypeError(f"{name} must be a sequence of whole numbers, got {shown(value)}")
    return [whole(number, f"{name}[{i}]", -MOST) for i, number in enumerate(value)]
