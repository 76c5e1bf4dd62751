"""A Wan model of a few thousand random weights, saved by diffusers and transformers themselves in the real formats."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM, CHANNELS = 16, 16
WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁cat", "▁dog", "▁runs", "▁on", "▁the", "▁beach"]
# One head of 128, since Self-Forcing's files do not say how many there are.
TRANSFORMER = dict(num_attention_heads=1, attention_head_dim=128, in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM)
TRANSFORMER |= dict(freq_dim=16, ffn_dim=48, num_layers=2)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer of a few words and letters, with T5's special tokens and an end token after each prompt."""
    words = WORDS + list(string.ascii_letters + string.digits + "&.,")
    tokenizer = Tokenizer(models.Unigram([(word, -i / 10) for i, word in enumerate(words)], unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_pipeline(**transformer: Any) -> WanPipeline:
    """A whole Wan pipeline with random weights, none of them zero or one by default."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=TEXT_DIM, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    network = WanTransformer3DModel(**{**TRANSFORMER, **transformer})
    for name, parameter in network.named_parameters():
        # Sharp attention, so that positions and what is in view show in the video.
        torch.nn.init.normal_(parameter, std=1.0 if "norm_q" in name or "norm_k" in name else 0.1)
    encoder = UMT5EncoderModel(text)
    torch.nn.init.normal_(encoder.shared.weight)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=AutoencoderKLWan(base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 2, 2], num_res_blocks=1).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=network.eval(),
    )


def save_tiny_wan(folder: Path, **transformer: Any) -> WanPipeline:
    """``tiny_pipeline`` saved to ``folder``: model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/."""
    pipeline = tiny_pipeline(**transformer)
    pipeline.save_pretrained(folder)
    return pipeline
