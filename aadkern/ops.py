"""The contract, one page a room: every operator by its name. Importing this page registers them all.

Each room's own page has its schemas, fake kernels and derivatives; ``aadkern.library`` says how an operator is differentiated.
"""

from __future__ import annotations

from aadkern.blocks.ops import gated_residual, modulated_norm, qk_norm_rope, qk_norm_rope_into, qk_norm_rope_pack
from aadkern.fp8.ops import quantise_rows
from aadkern.noise.ops import noised_views
from aadkern.pooling.ops import key_scores, key_scores_backward, pool_tokens, pool_tokens_backward
from aadkern.range_attention.ops import range_attention, range_attention_backward, range_attention_jvp
from aadkern.ulysses.ops import ulysses_pack, ulysses_unpack

__all__ = [
    "gated_residual",
    "key_scores",
    "key_scores_backward",
    "modulated_norm",
    "noised_views",
    "pool_tokens",
    "pool_tokens_backward",
    "qk_norm_rope",
    "qk_norm_rope_into",
    "qk_norm_rope_pack",
    "quantise_rows",
    "range_attention",
    "range_attention_backward",
    "range_attention_jvp",
    "ulysses_pack",
    "ulysses_unpack",
]
