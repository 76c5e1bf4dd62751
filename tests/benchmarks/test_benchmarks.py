"""Benchmarks: exact FLOPs, the plan of a streamed chunk, the rivals' adapters, and a check that lets nothing wrong be timed."""

from __future__ import annotations

import dataclasses
import functools
import time
import types
import zlib

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import aadkern
from aadkern import VideoLayout, Window, plans
from aadkern.range_attention import reference, sm90
from aadkern.testing import Results, exact, make_gradients, make_inputs
from benchmarks import checks, contenders, sweep, timing
from benchmarks.cases import (
    HEAD_DIM,
    PLANS,
    attention_case,
    attention_cases,
    case_of,
    core_cases,
    further_cases,
    ring_chunk,
)
from benchmarks.checks import Problem, Truth, WrongResult, check, pieces, truth
from benchmarks.contenders import CONTENDERS, Missing, dense_loop, heads_first

CPU = torch.device("cpu")


def drawn() -> int:
    """A seed from the test's own."""
    return int(torch.randint(2**31, ()))


def problem_of(name: str, dtype: torch.dtype = torch.float32, tokens: int = 5, heads: int = 3, head_dim: int = 8) -> Problem:
    case = attention_case(name, tokens, heads, head_dim)
    q, k, v = make_inputs(case.plan, heads, head_dim, dtype, seed=drawn())
    return Problem(case, q, k, v, make_gradients(q, seed=drawn())[0])


@functools.cache
def judged(name: str, dtype: torch.dtype = torch.float32) -> tuple[Problem, Truth]:
    with torch.random.fork_rng():  # shared by tests, so not of whichever comes first
        torch.manual_seed(zlib.crc32(f"{name} {dtype}".encode()))
        problem = problem_of(name, dtype)
    return problem, truth(problem, seconds=1e9)


@pytest.mark.parametrize("name", PLANS)
def test_flops_count_every_product_of_every_visible_pair(name):
    case = attention_case(name, 7, 3, 16)
    pairs = int(case.plan.dense().sum())
    product = 2 * pairs * 3 * 16  # multiply and add, for every pair, head and column
    assert case.flops("forward") == 2 * product  # q k^T, p v
    assert case.flops("backward") == 5 * product  # q k^T again, dout v^T, p^T dout, ds k, ds^T q
    assert case.flops("both") == 7 * product
    assert case.density == pairs / (case.plan.q_len * case.plan.k_len)


@pytest.mark.parametrize(
    ("name", "heads", "tera", "density"),
    [  # 480p, 21 frames: worked out by hand from 32760 tokens, and from frames seen per chunk
        ("bidirectional", 12, 4 * 32760**2 * 12 * 128 / 1e12, 1.0),
        ("7x3", 12, 4 * 32760**2 * 12 * 128 / 1e12 * 4 / 7, 4 / 7),
        ("7x3_window9_sink3", 40, 4 * 32760**2 * 40 * 128 / 1e12 * (3 + 6 + 5 * 9) / (7 * 21), 54 / 147),
        ("i2v_window9_sink1", 12, 4 * 1560**2 * 12 * 128 / 1e12 * (1 * 1 + 4 * 5 + 4 * 4 * 9), (1 + 20 + 144) / 441),
        ("teacher_forcing", 12, 4 * 4680**2 * 12 * 128 / 1e12 * 2 * 28, 2 * 28 / 14**2),
        ("framewise", 12, 4 * 1560**2 * 12 * 128 / 1e12 * 231, 231 / 441),
        ("ring_chunk", 12, 4 * 1560**2 * 12 * 128 / 1e12 * 4 * 9, None),
    ],
)
def test_flops_at_the_true_sizes(name, heads, tera, density):
    case = attention_case(name, heads=heads)
    assert case.flops() / 1e12 == pytest.approx(tera, rel=1e-12)
    assert density is None or case.density == pytest.approx(density, rel=1e-12)


def test_core_and_further_cases_are_cases():
    made = [case_of(text) for text in (*core_cases(), *further_cases())]
    assert len({case.id for case in made}) == len(made)
    assert {case.name for case in made} == set(PLANS)
    assert all(case.head_dim == HEAD_DIM for case in made) and {case.heads for case in made} == {12, 40}
    assert {case.name for case in attention_cases(5, 2, 8)} == set(PLANS)


@pytest.mark.parametrize("text", ["8x3", "7x3/1560x12", "7x3/0x12x128", "7x3/axbxc"])
def test_a_case_that_is_none_is_a_value_error(text):
    with pytest.raises(ValueError, match="case must be"):
        case_of(text)


