"""A prompt to Wan's text embedding, through UMT5. Imports transformers: ``pip install 'aadkern[wan]'``."""

from __future__ import annotations

import html
import importlib.util
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern.checks import finite_weights

TOKENS = 512  # what Wan was trained with; the places behind the prompt's own tokens are zeros, and are attended to


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan's pipelines clean it: Unicode mended where ftfy is installed, HTML entities read, spaces made single."""
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy

        prompt = ftfy.fix_text(prompt)
    return " ".join(html.unescape(html.unescape(prompt)).split())


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """A folder's tokenizer.json, cut off at 512 tokens with the end token.

    Not through transformers: T5Tokenizer of its version 5, which Wan's folders name, takes the vocabulary from the file and drops
    its normaliser (5.0.0 and 5.23.0). Raises FileNotFoundError or ValueError where there is no readable tokenizer.json.
    """
    from tokenizers import Tokenizer

    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"tokenizer must be a folder with a tokenizer.json, got {folder}")
    try:
        reader = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"tokenizer must hold a tokenizer.json that tokenizers can read, {file} is none: {error}") from error
    reader.no_padding()
    reader.enable_truncation(TOKENS)
    return reader


def tokens_of(tokenizer: Any, prompt: str) -> tuple[list[int], bool]:
    """The prompt's tokens, at most 512 with the end token, and whether some were cut off. ``tokenizer`` is ``load_tokenizer``'s."""
    read = tokenizer.encode(clean_prompt(prompt))
    return list(read.ids), bool(read.overflowing)


def token_ids(tokenizer: str | os.PathLike[str], prompt: str) -> list[int]:
    """The prompt's tokens by the tokenizer in a folder, as ``tokens_of`` gives them."""
    return tokens_of(load_tokenizer(tokenizer), prompt)[0]


def load_text_encoder(folder: str | os.PathLike[str], dtype: torch.dtype, device: torch.device | str) -> Any:
    """``UMT5EncoderModel`` from a folder in transformers' format (Wan's: 11 GB in bf16).

    Raises ValueError where weights are missing or not finite, and for pickles of other things than tensors, which are not run.
    """
    from transformers import UMT5EncoderModel

    try:
        loaded: Any = UMT5EncoderModel.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"text encoder must be safetensors or tensors alone; {folder} holds another pickle, not run") from error
    encoder, loading = loaded
    # Wan's files hold the one table of embeddings as "shared", and its configuration says that nothing is tied: transformers 5.0
    # leaves the encoder's own name for it unfilled (huggingface/transformers#43880; 5.23.0 does not).
    missing = sorted(set(loading["missing_keys"]) - {"encoder.embed_tokens.weight"})
    if missing:
        raise ValueError(f"text encoder must be a whole UMT5 encoder; {folder} lacks {', '.join(missing[:3])}")
    encoder.set_input_embeddings(encoder.shared)
    finite_weights(encoder, "text encoder", folder)
    return encoder.eval().to(device)


@torch.no_grad()
def embed(encoder: Any, ids: list[int]) -> Tensor:
    """Tokens to the text [1, 512, text_dim] that Wan is given: the encoder's output, then zeros.

    The encoder sees the prompt's tokens alone; Wan's pipelines pad first and mask the padding, which gives the same up to rounding.
    Raises ValueError for no token, or more than 512.
    """
    if not 1 <= len(ids) <= TOKENS:
        raise ValueError(f"ids must be 1 to {TOKENS} tokens, got {len(ids)}")
    tokens = torch.tensor([ids], device=encoder.device)
    hidden: Tensor = encoder(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
    return torch.nn.functional.pad(hidden, (0, 0, 0, TOKENS - len(ids)))
