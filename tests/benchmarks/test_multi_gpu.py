"""benchmarks.multi_gpu: what a user with several GPUs sends, walked through on CPU processes."""

from __future__ import annotations

import json
import sys

import pytest
import torch.distributed as dist

from benchmarks import multi_gpu
from benchmarks.multi_gpu_items import Bench, leaving
from tests.engine.processes import run_processes

WORDS = ["--device", "cpu", "--rounds", "1", "--commit", "0123abc"]
ALONE = ["correct: tiny, bidirectional", "correct: tiny, block-causal", "correct: tiny, teacher forcing", "copies: tiny"]
ALONE += ["exchange: tiny", "layer: tiny, bidirectional", "layer: tiny, 7x3"]


def measured_by_two(out, *words):
    run_processes(__file__, "--out", str(out), *WORDS, *words, count=2)
    found = json.loads(out.read_text())
    assert {item["outcome"] for item in found["items"].values()} == {"passed"}
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return found


def test_two_processes_check_and_time_attention(tmp_path):
    found = measured_by_two(tmp_path / "new" / "found.json", "--kind", "correct", "copies", "exchange", "layer")
    assert found["environment"]["commit"] == "0123abc" and found["environment"]["torch"] and found["environment"]["date"]
    assert found["conditions"]["ranks"] == 2 == len(found["devices"]) and "meaningless" in found["conditions"]["times"]
    assert list(found["items"]) == ALONE
    assert 0 < max(found["items"][ALONE[0]]["largest_error"].values()) < 1e-4
    # 21 frames of 6 tokens, 2 heads of 16 numbers on 2 ranks: half the tokens in one head go to the other rank, q, k and v.
    assert found["items"]["exchange: tiny"]["bytes_out"]["q, k, v, alone"] == 3 * 21 * 3 * 16 * 4
    assert found["items"]["exchange: tiny"]["bytes_out"]["output, alone"] == 21 * 3 * 16 * 4


@pytest.mark.slow
def test_two_processes_check_and_time_a_model(tmp_path):
    items = measured_by_two(tmp_path / "new" / "found.json", "--kind", "blocks", "streaming", "graphs")["items"]
    assert list(items) == ["blocks: tiny", "streaming: tiny"]  # graphs are a GPU's
    assert 0 < items["blocks: tiny"]["difference"]["gradients"] < 1e-4
    assert 0 < items["streaming: tiny"]["difference"] < 1e-4 and items["streaming: tiny"]["fps"]["shared"] > 0


def test_what_is_not_right_is_named_and_nothing_is_timed(tmp_path, monkeypatch, capsys):
    def wrong(self, size, which):
        assert which != "block-causal", "largest error 1"
        return {"largest_error": {"out": 0.5}}

    monkeypatch.setattr(Bench, "correct", wrong)
    monkeypatch.setattr(Bench, "layer", lambda *_: pytest.fail("timed"))
    monkeypatch.delenv("RANK", raising=False)
    out = tmp_path / "found.json"
    assert multi_gpu.main(["--out", str(out), *WORDS, "--kind", "correct", "layer"]) == 1
    items = json.loads(out.read_text())["items"]
    assert items["correct: tiny, block-causal"]["outcome"].startswith("failed: AssertionError: largest error 1")
    assert items["correct: tiny, teacher forcing"]["largest_error"] == {"out": 0.5}
    assert items["layer: tiny, 7x3"]["outcome"].startswith("not run: what it would time is not right")
    assert "correct: tiny, block-causal: failed" in capsys.readouterr().out and not dist.is_initialized()


def test_a_package_that_is_missing_is_not_a_failure(tmp_path, monkeypatch):
    def missing(self, size):
        seen.append(json.loads(out.read_text())["items"]["blocks: tiny"]["outcome"])  # what a process that dies here leaves
        raise ModuleNotFoundError(name="diffusers")

    seen: list[str] = []
    out = tmp_path / "found.json"
    monkeypatch.setattr(Bench, "blocks", missing)
    monkeypatch.delenv("RANK", raising=False)
    assert multi_gpu.main(["--out", str(out), *WORDS, "--kind", "blocks"]) == 0
    assert json.loads(out.read_text())["items"]["blocks: tiny"]["outcome"] == "missing: diffusers is not installed (rank 0)"
    assert seen[0].startswith("not ended")


def test_one_rank_that_fails_is_named():
    assert multi_gpu.among(["passed", "failed: no memory", "passed"]) == "failed: no memory (rank 1)"
    assert multi_gpu.among(["passed"] * 3) == "passed"


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--limit", "0"], ["--kind", "speed"], ["--model", "5B"]])
def test_wrong_words_are_refused_before_any_work(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        multi_gpu.main(["--out", str(tmp_path / "found.json"), "--device", "cpu", *words])
    assert words[0] in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("heads", "megabytes"), [(40, (110.1, 36.7)), (12, (40.3, 11.2))])
def test_bytes_at_the_true_sizes_are_those_of_the_documentation(heads, megabytes):
    """docs/scale.md's table: what leaves the busiest of 8 ranks, bf16."""
    from aadkern.ulysses.exchange import route
    from benchmarks.cases import PLANS

    code = PLANS["bidirectional"](1560).code
    ways = [route(code, heads, rank, 8, 1560, 21, False) for rank in range(8)]
    for side, expected in zip(("to_heads", "to_tokens"), megabytes, strict=True):
        most = max(leaving(getattr(way, side), rank, 256) for rank, way in enumerate(ways))
        assert most / 1e6 == pytest.approx(expected, rel=0.01), side


if __name__ == "__main__":
    sys.exit(multi_gpu.main(sys.argv[1:]))
