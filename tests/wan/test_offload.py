"""Blocks whose weights wait in the host's memory: diffusers' hooks over a memory of our own that shows what is where, on a CPU."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.hooks.group_offloading import GroupOffloadingConfig, GroupOffloadingType, ModuleGroup

pytest.importorskip("transformers")

from aadkern import StreamingCache, StreamingGenerator, Window
from aadkern.wan import CausalWan, offload
from aadkern.wan.fp8 import quantise
from aadkern.wan.offload import offload_blocks
from aadkern_train.generate import CausalWanPipeline
from aadkern_train.generate.wan_settings import WanSettings
from tests.generate.wan_files import PROMPT, SIZE, aad, refused, wan, written

__all__ = ["wan", "written"]  # fixtures
LAYERS = 4


def small_model() -> CausalWan:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32)
    model = CausalWan(**sizes, num_layers=LAYERS).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def text(seed) -> torch.Tensor:
    return torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(seed))


def streamed(model, **options) -> torch.Tensor:
    """Chunks of two passes, a new prompt on the way, and a video after a restart."""
    cache = StreamingCache.for_model(model, 1, 4, 6, Window(5, sink=1), max_chunk_frames=2, merged=True)
    stream = StreamingGenerator(model, cache, levels=(1.0, 0.5), text=text(0), inference_mode=False, **options)

    def noise(chunk, step):
        return torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(10 * chunk + step))

    made = list(stream.chunks(noise, 4))
    stream.set_text(text(1), recache=True)
    made += stream.chunks(noise, 3)
    stream.reset()
    stream.set_text(text(2))
    return torch.cat([*made, *stream.chunks(noise, 2)], dim=2)


class Memory:
    """A GPU in the tests' place: what was not copied there is not a number."""

    def __init__(self, monkeypatch, model) -> None:
        self.host: dict[torch.Tensor, torch.Tensor] = {}
        self.copies: list[str] = []  # of blocks, and of the rest of the model
        self.here: set[str] = set()
        self.most = 0
        self.names = {id(block): f"block {i}" for i, block in enumerate(model.blocks)}
        monkeypatch.setattr(ModuleGroup, "_to_cpu", staticmethod(lambda tensor, _low: tensor.data))
        monkeypatch.setattr(ModuleGroup, "_onload_from_memory", lambda group: self.fetch(group))
        monkeypatch.setattr(ModuleGroup, "_offload_to_memory", lambda group: self.release(group))
        monkeypatch.setattr(offload, "apply_group_offloading", self.apply)

    def apply(self, model, device, *, num_blocks_per_group, use_stream) -> None:
        assert num_blocks_per_group == 1 and not use_stream  # a CPU has no streams; there is one here
        config = GroupOffloadingConfig(
            onload_device=device,
            offload_device=torch.device("meta"),  # another name than the CPU's, or each copy would be made twice
            offload_type=GroupOffloadingType.BLOCK_LEVEL,
            non_blocking=True,
            record_stream=False,
            low_cpu_mem_usage=False,
            num_blocks_per_group=1,
            stream=contextlib.nullcontext(),
        )
        config.stream.synchronize = lambda: None
        group_offloading._apply_group_offloading(model, config)

    def tensors(self, group):
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def name(self, group) -> str:
        return self.names.get(id(group.modules[0]), "rest")

    def fetch(self, group) -> None:
        for tensor in self.tensors(group):
            tensor.data = self.host.get(tensor, tensor.data)
        name = self.name(group)
        if name not in self.here:
            self.here.add(name)
            self.copies.append(name)
        self.most = max(self.most, len(self.here - {"rest"}))

    def release(self, group) -> None:
        if group.offload_device == group.onload_device:
            return
        self.here.discard(self.name(group))
        for tensor in self.tensors(group):
            self.host.setdefault(tensor, tensor.data)
            tensor.data = torch.full_like(tensor.data, torch.nan)


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
def test_blocks_are_there_when_they_compute_and_at_most_two(monkeypatch, fp8):
    model = small_model()
    if fp8:
        quantise(model)
    plain = streamed(copy.deepcopy(model))
    memory = Memory(monkeypatch, model)
    offload_blocks(model, "cpu")
    assert memory.here == {"rest"} and memory.copies == ["rest"]
    assert all(torch.isnan(parameter.float()).all() for parameter in model.blocks.parameters())
    made = streamed(model)
    assert torch.isfinite(made).all() and torch.equal(made, plain)
    blocks = [f"block {i}" for i in range(LAYERS)]
    passes, rest = divmod(len(memory.copies) - 1, LAYERS)
    assert rest == 0 and memory.copies == ["rest", *blocks * passes]  # each once a pass, in order, the rest never again
    assert memory.most == 2 and memory.here == {"rest"}


