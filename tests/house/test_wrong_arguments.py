"""What was silently wrong, or failed somewhere inside with an error of torch's or Python's own: each is refused at the door now."""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, _build, blocks, checks, compat, plans
from aadkern.blocks import RotaryGrid
from benchmarks import run as bench
from tests.house.any_arguments import CONFIG, STEP, cache, diffusers_model, forward, generator, model, quantise, saved

LAYOUT = VideoLayout((2, 1), 2)
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "runs",
    [
        [((0, 8), [(0, 5), (3, 8)])],  # an area of 80 where there are 64 pairs
        [((0, 8), [(0, 10**6)])],  # beyond the keys
        [((0, 4), [(0, 8)])],  # rows left uncovered
        [((0, 5), [(0, 8)]), ((4, 8), [(0, 7)])],
        [((4, 8), [(0, 8)]), ((0, 4), [(0, 7)])],
        [((0, 8), [(4, 8), (0, 2)])],
        [((0, 8), [(0, 4), (4, 8)])],  # one range in two
        [((0, 8), [(3, 3)])],
        [((0, 4), [(0, 8)]), ((4, 8), [(0, 8)])],  # one run in two
        [((0, 8), [(-1, 8)])],
    ],
)
def test_a_plan_that_is_not_canonical_cannot_be_made(runs):
    with pytest.raises(ValueError, match=r"^runs"):
        AttentionPlan(8, 8, tuple((queries, tuple(ranges)) for queries, ranges in runs))
    code = [8, 8, *itertools.chain.from_iterable((*q, len(ranges), *itertools.chain(*ranges)) for q, ranges in runs)]
    with pytest.raises(ValueError, match=r"^code must be .*runs"):
        AttentionPlan.decode(code)
    q = torch.randn(1, 8, 1, 4)
    with pytest.raises(ValueError, match=r"code must be .*runs"):
        torch.ops.aadkern.range_attention(q, q, q, code, 0.5, "reference", False)
    with pytest.raises(ValueError, match=r"code must be .*runs"):
        torch.ops.aadkern.range_attention_backward(q, None, q, q, q, q, q[..., 0].mT, code, 0.5, "reference", False)


def test_random_numbers_are_no_plan_or_one_that_encodes_to_them():
    rng = random.Random(torch.randint(2**31, ()).item())
    made = 0
    for _ in range(3000):
        code = tuple(rng.choice((0, 1, 1, 2, 3, 4)) for _ in range(rng.randint(0, 9)))
        try:
            plan = AttentionPlan.decode(code)
        except ValueError:
            continue
        made += 1
        assert plan.encode() == code and plan.area == plan.dense().sum()
        again = AttentionPlan.from_ranges(plan.q_len, plan.k_len, plan.runs)
        assert again == plan and AttentionPlan(*code[:2], plan.runs) == plan
    assert made > 20


def test_the_raw_operator_refuses_tensors_that_its_plan_is_not_about():
    plan = plans.block_causal(LAYOUT, Window(2))
    q, other = torch.randn(1, 6, 2, 4), torch.randn(1, 5, 2, 4)
    crooked = torch.randn(1, 6, 4, 2).mT
    for wrong in ((other, q, q), (q, other, other), (q, q, other), (q, q[..., :1], q[..., :1]), (q[0], q[0], q[0])):
        with pytest.raises(ValueError, match=r"range_attention: plan must fit q \[B, 6, H, D\]"):
            torch.ops.aadkern.range_attention(*wrong, plan.code, 0.5, "auto", False)
    for wrong in ((crooked, q, q), (q, q.double(), q), (q, q, q.to("cpu").half())):
        with pytest.raises(ValueError, match=r"range_attention: [qkv] must be torch.float32 on cpu as q, its last dimension"):
            torch.ops.aadkern.range_attention(*wrong, plan.code, 0.5, "auto", False)


