"""Results of benchmarks: what is measured, refused or lost is told as it was, in one form, and drawn and printed from it."""

from __future__ import annotations

import copy
import functools
import json
import statistics
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import blocks, chart, noise, pooling, results, run, table, timing
from benchmarks.cases import attention_case
from benchmarks.contenders import CONTENDERS, Contender, Missing
from benchmarks.journal import Journal
from benchmarks.measure import Options, measure, step

CPU = torch.device("cpu")


def wrong(q, k, v):
    return 0.5 * q + 0 * k.sum() + 0 * v.sum()


def broken(case, device):
    raise RuntimeError("no kernel image\nfor this device")


def absent(case, device):
    raise Missing("not installed")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """A true measurement of two small cases, with contenders that are right, wrong, broken and absent."""
    made = {
        "aadkern sdpa": CONTENDERS["aadkern sdpa"],
        "loop, torch": CONTENDERS["loop, torch"],
        "wrong": Contender("wrong", lambda case, device: wrong),
        "broken": Contender("broken", broken),
        "absent": Contender("absent", absent),
        "lost": Contender("lost", absent),
        "forward only": Contender("forward only", CONTENDERS["loop, torch"].make, trains=lambda device: False),
    }
    journal = Journal(tmp_path_factory.mktemp("journal") / "cases")
    options = Options(CPU, torch.float32, seconds=0.05, truth_seconds=1e9)
    filled = results.empty(results.environment("cpu"), {"data": "standard normal"})
    with pytest.MonkeyPatch.context() as patch:
        for name, contender in made.items():
            patch.setitem(CONTENDERS, name, contender)
        for name in ("7x3", "ring_chunk"):
            case = attention_case(name, 4, 2, 8)
            filled["cases"].append(measure(case, list(made), options, journal, {step(case, "lost"): "ended by SIGSEGV"}))
            assert journal.read().ended[case.id] == filled["cases"][-1]
    return filled


def test_only_who_is_right_is_timed(document):
    assert results.document_problems(document) == []
    for case in document["cases"]:
        found = {name: (who["status"], who["reason"]) for name, who in case["contenders"].items()}
        assert found["aadkern sdpa"] == found["loop, torch"] == found["forward only"] == ("timed", None)
        assert found["wrong"][0] == "refused" and "out: largest error" in found["wrong"][1]
        assert found["broken"] == ("failed", "RuntimeError: no kernel image")
        assert found["absent"] == ("missing", "not installed")
        assert found["lost"] == ("failed", "ended by SIGSEGV")
        timed = {name: set(who["timings"]) for name, who in case["contenders"].items()}
        trained = case["id"].startswith("7x3")
        assert timed["aadkern sdpa"] == ({"forward", "backward", "both"} if trained else {"forward"})
        assert timed["forward only"] == {"forward"} and timed["wrong"] == set()
        for who in case["contenders"].values():
            for direction, found_timing in who["timings"].items():
                rate = case["flops"][direction] / found_timing["median_ms"] / 1e9
                assert found_timing["tflops"] == pytest.approx(rate) and len(found_timing["rounds_ms"]) >= timing.LEAST_ROUNDS


