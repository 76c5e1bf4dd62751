"""The prompt's embedding beside the one that diffusers' Wan pipeline makes, from folders that transformers wrote."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from aadkern.wan.text import TOKENS, clean_prompt, embed, load_text_encoder, load_tokenizer, token_ids, tokens_of
from tests.wan.tiny_wan import TEXT_DIM, save_tiny_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    return folder, save_tiny_wan(folder)


PROMPTS = ["a cat runs on the beach", "  A dog &amp;amp; a\n\tcat,  3.5 ", "", "x " * 700]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embedding_is_the_pipelines(wan, prompt):
    folder, pipeline = wan
    expected = pipeline._get_t5_prompt_embeds(prompt, max_sequence_length=TOKENS)
    ids = token_ids(folder / "tokenizer", prompt)
    assert ids[-1] == 1 and (len(ids) == TOKENS) == (len(prompt) > 600)
    assert tokens_of(load_tokenizer(folder / "tokenizer"), prompt) == (ids, len(prompt) > 600)
    made = embed(load_text_encoder(folder / "text_encoder", torch.float32, "cpu"), ids)
    assert made.shape == (1, TOKENS, TEXT_DIM) and expected[0, len(ids) - 1].abs().min() > 0
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    assert not made[:, len(ids) :].any()


def test_prompts_are_cleaned():
    assert clean_prompt(" a &amp;lt;b&amp;gt;\n c\u00a0d ") == "a <b> c d"
    assert clean_prompt("a caf\u00c3\u00a9") == ("a caf\u00e9" if importlib.util.find_spec("ftfy") else "a caf\u00c3\u00a9")


def test_tokens_are_those_of_the_file_whatever_class_the_folder_names(wan, tmp_path):
    folder = shutil.copytree(wan[0] / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "T5Tokenizer", "extra_ids": 0}))
    prompt = "a cat \u2460"  # a circled one, which the file's normaliser reads, and ftfy leaves
    assert token_ids(folder, prompt) == token_ids(wan[0] / "tokenizer", "a cat 1")
    assert AutoTokenizer.from_pretrained(folder)(prompt).input_ids != token_ids(folder, prompt)  # else transformers would do


def test_the_shared_table_of_embeddings_is_used(wan, tmp_path):
    """Wan's file holds it under one name, and its configuration says that nothing is tied; transformers 5.0 needs help there."""
    folder, pipeline = wan
    state = load_file(folder / "text_encoder" / "model.safetensors")
    state.pop("encoder.embed_tokens.weight", None)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    encoder = load_text_encoder(tmp_path, torch.float32, "cpu")
    assert torch.equal(encoder.encoder.embed_tokens.weight, pipeline.text_encoder.shared.weight)
    state.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"text encoder must be a whole UMT5 encoder; .* lacks encoder\.block\.1"):
        load_text_encoder(tmp_path, torch.float32, "cpu")


def test_bad_input(wan, tmp_path):
    encoder = load_text_encoder(wan[0] / "text_encoder", torch.float32, "cpu")
    for count in (0, TOKENS + 1):
        with pytest.raises(ValueError, match=f"ids must be 1 to 512 tokens, got {count}"):
            embed(encoder, [3] * count)
    with pytest.raises(FileNotFoundError, match=r"tokenizer must be a folder with a tokenizer\.json"):
        token_ids(tmp_path, "a cat")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer must hold a tokenizer\.json that tokenizers can read"):
        token_ids(tmp_path, "a cat")
