"""The streaming benchmark at Wan's shapes: its FLOPs are what runs, only the right video is timed, what is missing is told."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.utils._device import _device_constructors
from torch.utils.flop_counter import FlopCounterMode

from aadkern import StreamingCache, StreamingGenerator, Window
from benchmarks import goals, results, streaming, table
from benchmarks.streaming_contenders import MOST_DIFFERENCE, REFERENCES, WAYS, Bench, Parts, WrongVideo, difference
from benchmarks.streaming_lineage import ClonedCache
from benchmarks.streaming_shapes import (
    LEVELS,
    SIZES,
    VAE_FRAME_FLOPS,
    WINDOW,
    chunk_flops,
    floor_seconds,
    model_of,
    pass_flops,
    vae_of,
)
from tests.engine.processes import environment


@pytest.fixture
def bench(monkeypatch) -> Bench:
    monkeypatch.setattr("benchmarks.streaming_contenders.LEAST_SECONDS", 0.0)
    return Bench(SIZES["tiny"], torch.device("cpu"))


@pytest.fixture
def meta(monkeypatch):
    """``with torch.device("meta")`` as it is outside the tests: their poisoned ``torch.empty`` is no factory that it knows."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, getattr(torch, name).__wrapped__)
    _device_constructors.cache_clear()
    yield
    _device_constructors.cache_clear()


@pytest.mark.parametrize(("name", "tera", "fps"), [("1.3B", 48.5, 195.4), ("14B", 447.1, 28.3)])
def test_a_chunk_of_the_true_shapes_costs_what_the_floor_says(meta, name, tera, fps):
    """Counted over a whole run on meta tensors: the first chunk that sees a full window, by two passes and by a merged one."""
    size = SIZES[name]._replace(layers=3)  # every block costs the same
    model = model_of(size, "meta", torch.bfloat16)
    first, noise = (torch.empty(1, 16, frames, 60, 104, device="meta", dtype=torch.bfloat16) for frames in (1, size.chunk))
    text = torch.empty(1, 512, 4096, device="meta", dtype=torch.bfloat16)
    # The clean pass stops at the last block's keys and values: left of that block are two products, and nothing else; merged,
    # its queries are made too.
    spared = pass_flops(size) // size.layers - 4 * size.tokens * size.dim**2
    counted = []
    for merged in (False, True):
        cache = StreamingCache.for_model(model, 1, 60, 104, WINDOW, max_chunk_frames=size.chunk, merged=merged)
        video = StreamingGenerator(model, cache, text=text).chunks(lambda chunk, step: noise, first_frame=first)
        for _ in range(size.warm_chunks(0)):
            next(video)
        with FlopCounterMode(display=False) as counter:
            next(video)
        counted.append(counter.get_total_flops())
    assert counted[0] == pytest.approx(chunk_flops(size, 1) - spared, rel=2e-3)
    assert counted[1] - counted[0] == 2 * size.tokens * size.dim**2
    size = SIZES[name]
    assert chunk_flops(size, 1) / 1e12 == pytest.approx(tera, abs=0.05)
    assert 4 * size.chunk / floor_seconds(size, 1) == pytest.approx(fps, abs=0.1)
    assert chunk_flops(size, 4) == 2.5 * chunk_flops(size, 1)


def test_true_shapes_are_wans(meta):
    sizes = {name: sum(p.numel() for p in model_of(SIZES[name], "meta", torch.bfloat16).parameters()) for name in ("1.3B", "14B")}
    assert sizes == {"1.3B": 1418996800, "14B": 14288491584}  # Wan2.1-T2V-1.3B's and 14B's own
    kept = model_of(SIZES["tiny"], "cpu", torch.bfloat16)
    assert kept.blocks[0].scale_shift_table.dtype == kept.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    assert kept.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


def test_the_vae_is_wan_21s_and_costs_what_is_said(meta):
    from aadkern.wan.vae import StreamingDecoder

    vae = vae_of(SIZES["1.3B"], "meta", torch.bfloat16)
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531 and {p.dtype for p in vae.parameters()} == {torch.bfloat16}
    decoder = StreamingDecoder(vae)
    latents = torch.empty(1, 16, 2, 60, 104, device="meta", dtype=torch.bfloat16)
    assert decoder.decode(latents).shape == (1, 3, 5, 480, 832)
    with FlopCounterMode(display=False) as counter:
        assert decoder.decode(latents).shape == (1, 3, 8, 480, 832)
    assert counter.get_total_flops() == pytest.approx(2 * VAE_FRAME_FLOPS, rel=1e-3)