def test_a_results_file_comes_back_as_it_was_written(document, tmp_path):
    results.write(document, tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == document
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def keys_of(value, at=()):
    """The path of every key of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(key, str):
            yield (*at, key)
        yield from keys_of(item, (*at, key))


def test_the_form_holds_every_key_and_type(document):
    free = ("contenders", "timings", "errors", "flops", "packages", "backends", "conditions", "rooms")
    paths = [path for path in keys_of(document) if not (len(path) > 1 and path[-2] in free)]
    assert len(paths) > 100
    assert results.problems({**document, "more": 1}) == ["results must not have 'more'"]
    for path in paths:
        spoiled, inner = copy.deepcopy(document), None
        inner = functools.reduce(lambda value, key: value[key], path[:-1], spoiled)
        value = inner.pop(path[-1])
        assert results.problems(spoiled), path
        inner[path[-1]] = {"not": "this"} if not isinstance(value, dict) else "nor this"
        assert results.problems(spoiled), path


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("schema",), "other/1", "schema"),
        (("cases", 0, "density"), float("nan"), "NaN"),
        (("cases", 0, "contenders", "wrong", "status"), "fine", "status must be one of"),
        (("cases", 0, "contenders", "aadkern sdpa", "status"), "refused", "has timings"),
        (("cases", 0, "contenders", "aadkern sdpa", "errors"), {}, "without the errors"),
        (("cases", 0, "contenders", "absent", "reason"), None, "without a reason"),
        (("cases", 0, "heads"), True, "heads must be int"),
    ],
)
def test_what_types_cannot_say_is_checked_too(document, tmp_path, where, value, said):
    spoiled = copy.deepcopy(document)
    functools.reduce(lambda inner, key: inner[key], where[:-1], spoiled)[where[-1]] = value
    with pytest.raises(ValueError, match=said):
        results.write(spoiled, tmp_path / "results.json")
    (tmp_path / "results.json").write_text(json.dumps(spoiled))
    with pytest.raises(ValueError, match=said):
        results.read(tmp_path / "results.json")


def test_the_table_tells_ratios_and_reasons(document):
    text = "\n".join(table.lines(document))
    case = document["cases"][0]
    ours, loop = (case["contenders"][name]["timings"]["both"]["rounds_ms"] for name in ("aadkern sdpa", "loop, torch"))
    ratios = sorted(theirs / own for theirs, own in zip(loop, ours, strict=True))
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("loop, torch"))
    assert row[-2] == f"{statistics.median(ratios):.2f}"
    assert "wrong: refused: out: largest error" in text and "absent: missing: not installed" in text


@pytest.mark.parametrize(("device", "rate"), [("NVIDIA H200", 480.0), ("NVIDIA H20", 133.5)])
def test_goals_are_judged_for_each_kernel_by_itself(document, device, rate):
    judged = copy.deepcopy(document)
    case = judged["cases"][0]
    assert case["id"].startswith("7x3/")
    ours, others = case["contenders"]["aadkern sdpa"], {"flex": 1.55, "loop, cuDNN": 0.9}
    case["contenders"] |= {"aadkern triton": copy.deepcopy(ours), "aadkern sm90": copy.deepcopy(ours)}
    for rival, factor in others.items():
        case["contenders"][rival] = copy.deepcopy(ours)
        case["contenders"][rival]["timings"]["both"]["rounds_ms"] = [factor * ms for ms in ours["timings"]["both"]["rounds_ms"]]
    for direction, tflops in (("forward", rate), ("backward", 120.0)):
        case["contenders"]["aadkern triton"]["timings"][direction]["tflops"] = tflops
    whole = copy.deepcopy(case) | {"id": "bidirectional/4x2x8"}
    whole["contenders"]["aadkern sm90"]["timings"]["forward"]["tflops"] = 601.0
    case["contenders"]["aadkern sm90"]["timings"]["forward"]["tflops"] = 0.94 * 601.0
    judged["cases"].append(whole)
    assert list(table.goals.judged(judged, table.times)) == []  # nothing is asked of a CPU
    judged["environment"]["device"] |= {"type": "cuda", "name": device, "capability": "9.0"}
    lines = [line.split(maxsplit=1) for line in table.goals.judged(judged, table.times) if case["id"] in line]
    verdict = {said.split(":")[0] + (said.split(" of ")[1] if " x " in said else ""): word for word, said in lines}
    at = case["id"]
    assert verdict[f"{at} forward, aadkern triton"] == "met" and verdict[f"{at} backward, aadkern triton"] == "missed"
    assert verdict[f"{at} both, aadkern triton1.5 x flex"] == "met" and verdict[f"{at} both, aadkern sm901.6 x flex"] == "missed"
    assert verdict[f"{at} both, aadkern sm901 x loop, cuDNN"] == "missed"
    assert verdict[f"{at} forward, aadkern sm90"] == "missed"  # 94 % of its own rate where everything is visible


def test_the_chart_has_a_bar_for_each_time_as_long_as_its_rate(document):
    root = ElementTree.fromstring(chart.draw([document]))
    widths = [float(bar.get("width")) for bar in root.iter("{http://www.w3.org/2000/svg}rect")]
    rates = [rate for case in document["cases"] for *_, rate in chart.bars(case)]
    assert len(widths) == len(rates) == 2 + 3  # those with a backward, then those of the streamed chunk
    first = document["cases"][0]
    # Widths are written to a tenth.
    assert widths[0] / widths[1] == pytest.approx(rates[0] / rates[1], rel=0.051 / widths[0] + 0.051 / widths[1])
    assert chart.shown(first) == "both" and chart.shown(document["cases"][1]) == "forward"


def test_aad_bench_reports_files(document, tmp_path, capfd):
    from aadkern_train.cli import main

    results.write(document, tmp_path / "results.json")
    assert main(["bench", "--report", str(tmp_path / "results.json"), "--chart", str(tmp_path / "chart.svg")]) == 0
    assert "7x3/4x2x8" in capfd.readouterr().out and "<rect" in (tmp_path / "chart.svg").read_text()
    assert main(["bench", "--report", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capfd.readouterr().err


def test_the_page_of_results_says_what_the_files_say():
    page = (results.ROOT / "docs" / "results.md").read_text()
    files = sorted((results.ROOT / "benchmarks" / "results").glob("attention-*.json"))
    assert files
    for path in files:
        document = results.read(path)
        assert "\n".join(table.markdown_lines(document)) in page, path
        assert path.name in page and document["environment"]["commit"][:7] in page


@pytest.mark.parametrize("path", sorted((results.ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_every_file_of_results_says_when_where_and_on_what_it_was_measured(path):
    environment = json.loads(path.read_text())["environment"]
    assert results.problems(environment, results.FORM["environment"]) == []
    assert len(environment["commit"]) >= 7 and environment["date"] > "2026-11"


@pytest.mark.parametrize("path", sorted((results.ROOT / "docs" / "data").glob("*.json")), ids=lambda path: path.name)
def test_every_file_of_grids_says_when_where_and_on_how_many_clips_it_was_measured(path):
    told = json.loads(path.read_text())
    assert len(told["commit"]) >= 7 and told["date"] > "2026-11" and told["clips"] > 0
    assert told["machines"] and all(machine["torch"] and machine["device"] for machine in told["machines"])


def test_run_measures_what_it_is_asked_for(tmp_path, capsys):
    sizes = ["--tokens-per-frame", "3", "--heads", "2", "--head-dim", "8", "--seconds", "0.02"]
    asked = ["--device", "cpu", "--case", "ring_chunk", "--contender", "aadkern sdpa", "loop, torch"]
    assert run.main([*sizes, *asked, "--out", str(tmp_path / "results.json")]) == 0
    (case,) = results.read(tmp_path / "results.json")["cases"]
    assert case["id"] == "ring_chunk/3x2x8" and case["area"] == 4 * 3 * 9 * 3
    assert "loop, torch" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--case", "7x4"])


def test_the_discriminators_passes_run(monkeypatch):
    """On a clip of 5 small frames; test_every_room_says_where_it_ran leaves them out, as they need diffusers."""
    network, _, _ = noise.discriminator(torch.device("cpu"))
    layout = network.backbone.layout((1, 4), torch.empty(1, 5, 1, 8, 8))
    monkeypatch.setattr(noise, "discriminator", lambda _: (network, (1, 5, 1, 8, 8), layout))
    measured = noise.measure_passes(torch.device("cpu"), seconds=0.01)
    assert set(measured["median_ms"]) == {"one batch of four views", "four passes"} and min(measured["median_ms"].values()) > 0


@pytest.mark.parametrize("room", [pooling, noise, blocks])
def test_every_room_says_where_it_ran(room, tmp_path, monkeypatch):
    small: dict[str, object] = {
        "pooling": {"CASES": {"cpu": {"small": pooling.Case(32, 16, 2, dtype=torch.float32)}}},
        "noise": {"SHAPES": {"cpu": {"small": (1, 2, 1, 4, 4)}}, "measure_passes": lambda *_: {"missing": "left out"}},
        "blocks": {"cases": lambda *_: [blocks.Case("none", (), {}, None, (1, 1))], "measure": lambda *_: {"times": []}},
    }[room.__name__.rpartition(".")[2]]
    for name, value in small.items():
        monkeypatch.setattr(room, name, value)
    out = tmp_path / "room.json"
    quick = ["--rounds", "1"] if room is blocks else ["--seconds", "0.01"]
    monkeypatch.setattr("sys.argv", [room.__name__, "--device", "cpu", "--commit", "0123abc", "--out", str(out), *quick])
    room.main()
    found = json.loads(out.read_text())
    assert results.problems(found["environment"], results.FORM["environment"]) == []
    assert found["environment"]["commit"] == "0123abc" and found["environment"]["device"]["type"] == "cpu"