WHOLE = [((0, 4), [(0, 4)])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 4), (0, 4))]), r"runs\[0\] ranges\[0\] must be a \(start, end\) pair"),
        (lambda: AttentionPlan.from_ranges(4, 4, ((0, 4), [(0, 4)])), r"runs\[0\] queries must be a \(start, end\) pair, got 0"),
        (lambda: AttentionPlan.from_ranges(4, 4, 7), "runs must be a sequence of .*, got 7"),
        (lambda: AttentionPlan.from_ranges(4, 4, None), "runs must be a sequence of .*, got None"),
        (lambda: AttentionPlan.from_ranges(4, 4, "runs"), "runs must be a sequence of .*, got 'runs'"),
        (lambda: AttentionPlan.from_ranges(4, 4, {(0, 4): [(0, 4)]}), "runs must be a sequence of "),
        (lambda: AttentionPlan.from_ranges(4, 4, np.zeros((2, 2), int)), r"runs\[0\] queries must be a \(start, end\) pair"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 4), [(0, 0.5)])]), r"runs\[0\] ranges\[0\] end must be a whole number"),
        (lambda: AttentionPlan.decode(()), "code must be the whole numbers"),
        (lambda: AttentionPlan.decode([4, 4, 0, 4, [1]]), "code must be the whole numbers"),
        (lambda: AttentionPlan.from_ranges(2**31, 4, []), "q_len must be at most 2147483647"),
        (lambda: plans.block_causal(None), "layout must be a VideoLayout, got None"),
        (lambda: plans.block_causal([1, 2]), "layout must be a VideoLayout"),
        (lambda: plans.block_causal(LAYOUT, 9), "window must be a Window or None, got 9"),
        (lambda: plans.teacher_forcing(LAYOUT, window=9), "window must be a Window or None, got 9"),
        (lambda: plans.bidirectional(VideoLayout((1,), 4)).block_mask(block_size=0), "block_size must be at least 1, got 0"),
        (lambda: AttentionPlan(0, 0, ()).block_mask(), "plan must have queries and keys"),
        (lambda: AttentionPlan.from_ranges(0, 4, []).block_mask(), "plan must have queries and keys"),
        (lambda: Window(3, includes_sink="no"), "includes_sink must be True or False, got 'no'"),
        (lambda: LAYOUT.chunk_frames(7), "chunk must be at most 1, got 7"),
        (lambda: RotaryGrid([0.5], 1, 1), r"frames\[0\] must be a whole number, got 0.5"),
        (lambda: RotaryGrid(3, 1, 1, (0, 1, 1)), r"periods\[0\] must be at least 1"),
        (lambda: cache(dtype=torch.int32), "dtype must be one of float32, .*, got torch.int32"),
        (lambda: cache(device="gpu"), "device must be a torch.device or its name, .*, got 'gpu'"),
        (lambda: cache(merged="yes"), "merged must be True or False, got 'yes'"),
        (lambda: aadkern.backends("gpu"), "device must be a torch.device or its name, .*, got 'gpu'"),
        (lambda: aadkern.backends("cuda:99"), "device must be one that is here, got 'cuda:99'"),
        (lambda: generator(levels=None), "levels must be a sequence of noise levels, got None"),
        (lambda: generator(levels=[None]), r"levels\[0\] must be a real number, got NoneType"),
        (lambda: generator(levels=(0.5, 1.0)), r"^levels must be falling"),
        (lambda: generator(first_levels=[0.5, "x"]), r"first_levels\[1\] must be a real number, got str"),
        (lambda: forward(STEP["hidden_states"], 1.0), "timestep must be a torch.Tensor, got float"),
        (lambda: forward(STEP["hidden_states"], None), "timestep must be a torch.Tensor, got NoneType"),
        (lambda: model()(STEP["hidden_states"]), "timestep"),
        (lambda: forward(None, STEP["timestep"]), "hidden_states must be a torch.Tensor, got NoneType"),
        (lambda: forward(**STEP, encoder_hidden_states=["a cat"]), "encoder_hidden_states must be a torch.Tensor, got list"),
        (lambda: forward(**STEP, first_frame=0.5), "first_frame must be a whole number, got 0.5"),
        (lambda: forward(**STEP, cache="x"), "cache must be a StreamingCache or None, got 'x'"),
        (lambda: model().__class__(**CONFIG | dict(attention_head_dim=7)), "attention_head_dim must be even"),
        (lambda: model().__class__(**CONFIG | dict(num_attention_heads=0)), "num_attention_heads must be at least 1, got 0"),
        (lambda: saved(load=compat.load_model, path="model.pt", head_dim=0), "head_dim must be at least 1, got 0"),
        (lambda: saved(load=compat.load_model, path="model.pt", head_dim=8, ropes=1), "config must be of .*, got ropes"),
        (lambda: compat.load_checkpoint(None), "path must be the path of a .pt file, got None"),
        (lambda: quantise(sample=dict(STEP, timesteps=1)), "sample must hold arguments of the model, .*, got 'timesteps'"),
        (lambda: compat.set_processor(diffusers_model(), "causal"), "plan must be an AttentionPlan, a VideoLayout or None"),
    ],
)
def test_the_error_names_the_argument(make, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def sparse_ones() -> list[torch.Tensor]:
    nested = [
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=kind) for kind in (torch.strided, torch.jagged)
    ]
    return [torch.ones(1, 6, 2, 4).to_sparse(), torch.eye(6).to_sparse_csr(), *nested]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", sparse_ones(), ids=("coo", "csr", "nested", "jagged"))
