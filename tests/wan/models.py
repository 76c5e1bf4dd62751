"""A CausalWan of a few random weights and its inputs, diffusers' twin of it, and how near two results must be."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel

from aadkern.rotary import tables as rope
from aadkern.wan import CausalWan

CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=3,
    out_channels=5,
    text_dim=10,
    freq_dim=12,
    ffn_dim=40,
    num_layers=3,
)
FRAMES, HEIGHT, WIDTH, TOKENS = 4, 6, 4, 6


def random_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def causal_wan(dtype=torch.float64, **changes) -> CausalWan:
    return random_weights(CausalWan(**{**CONFIG, **changes})).to(dtype)


def clip(frames=FRAMES, dtype=torch.float64, batch=2):
    x = torch.randn(batch, CONFIG["in_channels"], frames, HEIGHT, WIDTH, dtype=dtype)
    return x, torch.rand(batch, frames, dtype=dtype) * 1000


def text(dtype=torch.float64, batch=2):
    return torch.randn(batch, 7, CONFIG["text_dim"], dtype=dtype)


def assert_near(a, b, error=1e-11):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= error * b.abs().max().clamp(min=1).item()


@pytest.fixture
def diffusers_in_fp64(monkeypatch):
    """diffusers' forward says .float() for its norms; this makes it compute in fp64 where its input is fp64."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else x.to(torch.float32))


def diffusers_twin(model: CausalWan) -> WanTransformer3DModel:
    twin = WanTransformer3DModel(**{key: value for key, value in model.config.items() if key in CONFIG or key == "cross_attn_norm"})
    twin.load_state_dict(model.state_dict())
    dtype = next(model.parameters()).dtype
    if dtype == torch.float64:  # its tables were rounded to fp32
        twin.rope.freqs_cos, twin.rope.freqs_sin = diffusers_tables_in_fp64(model.config.attention_head_dim)
    return twin.to(dtype)


def diffusers_tables_in_fp64(head_dim: int):
    angles = []
    for dim in rope.axis_dims(head_dim):
        frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(torch.outer(torch.arange(1024, dtype=torch.float64), frequency).repeat_interleave(2, dim=1))
    angle = torch.cat(angles, dim=1)
    return angle.cos(), angle.sin()
