"""The parameter names of Wan's own code, which Self-Forcing's family keeps, and diffusers' names for the same tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping

# Wan's name -> diffusers' name, of everything outside the blocks. Image-to-video weights are included, for the two formats' sake.
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
# Inside blocks.N. Wan's norm3, before the cross-attention, is diffusers' norm2; the other norms have no weights.
INSIDE = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _PROJECTIONS.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in {**_PROJECTIONS, **_IMAGE}.items()},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
ALONE = {"head.modulation": "scale_shift_table", "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}

# What FSDP, activation checkpointing and torch.compile put into names, at any depth.
WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
OUTER = ("module.", "generator.", "model.diffusion_model.", "model.")


def _table(flip: bool) -> dict[str, str]:
    """Every name outside the blocks, and inside them with N for the number."""
    pairs = [(f"{a}.{leaf}", f"{b}.{leaf}") for a, b in OUTSIDE.items() for leaf in ("weight", "bias")]
    pairs += [(f"blocks.N.{a}.{leaf}", f"blocks.N.{b}.{leaf}") for a, b in INSIDE.items() for leaf in ("weight", "bias")]
    pairs += [*ALONE.items(), ("blocks.N.modulation", "blocks.N.scale_shift_table")]
    return {b: a for a, b in pairs} if flip else dict(pairs)


_TO_DIFFUSERS, _TO_WAN = _table(False), _table(True)
_NUMBER = re.compile(r"^blocks\.(\d+)\.")


def bare(name: str) -> str:
    """A parameter's name without what wrappers and outer modules put before it and into it."""
    name = WRAPPERS.sub("", name)
    prefix = next((prefix for prefix in OUTER if name.startswith(prefix)), "")
    return bare(name[len(prefix) :]) if prefix else name


def translated(names: list[str], to: str) -> dict[str, str]:
    """Each name in the spelling ``to`` ("diffusers" or "wan"). Raises ValueError for names that Wan's transformer does not have."""
    table = _TO_DIFFUSERS if to == "diffusers" else _TO_WAN
    spelling, unknown = {}, []
    for name in names:
        number = _NUMBER.match(name)
        key = _NUMBER.sub("blocks.N.", name)
        if key in table:
            spelling[name] = table[key].replace("blocks.N.", f"blocks.{number[1]}." if number else "")
        else:
            unknown.append(name)
    if unknown:
        other = "Wan's own" if to == "diffusers" else "diffusers'"
        raise ValueError(f"state dict must hold {other} names of a Wan transformer; {len(unknown)} are not, as {unknown[0]!r}")
    return spelling


def in_diffusers_names(names: Mapping[str, object]) -> bool:
    """Whether these are diffusers' names: the two spellings share only the patch embedding's."""
    return any(name.startswith("condition_embedder.") or ".attn1." in name for name in names)