def test_sparse_and_nested_tensors_are_named(wrong):
    q, weight, rows, x = torch.randn(1, 6, 2, 4), torch.randn(8), torch.randn(1, 3, 8), torch.randn(1, 6, 8)
    plan, square = plans.block_causal(LAYOUT), torch.randn(8, 8)
    calls = {
        "k": lambda: aadkern.attention(q, wrong, q, plan),
        "x": lambda: aadkern.attention_pool(wrong, x[0, :1], square, square, heads=2),
        "w_v": lambda: aadkern.attention_pool(x, x[0, :1], square, wrong, heads=2),
        "x0": lambda: aadkern.noised_views(wrong, torch.rand(1), delta_std=0.1, seed=0),
        "sigma": lambda: aadkern.noised_views(torch.randn(1, 1, 2, 2, 2), wrong, delta_std=0.1, seed=0),
        "q": lambda: blocks.qk_norm_rope(wrong, q, weight, weight, RotaryGrid(3, 1, 2)),
        "scale": lambda: blocks.modulated_norm(x, rows, wrong),
        "gate": lambda: blocks.gated_residual(x, x, wrong),
        "quantise_rows: x": lambda: aadkern.fp8.quantise_rows(wrong),
        "hidden_states": lambda: forward(wrong, STEP["timestep"]),
        "encoder_hidden_states": lambda: forward(**STEP, encoder_hidden_states=wrong),
        "text": lambda: generator().set_text(wrong),
        r"noise\(1, 0\)": lambda: next(generator().chunks(lambda *_: wrong)),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"\b{name} must be a dense tensor, got (layout|a nested)"):
            call()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_destinations_that_share_memory_are_refused(backend):
    grid, weight = RotaryGrid(3, 1, 2), torch.randn(8)
    q, k, out = (torch.randn(1, 6, 2, 4) for _ in range(3))
    both = torch.randn(1, 7, 2, 4)
    for wrong, message in (
        (dict(q_out=out, k_out=out), "q_out must lie apart from k_out"),
        (dict(q_out=both[:, :6], k_out=both[:, 1:]), "q_out must lie apart from k_out"),
        (dict(k_out=out[:, :1].expand(-1, 6, -1, -1)), "k_out must have a place for each element"),
        (dict(k_out=torch.zeros(20).as_strided((1, 6, 2, 4), (1, 2, 4, 1))), "k_out must have a place for each element"),
        (dict(k_out=q), "k_out must lie apart from q"),
        (dict(q_out=k), "q_out must lie apart from k,"),
    ):
        with pytest.raises(ValueError, match=message):
            blocks.qk_norm_rope(q, k, weight, weight, grid, backend=backend, **wrong)
    with pytest.raises(ValueError, match="k_out must be k itself or lie apart from it"):
        blocks.qk_norm_rope(q, both[:, 1:], weight, weight, grid, k_out=both[:, :6], backend=backend)
    expected = blocks.qk_norm_rope(q, k, weight, weight, grid, backend=backend)
    fused = torch.zeros(1, 6, 3, 2, 4)  # side by side in one buffer, and each in place
    for q_out, k_out in ((fused[:, :, 0], fused[:, :, 2]), (q.clone(), k.clone())):
        made = blocks.qk_norm_rope(q, k, weight, weight, grid, q_out=q_out, k_out=k_out, backend=backend)
        assert made[0] is q_out and all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    fused[:, :, 0], fused[:, :, 2] = q, k
    sources = (fused[:, :, 0], fused[:, :, 2])
    in_place = blocks.qk_norm_rope(*sources, weight, weight, grid, q_out=sources[0], k_out=sources[1], backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(in_place, expected, strict=True)) and (fused[:, :, 1] == 0).all()


