"""The report: one self-contained page that shows what the run folder holds, names what it lacks, escapes all text."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest

from aadkern_train.report import write_report
from aadkern_train.report.charts import Series, line_chart
from aadkern_train.report.reading import read_run
from aadkern_train.report.stages import PALETTE, REFERENCE_COLOURS
from tests.report.runs import KEYS, STEPS, Page, make_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run") / "demo")


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    started = time.process_time()
    path = write_report(run_dir)
    assert time.process_time() - started < 5
    assert path == run_dir / "report.html" and not list(run_dir.glob("*.tmp"))
    return path.read_text(encoding="utf-8")


def rows(html: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table after a heading, best ones with a star."""
    table = html[html.index(f">{heading}<") :]
    table = table[table.index("<tbody>") : table.index("</tbody>")].replace("<b>", "*")
    found = {}
    for row in table.split("</tr>")[:-1]:
        cells_ = [re.sub("<[^>]+>", "", cell) for cell in re.split("</t[hd]>", row)[:-1]]
        found[cells_[0]] = cells_[1:]
    return found


def test_page_is_whole_and_stands_alone(html: str) -> None:
    page = Page(html)
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings == [
        "In short",
        "The run",
        "Stages beside real video",
        "Clips, playing",
        "Frame by frame",
        "Metrics while training",
        "Along the clip",
        "What each stage minimised",
        "The attention plan",
        "How the metrics are defined",
    ]
    assert len(html) < 3e6 and "Left out" not in html
    assert not re.findall(r"https?:|//[a-z]|url\(|@import|<link|<iframe|\bfetch\b|XMLHttp", re.sub(r"base64,[^\"]*", "", html))
    for tag in ("img", "canvas"):
        assert page.all(tag) and all((a.get("src") or a.get("data-sheet") or "").startswith("data:image/") for a in page.all(tag))
    assert all(a["alt"] for a in page.all("img"))
    assert all(a["aria-label"] for tag in ("svg", "canvas") for a in page.all(tag))
    assert "nan" not in page.text.lower().replace("finan", "") and "None" not in page.text


def test_every_colour_that_the_page_uses_has_a_value_in_light_and_dark(html: str) -> None:
    used = set(re.findall(r"\bc-(\w+)", html[html.index("</style>") :])) | set(PALETTE) | set(REFERENCE_COLOURS.values())
    for colour in used:
        assert f".c-{colour} {{ --c: var(--{colour}); }}" in html and len(re.findall(rf"--{colour}: #", html)) == 2, colour


def test_table_marks_the_best_stage(html: str) -> None:
    table = rows(html, "At the trained length")
    assert list(table) == [
        "I: ODE regression",
        "II: DMD",
        "II continued (control)",
        "III: adversarial",
        "Real video",
        "Teacher, many steps",
        "Frozen first frame",
    ]
    assert table["III: adversarial"] == ["93.9", "*90.6", "*0.51", "0.38", "*100.0", "1.9", "*1.40"]
    assert table["II continued (control)"] == ["*96.1", "88.8", "0.46", "0.34", "*100.0", "*1.8", "1.64"]
    assert table["I: ODE regression"][3] == "*0.30" and table["Frozen first frame"][2] == "\u2013"
    assert not any("*" in cell for name in ("Real video", "Teacher, many steps") for cell in table[name])


def test_facts_times_and_settings(html: str) -> None:
    text = Page(html).text
    for fact in (
        "71,325",
        "a CPU of 2 cores",
        "9 frames, 1 of them sink",
        "1, 4, 4, 4",
        "13 min 10 s",
        "III: adversarial: 4 min 17 s, 281 steps",
    ):
        assert fact in text, fact
    assert "head_dim: 16" in text and "II: DMD, step 120: stopped early: dynamic 70.0 of 99.0" in text


def test_curves_are_drawn_for_every_stage_and_metric(html: str) -> None:
    labels = [attrs["aria-label"] or "" for attrs in Page(html).all("svg")]
    assert sum("over step within the stage" in text for text in labels) == 14
    assert html.count('<text class="band"') == 14 * 3 and html.count(">III</text>") == 14
    quality = next(text for text in labels if text.startswith("Quality"))
    assert "II continued (control), III: adversarial" in quality
    assert sum("over part of the clip" in text for text in labels) == 2
    losses = [text for text in labels if ", losses:" in text]
    assert len(losses) == 5 and losses[-1] == "III: adversarial, losses: discriminator, generator, penalty over step"
    assert sum(", logits:" in text for text in labels) == 1
    assert sum(text.startswith(("Trained length: 13", "Streaming: 37")) for text in labels) == 2


