"""Passes replayed from CUDA graphs against passes run one by one, on a GPU. Unverified: not run on a GPU yet."""

from __future__ import annotations

import pytest
import torch

from aadkern import StreamingCache, StreamingGenerator, Window

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def wan():
    try:
        import aadkern.wan  # noqa: F401
    except ImportError as error:
        pytest.skip(f"{error.name or error} is missing, which CausalWan needs")


def model_on_gpu(rope, dtype, layers=3):
    from aadkern.wan import CausalWan

    return CausalWan(
        num_layers=layers, num_attention_heads=2, attention_head_dim=64, ffn_dim=256, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=32, rope=rope,
    ).to("cuda", dtype).eval()  # fmt: skip


def stream_on_gpu(model, merged, cuda_graphs, levels=(1.0,), batch=1):
    cache = StreamingCache.for_model(model, batch, 16, 24, Window(9, sink=1), max_chunk_frames=3, merged=merged)
    text = torch.randn(batch, 7, 32, generator=torch.Generator().manual_seed(5)).to(cache.keys)
    return StreamingGenerator(model, cache, levels=levels, text=text, cuda_graphs=cuda_graphs)


def noise_on_gpu(dtype, batch=1):
    table = {}
    return lambda chunk, step: table.setdefault((chunk, step), torch.randn(batch, 16, 3, 16, 24, device="cuda", dtype=dtype))


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize(("merged", "levels", "batch"), [(True, (1.0,), 1), (True, (1.0, 0.6), 2), (False, (1.0,), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_bits_of_passes_run(rope, merged, levels, batch, dtype):
    model, noise = model_on_gpu(rope, dtype), noise_on_gpu(dtype, batch)
    plain, replayed = (stream_on_gpu(model, merged, cuda_graphs, levels, batch) for cuda_graphs in (False, True))
    texts = [torch.randn(batch, length, 32).cuda().to(dtype) for length in (7, 7, 11)]
    for turn, text in enumerate([None, *texts]):
        for generator in (plain, replayed):
            if text is not None:
                generator.set_text(text, recache=turn == 1)
        for chunk, (expected, made) in enumerate(zip(plain.chunks(noise, 16), replayed.chunks(noise, 16), strict=True)):
            assert torch.equal(made, expected), f"turn {turn}, chunk {chunk}"
            assert made.isfinite().all()
        if turn == 1:
            plain.reset()
            replayed.reset()
    assert len(replayed.graphs) >= 3
    with torch.no_grad():  # a capture of somebody else's while ours live
        x, graph = torch.randn(64, 64, device="cuda"), torch.cuda.CUDAGraph()
        x @ x
        with torch.cuda.graph(graph):
            y = x @ x
        graph.replay()
    torch.testing.assert_close(y, x @ x)


@pytest.mark.parametrize("what", ["plain", "compiled", "fp8"])
def test_a_steady_stream_never_waits_for_the_gpu(what):
    from aadkern.wan.fp8 import quantise

    model, noise = model_on_gpu("relative", torch.bfloat16), noise_on_gpu(torch.bfloat16)
    if what == "fp8":
        quantise(model)
    if what == "compiled":
        model.compile_blocks()
    plain, replayed = stream_on_gpu(model, True, False), stream_on_gpu(model, True, True)
    for expected, made in zip(plain.chunks(noise, 16), replayed.chunks(noise, 16), strict=True):
        assert torch.equal(made, expected)
    list(map(noise, range(17, 29), [0] * 12))
    captured = len(replayed.graphs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made = list(replayed.chunks(noise, 12))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(replayed.graphs) == captured and all(map(torch.equal, made, plain.chunks(noise, 12)))