def test_overlap_is_what_addresses_say():
    rng = random.Random(torch.randint(2**31, ()).item())
    storage = torch.arange(400)
    counts = [0, 0]
    for _ in range(1500):
        shape = [rng.randint(1, 3) for _ in range(3)]
        strides = [rng.choice((0, 1, 2, 3, 4, 6, 9, 12)) for _ in range(3)]
        a, b = (storage.as_strided(shape, strides, rng.randint(0, 40)) for _ in range(2))
        twice, shared = len(set(a.flatten().tolist())) < a.numel(), bool(set(a.flatten().tolist()) & set(b.flatten().tolist()))
        assert not twice or checks.overlaps_itself(a)
        assert not shared or checks.overlap(a, b)
        # The rule is sufficient: it may see an overlap where there is none, but not of what is nested as memory is.
        nested = sorted(zip(strides, shape, strict=True))
        if all(stride >= before * count for (before, count), (stride, _) in itertools.pairwise(nested)) and nested[0][0] > 0:
            assert not checks.overlaps_itself(a)
            counts[0] += 1
        counts[1] += shared
    assert min(counts) > 30


def test_noise_of_another_shape_is_refused_before_anything_is_done():
    for step, shape in itertools.product((0, 1), ((1, 2, 1, 2, 2), (1, 2, 2, 2, 1), (1, 1, 2, 2, 2), (2, 2, 2, 2, 2), (2, 2, 2))):
        if step == 0 and shape == (1, 2, 1, 2, 2):
            continue  # a chunk of another size
        made = generator(levels=(1.0, 0.5))
        first = torch.randn(1, 2, 1, 2, 2)
        shapes = {step: shape}
        with pytest.raises(ValueError, match="noise"):
            next(made.chunks(lambda _, s, of=shapes: torch.randn(of.get(s, (1, 2, 2, 2, 2))), first_frame=first))
    for wrong in (None, np.zeros((1, 2, 2, 2, 2)), torch.ones(1, 2, 2, 2, 2, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"noise\(1, 0\) must be"):
            next(generator().chunks(lambda *_, x=wrong: x))


def stream(first=None, change=None, abandon=None, count=3):
    """Chunks from a seed; ``change`` is done to the first frame once handed over, ``abandon`` begins a stream never asked for."""
    made = generator()
    seeded = torch.Generator().manual_seed(3)
    if abandon is not None:
        made.chunks(lambda *_: torch.zeros(1, 2, 2, 2, 2), first_frame=abandon)
    chunks = made.chunks(lambda *_: torch.randn(1, 2, 2, 2, 2, generator=seeded), count, first_frame=first)
    if change is not None:
        first.add_(change)
    return torch.cat(list(chunks), 2)


def test_a_first_frame_is_taken_when_it_is_given():
    first = torch.randn(1, 2, 1, 2, 2)
    expected = stream(first.clone())
    assert not torch.equal(expected, stream(first + 1.0))
    assert torch.equal(expected, stream(first, change=1.0))


def test_a_stream_that_nobody_begins_leaves_no_trace():
    first = torch.randn(1, 2, 1, 2, 2)
    assert torch.equal(stream(), stream(abandon=first))
    assert torch.equal(stream(first), stream(first, abandon=first + 1))
    made = generator()
    late = made.chunks(lambda *_: torch.randn(1, 2, 2, 2, 2), first_frame=first)
    next(made.chunks(lambda *_: torch.randn(1, 2, 2, 2, 2)))
    with pytest.raises(ValueError, match="first_frame must be None after the start"):
        next(late)
    with pytest.raises(ValueError, match="first_frame must be None for no chunk"):
        generator().chunks(lambda *_: torch.randn(1, 2, 2, 2, 2), 0, first_frame=first)


@torch.no_grad()
@pytest.mark.parametrize("window", [Window(), Window(2, sink=1)])
def test_teacher_forcing_starts_both_halves_at_the_first_frame(window):
    layout = VideoLayout((1, 2, 1), 1)
    plan = plans.teacher_forcing(layout, window)
    x, t = torch.randn(1, 2, 8, 2, 2), torch.rand(1, 8) * 1000
    both = model()(x, t, plan=plan, first_frame=(0, 0))
    torch.testing.assert_close(model()(x, t, plan=plan), both, rtol=0, atol=0)
    torch.testing.assert_close(model()(x, t, plan=plan, first_frame=9), both, rtol=1e-3, atol=1e-4)
    apart = model()(x, t, plan=plan, first_frame=(0, 4))  # one long clip, if that is what is meant
    assert (apart - both).abs().max() > 1e-3


def test_a_plan_tells_whether_it_is_teacher_forcing():
    rng = random.Random(torch.randint(2**31, ()).item())
    for _ in range(60):
        layout = VideoLayout([rng.randint(1, 3) for _ in range(rng.randint(2, 5))], rng.randint(1, 3))
        # Windows that hold the sink and a chunk: in a smaller one a chunk sees the sink in place of its own first frames, which
        # looks as a noisy chunk does that sees clean frames.
        window = rng.choice([Window(), Window(rng.randint(1, 6)), Window(rng.randint(5, 8), sink=2), Window(sink=1)])
        plan = plans.teacher_forcing(layout, window)
        half = layout.tokens
        mixed = bool(plan.dense()[half:, :half].any())  # not in a window of one chunk: positions then do not matter
        assert plan.is_teacher_forcing == mixed
        assert AttentionPlan.decode(plan.encode()).is_teacher_forcing == mixed
        twice = VideoLayout(layout.chunks * 2, layout.tokens_per_frame)
        others = [plans.bidirectional(twice), plans.block_causal(twice, window), plans.frame_isolated(twice), plan.transpose()]
        assert not any(other.is_teacher_forcing for other in others)
        if mixed:
            dense = plan.dense()
            i = rng.choice(dense[half:, :half].any(1).nonzero().flatten().tolist()) + half
            for k0, k1 in (((0, 1), (0, 2)), ((half - 1, half), (half, half + 1))):  # that row alone sees other keys
                runs = [((j, j + 1), [k0, k1] if j == i else _ranges(dense[j])) for j in range(2 * half)]
                changed = AttentionPlan.from_ranges(2 * half, 2 * half, runs)
                assert changed == plan or changed.is_teacher_forcing == _folds(changed.dense(), half)


def _ranges(row):
    edges = torch.nn.functional.pad(row.int(), (1, 1)).diff()
    return list(zip((edges > 0).nonzero().flatten().tolist(), (edges < 0).nonzero().flatten().tolist(), strict=True))


def _folds(dense, half):
    """The rule on the dense mask."""
    clean, before, own = dense[:half, :half], dense[half:, :half], dense[half:, half:]
    return not dense[:half, half:].any() and not (before & own).any() and torch.equal(before | own, clean) and bool(before.any())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seconds", "nan"], "--seconds must be finite and more than 0, got nan"),
        (["--seconds", "0"], "--seconds must be finite and more than 0, got 0.0"),
        (["--heads", "0"], "--heads must be at least 1, got 0"),
        (["--head-dim", "-8"], "--head-dim must be at least 1, got -8"),
        (["--tokens-per-frame", "0"], "--tokens-per-frame must be at least 1, got 0"),
        (["--device", "cuda"], "--device must be one that is here, got cuda"),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_measure(words, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu", "--case", "7x3/2x2x16", "--contender", "sdpa", *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("built", [None, (), ("9.0a",)])
@pytest.mark.parametrize("there", [False, True])
def test_the_build_and_the_backends_say_the_same_of_the_kernels(built, there, monkeypatch, tmp_path):
    """Whatever was built, and whatever lies there now."""
    info = None if built is None else {"version": "0", "compiler": "c", "cxx_standard": 17, "build_type": "Release"}
    if info is not None:
        info |= {"cuda_compiler": None, "cuda_architectures": built, "no_cuda": None if built else "no nvcc was found"}
    library = tmp_path / "_C.abi3.so"
    library.write_text("not a library")
    monkeypatch.setattr(_build, "build_info", lambda: info)
    monkeypatch.setattr(_build, "cuda_library", lambda: library if there else None)
    for asked in (_build.load_cuda, aadkern.runtime.reason_against):
        asked.cache_clear()
    try:
        reason = aadkern.backends("cpu")["sm90"]
        assert reason == _build.load_cuda() and reason in _build.describe()
        assert "CUDA kernels: sm_90a" not in _build.describe()
        if built == () and there:
            assert reason.startswith("not built: no nvcc was found") and str(library) in reason
        if built and not there:
            assert "they were built, but" in reason
    finally:
        for asked in (_build.load_cuda, aadkern.runtime.reason_against):
            asked.cache_clear()


def test_a_folder_that_hides_the_installed_package_is_told(tmp_path):
    """A copy of the package in the current directory, and another one installed."""
    site, here = tmp_path / "site", tmp_path / "here"
    shutil.copytree(ROOT / "aadkern", here / "aadkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (site / "aadkern").mkdir(parents=True)
    (site / "aadkern" / "__init__.py").touch()
    (site / "aadkern-9.dist-info").mkdir()
    (site / "aadkern-9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: aadkern\nVersion: 9\n")
    lines = [f"import sys; sys.path[1:1] = [{str(site)!r}]", "from aadkern import _build"]
    lines += ["print(_build.shadowing())", "print(_build.describe())"]
    code = "\n".join(lines)
    told = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, env={"PATH": ""})
    assert told.returncode == 0, told.stderr
    first, second = told.stdout.splitlines()
    assert first.startswith(f"aadkern is imported from {here / 'aadkern'}, and what is installed is {site / 'aadkern'}")
    assert second.endswith(f"WARNING: {first}")


def test_an_installed_package_hides_nothing(tmp_path, monkeypatch):
    origin = f'{{"url": "{ROOT.as_uri()}", "dir_info": {{"editable": true}}}}'
    editable = types.SimpleNamespace(read_text=lambda _: origin, locate_file=lambda name: tmp_path / name)
    plain = types.SimpleNamespace(read_text=lambda _: None, locate_file=lambda name: ROOT / name)
    for distributions in ([editable], [plain], []):
        monkeypatch.setattr(_build.importlib.metadata, "distributions", lambda name, found=distributions: found)
        assert _build.shadowing() is None


def test_a_plan_holds_ints():
    """A plan's numbers are Python's own ints, whatever they came as: they are hashed and written into operators."""
    for number in (np.int64, torch.tensor, int):
        plan = AttentionPlan.from_ranges(number(4), number(4), [((number(0), number(4)), [(number(0), number(2))])])
        assert plan == AttentionPlan.from_ranges(4, 4, [((0, 4), [(0, 2)])]) and {type(x) for x in plan.code} == {int}