def test_curve_points_stand_where_the_log_says(run_dir: Path, tmp_path: Path) -> None:
    run = read_run(run_dir)
    assert [len(run.train[stage]["generator_loss"]) for stage in ("dmd", "adversarial")] == [168, 281]
    assert [len(run.train[stage]["lr"]) for stage in STEPS] == list(STEPS.values())
    assert [step for step, *_ in run.evaluations["dmd"]] == [0, 40, 80, 120, 160, 168]
    step, short, long = run.evaluations["adversarial"][-1]
    assert step == 281 and set(short) == set(long) == set(KEYS) and long["legal"] == pytest.approx(0.97 * short["legal"])
    chart = line_chart("a", [Series("s", [(0, 0), (10, 5), (20, 10)], "blue")])
    path = re.search(r'class="line c-blue" d="M([^"]+)"', chart)
    assert path is not None
    xy = np.array(path.group(1).split(), float).reshape(3, 2)
    assert np.allclose(xy[:, 0], [46, 208, 370], atol=0.1) and np.allclose(xy[:, 1], [188, 104, 20], atol=0.1)


def test_resumed_steps_count_once_and_prefixed_metrics_are_long(tmp_path: Path) -> None:
    lines = [{"stage": "dmd", "step": s, "loss": v} for s, v in ((1, 5.0), (2, 6.0), (2, 7.0), (3, float("nan")))]
    lines.append({"stage": "dmd", "step": 2, "kind": "eval", "quality": 90, "long_quality": 80, "seconds": 3})
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n[1]\nnull\n")
    run = read_run(tmp_path)
    assert run.train["dmd"] == {"loss": [(1, 5.0), (2, 7.0)]}
    assert run.evaluations == {"dmd": [(2, {"quality": 90}, {"quality": 80})]}


@pytest.mark.parametrize("kept", ["config.yaml", "log.jsonl", "metrics.json", "samples", ""])
def test_a_part_alone_makes_a_page_without_empty_panels(run_dir: Path, tmp_path: Path, kept: str) -> None:
    run = tmp_path / "part"
    run.mkdir()
    if kept:
        (run / kept).symlink_to(run_dir / kept)
    html = write_report(run).read_text()
    Page(html)
    assert "Left out" in html and not re.search(r"</h2>(</section>|<h2)|</h3>(</section>|<h)", html)
    assert not re.search(r"<(p|ul|dl|div|figure|tbody|svg)[^>]*></\1>", html)


def test_broken_parts_are_named(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    np.save(tmp_path / "samples/ode.npy", np.zeros((2, 3, 4, 4)))
    (tmp_path / "samples/dmd.npy").write_bytes(b"half")
    (tmp_path / "metrics.json").write_text('{"stages": {"ode": ')
    (tmp_path / "config.yaml").write_text("chunks: [1, [")
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe{")
    text = Page(write_report(tmp_path).read_text()).text
    for name in ("samples/ode.npy", "samples/dmd.npy", "metrics.json", "config.yaml"):
        assert f"{name} " in text
    with pytest.raises(ValueError, match=r"run folder.*nowhere"):
        write_report(tmp_path / "nowhere")


def test_user_text_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('\"&')</script>"
    run = tmp_path / "a <b> & c"
    run.mkdir()
    (run / "config.yaml").write_text(f"recipe: {json.dumps(evil)}\nchunks: [1, 2]\n")
    row = {evil: 1.0, "quality": 3, "long": {evil: 2.0}}
    (run / "metrics.json").write_text(json.dumps({"stages": {evil: row}, "reference": {"real": row}, "machine": {evil: evil}}))
    lines = [{"stage": evil, "step": i, evil: 1.0} for i in range(3)] + [{"stage": "dmd", "step": 3, "kind": "eval", evil: 1.0}]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (run / "samples").mkdir()
    np.save(run / "samples/a<b>&.npy", np.zeros((1, 3, 8, 8, 3), np.uint8))
    html = write_report(run).read_text()
    page = Page(html)
    assert len(page.all("script")) == 1 and "<b>" not in html.replace('<td class="best"><b>', "") and page.text.count("alert(") >= 5


def test_an_old_run_that_describes_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("recipe: clips\nchunks: [1, 4]\nwindow: 5\n")
    real = {"motion": 100.0, "sharpness": 100.0, "drift": 3.0, "frechet": 0.0, "strange": 4.0}
    near, far = {k: v + 1 for k, v in real.items()}, {k: v - 7 for k, v in real.items()}
    (tmp_path / "metrics.json").write_text(json.dumps({"stages": {"ode": far, "dmd": near}, "reference": {"real": real}}))
    table = rows(write_report(tmp_path).read_text(), "At the trained length")
    assert table["dmd"] == ["*4.00", "*1.00", "*101.00", "*101.00", "*5.00"] and not any("*" in cell for cell in table["ode"])


def test_photographs_keep_the_page_small(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    rng = np.random.default_rng(0)
    base = rng.integers(0, 200, (8, 1, 16, 16, 3)).repeat(8, 2).repeat(8, 3)
    noise = rng.integers(0, 8, (8, 13, 128, 128, 3))
    for name in ("real", "ode", "dmd", "adversarial"):
        np.save(tmp_path / f"samples/{name}.npy", (base + noise).astype(np.uint8))
    started = time.process_time()
    html = write_report(tmp_path).read_text()
    assert len(html) < 3e6 and time.process_time() - started < 5 and "data:image/jpeg" in html