def test_a_video_is_decoded_as_it_is_made(bench):
    record = bench.vae("merged")
    assert record["pixels"] == [1, 3, 12, 32, 48] and record["ms_per_chunk"] > 0 < record["vae_ms_per_chunk"]


def test_the_same_seed_gives_the_same_model():
    one, two, other = (model_of(SIZES["tiny"], "cpu", torch.float32, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["blocks.0.attn1.to_q.weight"], other["blocks.0.attn1.to_q.weight"])


@pytest.mark.parametrize("nfe", LEVELS)
def test_right_contenders_are_timed(bench, nfe):
    for name in ("lineage", "two passes", "merged"):
        record = bench.contender(name, nfe)
        frames = 4 * SIZES["tiny"].chunk
        assert record["fps"] == pytest.approx(1e3 * frames / record["ms_per_chunk"])
        assert record["difference"] < 5e-6 and record["first_chunk_ms"] > 0
        assert len(record["rounds_ms"]) % SIZES["tiny"].phases == 0 and min(record["rounds_ms"]) > 0


FAULTS = {
    "the sink is not seen": ("_ranges", lambda whole: lambda self, seen, second: whole(self, seen[1:] or seen, second)),
    "one frame of the window is not seen": (
        "_ranges",
        lambda whole: lambda self, seen, second: whole(self, [(a + 1 if b > 3 else a, b) for a, b in seen], second),
    ),
    "keys are one frame late": (
        "_ranges",
        lambda whole: lambda self, seen, second: tuple((a - 6, b - 6) if a > 6 else (a, b) for a, b in whole(self, seen, second)),
    ),
}


@pytest.mark.parametrize(
    ("fault", "dtype"), [*((fault, torch.float32) for fault in FAULTS), ("one frame of the window is not seen", torch.bfloat16)]
)
def test_a_wrong_video_is_not_timed(bench, monkeypatch, fault, dtype):
    bench.dtype = dtype
    bench.noises, bench.first, bench.text = [x.to(dtype) for x in bench.noises], bench.first.to(dtype), bench.text.to(dtype)
    for name in REFERENCES:
        bench.video(name, 1)
    assert bench.contender("merged", 1)["difference"] < bench.judge("merged", 1, bench.video("two passes", 1))["allowed"]
    method, broken = FAULTS[fault]
    monkeypatch.setattr(StreamingCache, method, broken(getattr(StreamingCache, method)))
    with pytest.raises(WrongVideo, match="a latent frame differs from the lineage's by"):
        bench.contender("merged", 1)


def test_a_frame_that_is_not_seen_shows_among_many_tokens(bench, monkeypatch):
    """256 tokens a frame, two layers: the model is made so that no frame's share drowns among the others'."""
    bench.size = SIZES["tiny"]._replace(layers=2, heads=1, head_dim=128, height=32, width=32)
    bench.noises = [torch.randn(1, 16, 3, 32, 32) for _ in bench.noises]
    bench.first = torch.randn(1, 16, 1, 32, 32)
    whole = bench.warm("merged", 1)[1]
    method, broken = FAULTS["one frame of the window is not seen"]
    monkeypatch.setattr(StreamingCache, method, broken(getattr(StreamingCache, method)))
    assert difference(bench.warm("merged", 1)[1], whole) > MOST_DIFFERENCE


def test_a_rival_with_a_wrong_cache_lets_nobody_be_timed(bench, monkeypatch):
    monkeypatch.setattr(ClonedCache, "_attend", lambda self, layer, frames, q, k, v: self.attend(q, k, v))
    bench.contender("lineage", 1)
    for name in ("two passes", "merged"):
        with pytest.raises(WrongVideo):
            bench.contender(name, 1)


def test_a_video_that_is_not_finite_is_wrong(bench):
    chunks = [chunk.clone() for chunk in bench.video("lineage", 1)]
    bench.video("two passes", 1)
    chunks[-1][0, 3, 1, 2, 2] = float("nan")
    assert difference(chunks, bench.video("lineage", 1)) != difference(chunks, bench.video("lineage", 1))
    with pytest.raises(WrongVideo):
        bench.judge("merged", 1, chunks)


def test_parts_of_a_chunk_are_told_apart(bench):
    layers = SIZES["tiny"].layers
    for name, passes in (("merged", 1), ("lineage", 2)):
        video, _ = bench.warm(name, 1)
        with Parts(bench.device) as parts:
            next(video)
        assert len(parts.marks["attention"]) == 2 * layers * passes  # to the ring, to the text
        assert 0 <= len(parts.marks["linear"]) - 8 * layers * passes <= 6 * passes  # embeddings, the head
        record = bench.split(name)
        assert record["linear"] > 0 and record["attention"] > 0
        assert record["linear"] + record["attention"] + record["rest"] == pytest.approx(record["ms_per_chunk"])


def test_every_item_names_a_way():
    for item in (*streaming.ON_CUDA, *streaming.ON_CPU):
        what, _, rest = item.partition(": ")
        assert (rest.removesuffix(" NFE").rpartition(", ")[0] if what == "rate" else rest) in WAYS
    assert streaming.items("cpu") == list(streaming.ON_CPU) and goals.STREAMED in streaming.ON_CUDA
    with pytest.raises(ValueError, match="item must be"):
        streaming.items("cpu", ["merged"])


def test_a_run_in_workers_writes_what_it_found(tmp_path):
    asked = ["rate: merged, 1 NFE", "rate: merged + graphs, 1 NFE", "rate: nobody, 1 NFE"]
    out = tmp_path / "streaming.json"
    words = ["--size", "tiny", "--device", "cpu", "--limit", "60", "--commit", "0123abc", "--out", str(out), "--item", *asked]
    command = [sys.executable, "-m", "benchmarks.streaming", *words]
    done = subprocess.run(command, cwd=results.ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text())
    made = document["sizes"]["tiny"]
    assert results.problems(document["environment"], results.FORM["environment"]) == []
    assert document["environment"]["commit"] == "0123abc" and made["outcome"] == "passed" and made["not_reached"] == []
    statuses = {item: record["status"] for item, record in made["items"].items()}
    assert statuses == dict(zip(asked, ("timed", "missing", "failed"), strict=True))
    assert "rate: merged, 1 NFE" in done.stdout and "needs a CUDA device" in done.stdout
    assert made["items"][asked[2]]["reason"].endswith("got 'nobody'")


def test_without_diffusers_it_says_so(tmp_path):
    out = tmp_path / "streaming.json"
    code = "import sys; sys.modules['diffusers'] = None; from benchmarks import streaming; sys.exit(streaming.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--size", "tiny", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=results.ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "not run: diffusers is missing; docs/results.md" in done.stdout, done.stdout + done.stderr
    assert json.loads(out.read_text()) == {"not_run": "diffusers is missing"}
    assert "bring" in (results.ROOT / "docs" / "results.md").read_text()


def timed(fps: float, **more: object) -> dict:
    return {"status": "timed", "fps": fps, "ms_per_chunk": 12e3 / fps, "floor_share": 0.5, "peak_bytes": 2**34, **more}


def test_goals_of_rooms_are_judged_on_a_hopper():
    sizes = {
        size: {**streaming.facts(size), "items": {"rate: lineage, 1 NFE": timed(50.0), goals.STREAMED: timed(fps, difference=5e-3)}}
        for size, fps in (("1.3B", 101.0), ("14B", 19.0))
    }
    pooling = {"channels": 1536, "keys": False, "forward_ms": {"layer": 0.9, "aadkern": 0.1}}
    pooling |= {"share_of_copy_bandwidth": {"forward": 0.6, "both": 0.9}}
    rooms = {"streaming": {"sizes": sizes}, "pooling": {"cases": {"1.3B": pooling, "keyed": {**pooling, "keys": True}}}}
    document = results.empty(results.environment("cpu"), {}) | {"rooms": rooms}
    assert list(goals.judged(document, table.times)) == []
    document["environment"]["device"] |= {"type": "cuda", "name": "NVIDIA H200", "capability": "9.0"}
    assert [line.split(maxsplit=1) for line in goals.judged(document, table.times)] == [
        ["met", "streaming 1.3B, 1 NFE, without VAE: 101 of 100 FPS"],
        ["missed", "streaming 14B, 1 NFE, without VAE: 19 of 20 FPS"],
        ["met", "pooling 1.3B forward: 9 of 8 x layer"],
        ["missed", "pooling 1.3B forward: 0.6 of 0.7 of copy bandwidth"],
    ]
    text = "\n".join(table.short_lines(document))
    assert "floor 195 FPS" in text and "met    streaming 1.3B" in text
    row = next(line.split() for line in text.splitlines() if line.strip().startswith(goals.STREAMED))
    assert row[-6:] == ["101", "50%", "2.02", "-", "16.0", "5.0e-03"]
    h20 = copy.deepcopy(document)
    h20["environment"]["device"]["name"] = "NVIDIA H20"
    assert list(goals.judged(h20, table.times)) == []


def test_window_and_chunks_fit():
    assert Window(9, sink=1) == WINDOW
    for size in SIZES.values():
        assert size.phases * size.chunk == StreamingCache(1, 1, 1, 2, 1, WINDOW, max_chunk_frames=size.chunk, merged=True).ring