@pytest.mark.parametrize(
    ("tokens", "chunk", "window"), [(7, 4, Window(9, sink=1)), (128, 4, Window(9, sink=1)), (33, 3, Window(11, sink=2))]
)
def test_the_streamed_chunk_sees_what_the_same_chunk_of_a_clip_sees(tokens, chunk, window):
    """Keys of a clip's frames laid into sink, ring and own slots, NaN everywhere else: the clip's own attention comes out."""
    plan = ring_chunk(tokens, chunk, window)
    ranges = plan.runs[0][1]
    assert len(plan.runs) == 1 and len(ranges) == 4  # disjoint, none touching: the canonical form would join them
    recent = window.frames - window.sink
    frames = window.sink + 2 * recent + chunk
    layout = VideoLayout((frames - chunk, chunk), tokens)
    clip = plans.block_causal(layout, window)
    q, k, v = make_inputs(clip, 2, 8, torch.float64, seed=drawn())
    first = frames - chunk
    earlier = list(range(frames - recent, first))  # in view beside sink and chunk, oldest first
    tail = len(earlier) // 2
    assert ranges[2][1] - ranges[1][0] == 2 * len(earlier) * tokens  # the ring, from its beginning to its end
    assert all(start % 128 == 0 for start in (ranges[0][0], ranges[1][0], ranges[3][0]))
    in_slots = [range(window.sink), earlier[tail:], earlier[:tail], range(first, frames)]  # the ring's head holds the newer ones
    keys, values = (torch.full((1, plan.k_len, 2, 8), float("nan"), dtype=torch.float64) for _ in range(2))
    for (a, b), held in zip(ranges, in_slots, strict=True):
        at = torch.cat([torch.arange(f * tokens, (f + 1) * tokens) for f in held])
        keys[:, a:b], values[:, a:b] = k[:, at], v[:, at]
    streamed = aadkern.attention(q[:, first * tokens :], keys, values, plan)
    torch.testing.assert_close(streamed, aadkern.attention(q, k, v, clip)[:, first * tokens :])
    assert plan.k_len < (window.sink + 2 * recent + chunk) * tokens + 3 * 129