def test_a_block_is_copied_while_the_one_before_computes(monkeypatch):
    model = small_model()
    memory = Memory(monkeypatch, model)
    offload_blocks(model, "cpu")
    streamed(model)
    seen = []
    for i, block in enumerate(model.blocks):
        block.attn1.to_q.register_forward_pre_hook(lambda *_, i=i: seen.append((i, sorted(memory.here - {"rest"}))))
    streamed(model)
    assert {place for place, _ in seen} == set(range(LAYERS))
    for i, here in seen:
        assert here == [f"block {j}" for j in range(i, min(i + 2, LAYERS))]


def test_without_a_gpu_nothing_changes():
    model = small_model()
    plain = streamed(model)
    offload_blocks(model, "cpu")
    assert model.is_offloaded() and torch.equal(streamed(model), plain)
    for wrong, error, says in (
        (model, ValueError, "model must have its weights in one place to be offloaded"),
        (torch.nn.Linear(2, 2), TypeError, "model must be a CausalWan, got Linear"),
    ):
        with pytest.raises(error, match=says):
            offload_blocks(wrong, "cpu")
    compiled = small_model()
    compiled.compile_blocks()
    with pytest.raises(ValueError, match="model must not be compiled to be offloaded"):
        offload_blocks(compiled, "cpu")


def test_generate_and_a_pipeline_offload(wan, tmp_path, written, monkeypatch):
    """With the CPU in the GPU's place, where ``--offload`` is refused else."""
    words = ["--checkpoint", wan[0] / "pipeline", "--prompt", PROMPT, "--out", tmp_path / "a.mp4", "--chunks", 2, "--window", 5]
    assert aad(*words) == 0
    plain = torch.cat(written)
    written.clear()
    monkeypatch.setattr(WanSettings, "placement", lambda self: (torch.device("cpu"), torch.float32))
    offloaded = []
    monkeypatch.setattr("aadkern.wan.offload.apply_group_offloading", lambda *a, **k: (offloaded.append(a), real(*a, **k)))
    assert aad(*words, "--offload") == 0
    assert len(offloaded) == 1 and torch.equal(torch.cat(written), plain)
    pipe = CausalWanPipeline.from_pretrained(wan[0] / "pipeline", size=SIZE)
    options = dict(num_frames=9, generator=None, prompt=PROMPT, output_type="latent")
    torch.manual_seed(0)
    before = pipe(**options).frames
    pipe.enable_block_offload("cpu")
    torch.manual_seed(0)
    assert len(offloaded) == 2 and torch.equal(pipe(**options).frames, before)
    with pytest.raises(ValueError, match="lora must be loaded before the transformer's weights are offloaded"):
        pipe.load_lora_weights(tmp_path / "a.safetensors")


real = offload.apply_group_offloading


@pytest.mark.parametrize(
    "words, says",
    [
        (["--offload"], "offload must be left out on cpu: it spares a GPU's memory"),
        (["--offload", "--cuda-graphs"], "cuda_graphs must be left out with offload: the weights are elsewhere in each pass"),
        (["--offload", "--compile"], "compile must be left out with offload"),
    ],
    ids=str,
)
def test_what_does_not_go_with_offload(wan, words, says, capsys, monkeypatch, tmp_path):
    refused(words, says, capsys, monkeypatch, tmp_path, wan[0] / "pipeline")
