"""What README and docs tell people to type. Every block of Python compiles, and runs in tiny shapes unless it belongs into another
project, needs a GPU or real weights; every `aad` line is one that the command line takes, with settings that its recipe has, and
every line of a benchmark one that its parser takes."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aadkern import VideoLayout, plans
from aadkern_train import cli
from aadkern_train.engine.recipe import StageSettings
from aadkern_train.stages import KINDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    code: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language: str) -> list[Block]:
    """Those of a language, a pattern; "" has none named."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S):
            if re.fullmatch(language, match.group(1)):
                found.append(Block(page, text.count("\n", 0, match.start()) + 2, match.group(2)))
    return found


# By a piece of the block: why it is compiled and not run.
NOT_RUN = {
    'compat.patch("': "is a line in another project's file; test_compat_patch.py runs patches beside such code",
    'WanPipeline.from_pretrained("Wan-AI': "real weights",
    "CausalWanPipeline.from_pretrained": "real weights; test_pipeline.py",
    "AnyFlowFARPipeline.from_pretrained": "real weights; test_compat_anyflow.py",
    "compat.set_processor(pipe.transformer, layout": "the pipeline of the block before; test_compat_diffusers.py",
    'compat.load_checkpoint("self_forcing_dmd.pt")': "real weights; test_compat_checkpoints.py",
    ".cuda()": "a GPU and real weights; test_fp8_wan.py, test_streaming_generator.py",
    'init_device_mesh("cuda"': "eight GPUs; test_ulysses.py",
    'lora.load(model, "style.safetensors"': "a LoRA file; test_wan_lora.py",
    "model.sequence = group": "the group of the block before; test_ulysses.py",
    "decoder = StreamingDecoder(vae)": "real weights; test_generate_wan.py",
    "decoder = StreamingTinyDecoder(": "real weights; test_tiny_vae.py",
}


def attention_model(x: torch.Tensor, t: torch.Tensor, plan: plans.AttentionPlan) -> torch.Tensor:
    import aadkern

    return aadkern.attention(x, x, x, plan, backend="sdpa") * t


def what_stands_before() -> dict[str, object]:
    """What a reader of a block has: names that the text around it speaks of."""
    plan = plans.block_causal(VideoLayout((1, 2), 4))
    rows = torch.randn(1, plan.q_len, 2, 8)
    return {
        "torch": torch,
        "plan": plan,
        "model": attention_model,
        "x": rows.requires_grad_(),
        "t": torch.rand(()),
        "dx": torch.randn_like(rows),
        "dt": torch.ones(()),
        "velocity": torch.randn_like(rows),
        "t_weight": 0.5,
        "block": nn.Linear(8, 8),
        "videos": torch.randint(0, 256, (2, 5, 32, 48, 3), dtype=torch.uint8),
    }


def for_pooling(names: dict[str, object]) -> None:
    head = SimpleNamespace(to_k=nn.Linear(24, 24), to_v=nn.Linear(24, 24), norm=nn.RMSNorm(24))
    names |= {"x": torch.randn(2, 42, 24), "query": torch.randn(3, 24), "head": head}


def for_blocks(names: dict[str, object]) -> None:
    """One head of 8, and modulation of the width that follows."""
    tokens = 21 * 30 * 52
    q, k = torch.randn(2, 1, tokens, 1, 12).unbind()
    norms = [nn.RMSNorm(12).requires_grad_(False) for _ in range(2)]
    names |= {"q": q, "k": k, "norm_q": norms[0], "norm_k": norms[1], "cache_slot": torch.empty_like(k)}
    names |= {"x": torch.randn(1, tokens, 12), "y": torch.randn(1, tokens, 12), "rows": torch.randn(1, 21, 6, 12)}


PREPARED = {"aadkern.attention_pool(": for_pooling, "blocks.RotaryGrid(": for_blocks}


@pytest.fixture
def no_plugins():
    """Without what other tests' plugins registered in this process, and without what a block registers afterwards."""
    registries = KINDS, StageSettings.members
    before = [dict(registry) for registry in registries]
    for kind in [kind for kind, stage in KINDS.items() if not stage.__module__.startswith("aadkern_train.")]:
        for registry in registries:
            registry.pop(kind, None)
    yield
    for registry, old in zip(registries, before, strict=True):
        registry.clear()
        registry.update(old)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block, capsys, no_plugins):
    code = compile(block.code, str(block), "exec")
    reasons = [reason for piece, reason in NOT_RUN.items() if piece in block.code]
    if reasons:
        return  # compiled, at least
    names = what_stands_before()
    for piece, prepare in PREPARED.items():
        if piece in block.code:
            prepare(names)
    exec(code, names)


def test_the_list_of_what_is_not_run_is_true():
    code = "\n".join(block.code for block in blocks("python"))
    assert [piece for piece in NOT_RUN if piece not in code] == []
    assert [piece for piece in PREPARED if piece not in code] == []


def test_no_command_stands_in_a_block_of_no_language():
    """There nothing here would read it."""
    command = re.compile(r"^(?:\$ )?(?:aad|make|python3?|pip|torchrun|pytest|git|curl) ", re.M)
    assert {str(block): found.group() for block in blocks("") if (found := command.search(block.code))} == {}
    assert blocks("") and command.search("a\n$ aad info") and not command.search("a aad info")


def commands(program: str) -> list[tuple[Block, str]]:
    """What stands behind a program, a pattern, in the lines of a shell."""
    found = []
    for block in blocks("bash|sh|console"):
        code = block.code.replace("\\\n", " ")
        for line in code.splitlines():
            match = re.search(rf"(?:^|\s)(?:{program})(.*)", line.split("  #")[0])
            if match and not line.startswith("#"):
                found.append((block, match.group(1).strip()))
    return found


class Parsed(Exception):
    """In place of what a program does once its words are read."""


@pytest.mark.parametrize(("block", "line"), commands(r"-m benchmarks\.|aad (?=bench\b)"), ids=lambda value: str(value)[:60])
def test_benchmarks(block, line, monkeypatch):
    """By their own parsers; nothing is measured."""
    read = argparse.ArgumentParser.parse_args

    def only_read(parser, *words):
        read(parser, *words)
        raise Parsed

    name, *words = shlex.split(line, comments=True)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_read)
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(Parsed):
        importlib.import_module(f"benchmarks.{'run' if name == 'bench' else name}").main()


@pytest.mark.parametrize(("block", "line"), commands(r"(?:aad|-m aadkern_train\.cli) "), ids=lambda value: str(value)[:60])
def test_aad(block, line, capsys):
    from aadkern_train.recipes import make_recipe

    if line.startswith("bench") or "$" in line:  # test_benchmarks; a shell's variables
        return
    words = shlex.split(line, comments=True)
    left_out = [place for place, word in enumerate(words) if word == "..." and not words[place - 1].startswith("-")]
    words = [word for place, word in enumerate(words) if place not in left_out]
    try:
        args, more = cli.parser().parse_known_args(words)
    except SystemExit:
        assert left_out and "arguments are required" in capsys.readouterr().err
        return
    cli.with_words(args, more)
    if args.command != "train" or any(word.startswith(("resume=", "plugins=")) for word in args.words):
        return
    names = [word for word in args.words if "=" not in word]
    settings = [word for word in args.words if "=" in word and not word.startswith(("out=", "overwrite="))]
    make_recipe(names[0], settings)