def test_a_streamed_chunk_needs_something_to_see():
    with pytest.raises(ValueError, match="window must"):
        ring_chunk(7, 4, Window(4))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("rival", ["loop, torch", "dense mask", "aadkern sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contenders_on_the_cpu_agree_with_the_reference_forward_and_backward(name, rival, dtype):
    problem = problem_of(name, dtype)
    q, k, v, dout = problem.q, problem.k, problem.v, problem.dout
    got = checks.run(CONTENDERS[rival].make(problem.case, CPU), problem, trained=True)
    truly = exact(q, k, v, problem.case.plan, problem.case.scale, dout)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    for result, name_ in zip(got, ("out", "dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(result.double(), getattr(truly, name_), rtol=limit, atol=limit, msg=name_)


@pytest.mark.parametrize("name", PLANS)
def test_flex_with_our_block_mask_agrees_with_the_reference(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # eager: the adapter, not the compiler
    problem = problem_of(name, tokens=9)
    with torch.no_grad():
        got = CONTENDERS["flex"].make(problem.case, CPU)(problem.q, problem.k, problem.v)
    truly, _ = reference.forward(problem.q.double(), problem.k.double(), problem.v.double(), problem.case.plan, problem.case.scale)
    torch.testing.assert_close(got.double(), truly, rtol=1e-5, atol=1e-5)


def test_a_loop_gives_nothing_to_queries_that_see_nothing():
    plan = aadkern.AttentionPlan.from_ranges(9, 8, [((0, 3), [(1, 4), (6, 8)]), ((5, 9), [(0, 8)])])
    q, k, v = make_inputs(plan, 2, 8, torch.float64, seed=drawn())
    got = dense_loop(plan, heads_first(scaled_dot_product_attention))(q, k, v)
    torch.testing.assert_close(got, aadkern.attention(q, k, v, plan, backend="reference"))


@pytest.mark.parametrize("name", ["loop, FA2", "loop, FA3", "loop, FA4", "loop, xformers"])
@pytest.mark.parametrize("and_more", [False, True])
def test_a_librarys_loop_takes_its_output_alone_or_first_of_several(name, and_more, monkeypatch):
    """The adapters of libraries that need a GPU, over stand-ins with their signature: [B, L, H, D] in, output (and lse) out."""

    def stand_in(q, k, v):
        out = heads_first(scaled_dot_product_attention)(q, k, v)
        return (out, None) if and_more else out

    module = types.SimpleNamespace(flash_attn_func=stand_in, memory_efficient_attention=stand_in)
    monkeypatch.setattr(contenders, "imported", lambda _: module)
    problem, known = judged("7x3_window9_sink3")
    assert set(check(CONTENDERS[name].make(problem.case, torch.device("cuda")), problem, known, trained=True)) == {
        "out",
        "dq",
        "dk",
        "dv",
    }


@pytest.mark.parametrize("name", sorted(set(contenders.ON_CUDA) - {"aadkern sdpa", "flex"}))
def test_who_cannot_run_here_says_why(name):
    problem = problem_of("7x3")
    with pytest.raises(Missing, match=r"CUDA|GPU|sm_90a|capability|built|kernels"):
        CONTENDERS[name].make(problem.case, CPU)


def test_a_library_that_breaks_on_import_is_missing_with_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN3c10\\nand a page more')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Missing, match=r"^flash_attn: OSError: undefined symbol: _ZN3c10$"):
        CONTENDERS["loop, FA2"].make(problem_of("7x3").case, torch.device("cuda"))


def test_a_contender_that_is_none_is_a_value_error():
    assert contenders.chosen(None, CPU) == contenders.ON_CPU and contenders.chosen(["flex"], CPU) == ["flex"]
    with pytest.raises(ValueError, match=r"contender must be one of .*got 'fast'"):
        contenders.chosen(["fast"], CPU)


def test_truth_by_pieces_is_truth_at_once(monkeypatch):
    problem = problem_of("teacher_forcing", torch.float32, tokens=6)
    whole = exact(problem.q, problem.k, problem.v, problem.case.plan, problem.case.scale, problem.dout)
    cut = list(pieces(problem.case.plan, most=300))
    assert len(cut) > 3 * len(problem.case.plan.runs)
    assert all((b - a) * sum(y - x for x, y in ranges) <= 300 for (a, b), ranges in cut if b - a > 1)
    monkeypatch.setattr(checks, "pieces", lambda plan: iter(cut))
    known = truth(problem, seconds=1e9)
    assert sorted(known.heads) == [0, 1, 2]
    for name in Results._fields:
        at = torch.tensor(known.heads)
        expected = getattr(whole, name).index_select(1 if name == "lse" else 2, at)
        torch.testing.assert_close(getattr(known.exact, name), expected, rtol=1e-12, atol=1e-12)


def test_truth_draws_heads_and_stops_in_time():
    problem = problem_of("7x3", heads=5)
    drawn = [truth(problem, seconds=0.0, seed=seed).heads for seed in range(20)]
    assert all(len(heads) == 2 for heads in drawn) and {head for heads in drawn for head in heads} == set(range(5))


def exact_attend(problem: Problem):
    """A contender that is right: the reference, differentiable."""
    return lambda q, k, v: aadkern.attention(q, k, v, problem.case.plan, backend="reference")


FAULTS = {
    "everything 1 % too large": lambda results: [x * 1.01 for x in results],
    "one element of the output": lambda results: [results[0].index_put(_last(results[0]), results[0].abs().max()), *results[1:]],
    "one row of dq": lambda results: [results[0], _without_row(results[1]), *results[2:]],
    "one row of dk": lambda results: [*results[:2], _without_row(results[2]), results[3]],
    "one row of dv": lambda results: [*results[:3], _without_row(results[3])],
    "heads exchanged": lambda results: [x.flip(2) for x in results],
    "an element not written": lambda results: [results[0].index_put(_last(results[0]), torch.tensor(float("nan"))), *results[1:]],
    "another dtype": lambda results: [x.double() for x in results],
    "one row too few": lambda results: [x[:, 1:] for x in results],
}


def _last(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(n - 1) for n in x.shape)


def _without_row(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_what_is_right(dtype):
    problem, known = judged("7x3_window9_sink3", dtype)
    errors = check(exact_attend(problem), problem, known, trained=True)
    assert set(errors) == {"out", "dq", "dk", "dv"} and all(error >= 0 for error in errors.values())
    assert set(check(exact_attend(problem), problem, known, trained=False)) == {"out"}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_refuses_what_is_wrong(fault, monkeypatch):
    problem, known = judged("7x3_window9_sink3")
    right = checks.run(exact_attend(problem), problem, True)
    monkeypatch.setattr(checks, "run", lambda *_: FAULTS[fault]([x.clone() for x in right]))
    with pytest.raises(WrongResult):
        check(exact_attend(problem), problem, known, trained=True)


def test_the_check_refuses_nan_in_a_head_that_it_does_not_compare():
    problem = problem_of("7x3")
    known = truth(problem, seconds=0.0)
    (left_out,) = {0, 1, 2} - set(known.heads)
    spoiled = torch.zeros(3, 1).index_put((torch.tensor(left_out),), torch.tensor(float("nan")))
    with pytest.raises(WrongResult, match="not finite"):
        check(lambda q, k, v: exact_attend(problem)(q, k, v) + spoiled, problem, known, trained=False)


@pytest.mark.parametrize(
    "other",
    [
        lambda layout: plans.block_causal(layout, Window(9, sink=2)),
        lambda layout: plans.block_causal(layout),
        lambda layout: plans.bidirectional(layout),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_the_check_refuses_another_mask(other, trained):
    problem, known = judged("7x3_window9_sink3")
    plan = other(VideoLayout.regular(21, 3, problem.case.tokens_per_frame))
    with pytest.raises(WrongResult, match="out"):
        check(lambda q, k, v: aadkern.attention(q, k, v, plan), problem, known, trained)


def test_the_check_refuses_one_tile_without_the_tail_of_its_keys():
    """128 of 1512 queries see 12 of 1512 keys less, in bfloat16, where outputs are as small as among a thousand times as many."""
    problem = problem_of("bidirectional", torch.bfloat16, tokens=72, heads=1, head_dim=64)
    problem = dataclasses.replace(problem, v=problem.v / 32)
    known, n = truth(problem, seconds=1e9), problem.case.plan.q_len
    runs = [((0, n - 128), [(0, n)]), ((n - 128, n), [(0, n - 12)])]
    plan = aadkern.AttentionPlan.from_ranges(n, n, runs)
    check(lambda q, k, v: aadkern.attention(q, k, v, problem.case.plan), problem, known, trained=True)
    with pytest.raises(WrongResult, match="out: a row is off by"):
        check(lambda q, k, v: aadkern.attention(q, k, v, plan), problem, known, trained=False)


def test_the_check_refuses_a_wrong_scale_in_bfloat16():
    problem, known = judged("7x3_window9_sink3", torch.bfloat16)
    with pytest.raises(WrongResult, match=r"out|d[qkv]"):
        check(lambda q, k, v: aadkern.attention(q, k, v, problem.case.plan, scale=1.1 * problem.case.scale), problem, known, True)


def test_jobs_alternate_and_each_round_begins_with_another():
    order: list[str] = []
    jobs = {name: timing.Run(functools.partial(order.append, name)) for name in "abc"}
    taken = timing.alternate(jobs, CPU, seconds=0.0, least=4)
    assert [len(runs) for runs in taken.values()] == [4, 4, 4]
    assert "".join(order) == "abc" + "abc" + "abc" + "bca" + "cab" + "abc"  # warm-up, one to judge by, four that count


def test_a_run_is_timed_in_its_parts():
    made = timing.Run(lambda: time.sleep(0.02), lambda _: time.sleep(0.05))
    for seconds in timing.alternate({"sleep": made}, CPU, seconds=0.0, least=2)["sleep"]:
        assert seconds["forward"] >= 0.02 and seconds["backward"] >= 0.05
        assert seconds["both"] == pytest.approx(seconds["forward"] + seconds["backward"], abs=1e-9)
    assert set(timing.alternate({"none": timing.Run(lambda: None)}, CPU, seconds=0.0, least=2)["none"][0]) == {"forward"}


def test_on_cuda_the_cache_is_overwritten_before_the_first_mark_and_nothing_waits(monkeypatch):
    did: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            did.append("mark")

        def elapsed_time(self, other):
            return 2.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append("wait"))
    clock = timing.Clock(CPU)
    clock.cuda, clock._flush = True, types.SimpleNamespace(zero_=lambda: did.append("flush"))
    result = clock.start(timing.Run(lambda: did.append("forward") or 7, lambda made: did.append(f"backward of {made}")))
    clock.wait()
    assert did == ["flush", "mark", "forward", "mark", "backward of 7", "mark", "wait"]
    assert result() == {"forward": 0.002, "backward": 0.002, "both": 0.002}


def test_summary_is_median_quartiles_and_rate():
    got = timing.summary([0.4, 0.1, 0.2, 0.3, 10.0], flops=6 * 10**11, ceiling=4.0)
    assert got.pop("rounds_ms") == [400.0, 100.0, 200.0, 300.0, 10000.0]
    assert got == {"median_ms": 300.0, "p25_ms": 200.0, "p75_ms": 400.0, "tflops": 2.0, "ceiling_share": 0.5}


def test_the_sweep_of_hopper_variants_names_contenders_and_begins_with_what_is_in_use():
    """Where there is no Hopper GPU each of them is left out with the reason."""
    forwards, backwards = sweep.VARIANTS["sm90 forward"], sweep.VARIANTS["sm90 backward"]
    assert forwards[0] == f"sm90 {sm90.DEFAULT_FORWARD[128]}" and set(forwards) | {"sm90 simple"} == {
        f"sm90 {kernel}" for kernel in sm90.FORWARD_KERNELS
    }
    assert {*forwards, *backwards} <= set(CONTENDERS)
    problem = sweep.problem_of(attention_case("7x3", 4, 1, 128), torch.bfloat16, torch.device("cpu"))
    for kernel, names in sweep.VARIANTS.items():
        records = sweep.swept(kernel, problem, truth(problem, seconds=0.1), 1.0, float("inf"))
        assert [record["tile"] for record in records] == list(names)
        assert all(record["reason"].startswith("Missing: ") for record in records)
