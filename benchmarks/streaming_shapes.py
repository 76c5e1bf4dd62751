"""What the streaming benchmark streams: Wan 2.1's true sizes with random weights, their VAE, and the FLOPs of a chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from aadkern import Window

if TYPE_CHECKING:
    from aadkern.wan import CausalWan

WINDOW = Window(9, sink=1)
FLOOR_TFLOPS = 790.0  # a large bf16 product through PyTorch on an H200: docs/kernels.md
VAE_FRAME_FLOPS = 13.55e12  # of Wan 2.1's decoder for a latent frame of 60 x 104, but for the first two
PIXEL_FRAMES = 4  # of a latent frame, but for the video's first
LEVELS = {1: (1.0,), 4: (1.0, 0.9375, 0.8333, 0.625)}  # Self-Forcing's list under its shift of 5
# diffusers' ``from_pretrained`` leaves these in float32, whatever dtype is asked for.
KEPT_IN_FP32 = ("time_embedder", "scale_shift_table", "norm2")


class Size(NamedTuple):
    """A model and what it streams: latents of height x width, in chunks of so many latent frames."""

    layers: int
    heads: int
    ffn: int
    chunk: int
    head_dim: int = 128
    height: int = 60
    width: int = 104
    text_tokens: int = 512
    text_dim: int = 4096
    freq_dim: int = 256
    vae_width: int | None = None  # None: the true Wan 2.1 VAE

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Of a chunk."""
        return self.chunk * (self.height // 2) * (self.width // 2)

    @property
    def phases(self) -> int:
        """Chunks after which the slots of a merged ring repeat: chunks in the window's recent frames, and the noisy one."""
        return -(-(WINDOW.recent(self.chunk) or 0) // self.chunk) + 1

    def warm_chunks(self, turns: int) -> int:
        """Until both chunks of a merged pass see a full window, and so many turns of the ring beyond."""
        return -(-(WINDOW.frames or 0) // self.chunk) + 2 + turns * self.phases


# Chunks of 3 and of 4 latent frames are what AAD-1's own rates fit (43.37 FPS at 0.289 s, 14.33 at 1.134 s).
SIZES = {
    "1.3B": Size(layers=30, heads=12, ffn=8960, chunk=3),
    "14B": Size(layers=40, heads=40, ffn=13824, chunk=4),
    "tiny": Size(3, 2, 48, 3, head_dim=16, height=4, width=6, text_tokens=8, text_dim=16, freq_dim=16, vae_width=8),
}


def pass_flops(size: Size) -> int:
    """Multiplications and additions of one whole pass over a chunk with the window full: the blocks' products, their attention and
    the attention to a text whose keys and values are there. Left out, together under 0.5 %: embeddings, norms, the head."""
    n, c = size.tokens, size.dim
    linear = 2 * n * (6 * c * c + 2 * c * size.ffn)
    keys = (WINDOW.frames or 0) * n // size.chunk + size.text_tokens
    return size.layers * (linear + 4 * n * keys * c)


def chunk_flops(size: Size, nfe: int) -> int:
    """Of a chunk: ``nfe`` denoising passes and the clean one, all whole. (Ours stops the clean one at the last block's keys and
    values, about 1 / layers of a pass less; the floor is the same for all.)"""
    return (nfe + 1) * pass_flops(size)


def floor_seconds(size: Size, nfe: int) -> float:
    """The least time of a chunk: its FLOPs at ``FLOOR_TFLOPS``."""
    return chunk_flops(size, nfe) / (1e12 * FLOOR_TFLOPS)


@contextlib.contextmanager
def made_in(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Parameters that are made here are made on that device and in that dtype: 14B in float32 on a host would take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def model_of(size: Size, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> CausalWan:
    """A CausalWan of random weights, the same for the same seed, made on the device in that dtype.

    Products keep the size of what they are given, gates are of the order of 0.5 and query-key scores of 3, so that the video hangs
    on every frame in view: under the default initialisation a wrong cache would hide below bf16's rounding.
    """
    from aadkern.wan import CausalWan

    torch.manual_seed(seed)
    with made_in(device, dtype):
        model = CausalWan(
            num_layers=size.layers, num_attention_heads=size.heads, attention_head_dim=size.head_dim, ffn_dim=size.ffn,
            text_dim=size.text_dim, freq_dim=size.freq_dim,
        )  # fmt: skip
    with torch.no_grad():
        blocks: Any = model.blocks
        for block in blocks:
            block.scale_shift_table.normal_(std=0.5)
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                norm.weight.fill_(3**0.5)
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
        for name, parameter in model.named_parameters():
            if any(kept in name.split(".") for kept in KEPT_IN_FP32):
                parameter.data = parameter.data.float() if dtype == torch.bfloat16 else parameter.data
    return model.eval().requires_grad_(False)


def vae_of(size: Size, device: torch.device | str, dtype: torch.dtype) -> Any:
    """diffusers' AutoencoderKLWan of random weights: Wan 2.1's own configuration, which is its default, or a narrow one."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    narrow = {} if size.vae_width is None else {"base_dim": size.vae_width, "num_res_blocks": 1}
    with made_in(device, dtype):
        vae: Any = AutoencoderKLWan(**narrow)
    return vae.eval().requires_grad_(False)
