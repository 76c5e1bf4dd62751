"""The report's words and figures come from the run alone: any stages, any measures, and verdicts that the numbers hold."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from aadkern_train.report import read_run, summary, text_table, write_report
from aadkern_train.report.curves import lanes
from tests.report.runs import CAPTIONS, Page, make_run, moving_squares

METRICS = {  # of a world that the code has never seen
    "sparkle": {"name": "Sparkle", "better": "higher", "digits": 0, "meaning": "How much it sparkles."},
    "murk": {"name": "Murk", "better": "lower", "digits": 1, "meaning": "How murky it is."},
    "pace": {"name": "Pace", "better": "near real", "digits": 2, "meaning": "How fast it goes."},
}
REAL = {"sparkle": 50.0, "murk": 5.0, "pace": 0.5}
STAGES: dict[str, dict[str, Any]] = {
    "seedling": {"kind": "mine", "start": None, "title": None, "steps": 9},
    "left_out": {"kind": "mine", "start": "seedling", "steps": 0},
    "sapling": {"kind": "yours", "start": "left_out", "title": "Sapling of the config", "steps": 9},
    "watered": {"kind": "yours", "start": "sapling", "title": "B: watered", "steps": 9},
    "grafted": {"kind": "never heard of", "start": "sapling", "title": "C: grafted", "versus": "watered", "steps": 9},
}


def small_run(folder: Path, rows: dict[str, dict[str, Any]], stages: dict[str, Any] = STAGES, **more: Any) -> Path:
    """A run of other stages and measures, each stage's figures as given, at the long length as under "long"."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"recipe": "garden", "stages": stages, "levels": [1.0, 0.5]}, sort_keys=False)
    )
    reference = {"real": {**REAL, "long": REAL}}
    (folder / "metrics.json").write_text(json.dumps({"stages": rows, "reference": reference, "metrics": METRICS, **more}))
    lines = [
        {"stage": stage, "step": step, "kind": "eval", **{k: v for k, v in row.items() if k != "long"}}
        for stage, row in rows.items()
        for step in (4, 9)
    ]
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def tables(html: str) -> list[tuple[str, list[str], dict[str, list[str]]]]:
    """(the heading before it, its head, its rows) of each table; a marked cell has a star."""
    found, heading = [], ""
    for part in re.findall(r"<h[23]>.*?</h[23]>|<table.*?</table>", html.replace("\u00a0", " "), re.DOTALL):
        if part.startswith("<h"):
            heading = unescape(re.sub("<[^>]+>", "", part))
            continue
        lines = [re.split("</t[hd]>", row)[:-1] for row in part.replace("<b>", "*").split("</tr>")[:-1]]
        head, *body = [[unescape(re.sub("<[^>]+>", "", cell)) for cell in line] for line in lines]
        found.append((heading, head, {row[0]: row[1:] for row in body}))
    return found


def figures(sparkle: float, murk: float, pace: float) -> dict[str, float]:
    return {"sparkle": sparkle, "murk": murk, "pace": pace}


GROWN = {
    "sapling": {**figures(40, 9, 0.2), "long": figures(30, 12, 0.1)},
    "watered": {**figures(45, 8, 0.3), "long": figures(40, 10, 0.9)},
    "grafted": {**figures(44, 7, 0.8), "long": figures(60, 4, 0.2)},
}


def test_titles_order_and_measures_come_from_the_run(tmp_path: Path) -> None:
    html = write_report(small_run(tmp_path, dict(reversed(GROWN.items())), titles={"sapling": "A: sapling"})).read_text()
    text = Page(html).text
    (heading, head, rows), *_ = tables(html)
    assert heading == "At the trained length" and list(rows) == ["A: sapling", "B: watered", "C: grafted", "Real video"]
    assert head == ["Stage", "Sparkle \u2191", "Murk \u2193", "Pace \u2192 real"]
    assert rows["A: sapling"] == ["40", "9.0", "0.20"] and rows["C: grafted"] == ["44", "*7.0", "0.80"]
    assert rows["B: watered"] == ["*45", "8.0", "*0.30"] and rows["Real video"] == ["50", "5.0", "0.50"]
    assert "How murky it is. Better: lower." in text and "seedling" in text and "left out" not in text.replace("left_out", "")
    assert not re.search(
        "DMD|ODE|III|adversarial|pretrain|digit", re.sub(r"base64,[^\"]*|<style>.*</style>", "", html, flags=re.DOTALL)
    )
    assert "Two-step video: garden" in text


def test_two_stages_of_one_title_are_told_apart(tmp_path: Path) -> None:
    run = read_run(small_run(tmp_path, GROWN, titles={"watered": "Same", "grafted": "Same"}))
    assert [run.label(name) for name in ("watered", "grafted", "grafted_long")] == [
        "Same (watered)",
        "Same (grafted)",
        "Same (grafted), long",
    ]


def test_measures_that_a_run_does_not_describe_come_last_and_are_judged_by_real_video(tmp_path: Path) -> None:
    rows = {name: {**row, "zeal": value} for (name, row), value in zip(GROWN.items(), (1.0, 2.0, 3.0), strict=True)}
    path = small_run(tmp_path, rows)
    told = json.loads((path / "metrics.json").read_text())
    told["reference"]["real"]["zeal"] = 2.1
    (path / "metrics.json").write_text(json.dumps(told))
    _, head, table = tables(write_report(path).read_text())[0]
    assert head[-1] == "zeal \u2192 real" and [row[-1] for row in table.values()] == ["1.00", "*2.00", "3.00", "2.10"]


def test_a_stage_stands_beside_the_one_it_names_long_length_first(tmp_path: Path) -> None:
    html = write_report(small_run(tmp_path, GROWN, seconds_per_stage={"watered": 65, "grafted": 70})).read_text()
    long, trained = [table for table in tables(html) if table[0] == "C: grafted beside B: watered"]
    assert long[1] == trained[1] == ["Metric", "C: grafted", "B: watered", "Real video", "C is"]
    assert long[2] == {
        "Sparkle \u2191": ["60", "40", "50", "better"],  # further from real video, and yet better: higher is
        "Murk \u2193": ["4.0", "10.0", "5.0", "better"],
        "Pace \u2192 real": ["0.20", "0.90", "0.50", "better"],
    }
    assert [row[-1] for row in trained[2].values()] == ["worse", "better", "worse"]
    text = Page(html).text
    assert "Both went on from Sapling of the config, for 1 min 10 s and 1 min 05 s of training steps." in text
    assert "At three times the trained length, C: grafted is better in 3 of 3 measures: " in text
    sentence = text[text.index("At the trained length, C: grafted is") :]
    assert sentence.startswith(
        "At the trained length, C: grafted is better in 1 of 3 measures: Murk (7.0 beside 8.0); "
        "worse in 2: Pace (0.80 beside 0.30, real 0.50) and Sparkle (44 beside 45)."
    )


@pytest.mark.parametrize(
    ("better", "value", "other", "verdict"),
    [
        ("higher", 9.0, 8.0, "better"),
        ("higher", 8.0, 9.0, "worse"),
        ("higher", 120.0, 99.0, "better"),
        ("lower", 8.0, 9.0, "better"),
        ("lower", 9.0, 8.0, "worse"),
        ("lower", -3.0, 1.0, "better"),
        ("near real", 7.0, 4.0, "better"),
        ("near real", 16.0, 7.0, "worse"),
        ("near real", 13.0, 7.0, "equal"),
        ("higher", 8.04, 8.0, "equal"),
        ("lower", 8.0, 8.04, "equal"),
        ("higher", 8.06, 8.0, "better"),
    ],
)
def test_verdicts(tmp_path: Path, better: str, value: float, other: float, verdict: str) -> None:
    told = {"murk": {"name": "Murk", "better": better, "digits": 1, "meaning": ""}}
    rows = {"watered": {"murk": other, "long": {"murk": other}}, "grafted": {"murk": value, "long": {"murk": value}}}
    path = small_run(tmp_path, rows, metrics=told, reference={"real": {"murk": 10.0, "long": {"murk": 10.0}}})
    found = [table for heading, _, table in tables(write_report(path).read_text()) if "beside B" in heading]
    assert [[row[-1] for row in table.values()] for table in found] == [[verdict], [verdict]]
    line = summary(read_run(path))[-1]
    counted = f"is better in {'1' if verdict == 'better' else 'none'} of 1 measures"
    assert line.startswith("C: grafted beside B: watered") and counted in line
    assert ("worse in 1: " in line) == (verdict == "worse") and ("equal in 1" in line) == (verdict == "equal")


def test_no_verdict_where_nearness_to_real_cannot_be_known(tmp_path: Path) -> None:
    rows = {name: {"pace": value, "long": {"pace": value}} for name, value in (("watered", 1.0), ("grafted", 2.0))}
    path = small_run(tmp_path, rows, reference={})
    found = [table for heading, _, table in tables(write_report(path).read_text()) if "beside" in heading]
    assert [row[-1] for table in found for row in table.values()] == ["\u2013", "\u2013"]


def test_stages_with_one_start_share_a_lane_and_the_control_is_dashed(tmp_path: Path) -> None:
    path = small_run(tmp_path, GROWN)
    run = read_run(path)
    assert run.stages["sapling"].start == "seedling" and "left_out" not in run.stages
    measured = {name: [(step, short) for step, short, _ in rows] for name, rows in run.evaluations.items()}
    assert lanes(run, measured) == [["sapling"], ["watered", "grafted"]]
    html = write_report(path).read_text()
    chart = html[html.index('aria-label="Sparkle') :]
    chart = chart[: chart.index("</svg>")]
    assert re.findall('<text class="band"[^>]*>(.*?)</text>', chart) == ["Sapling of the config", "C"]
    dashed = {colour: "dashed" in style for colour, style in re.findall(r'<path class="line c-(\w+)([^"]*)"', chart)}
    assert dashed == {run.colour("sapling"): False, run.colour("watered"): True, run.colour("grafted"): False}
    assert "Dashed: references, and B: watered." in Page(html).text


def test_summary_and_text_table_say_what_the_figures_say(tmp_path: Path) -> None:
    run = read_run(small_run(tmp_path, GROWN))
    assert summary(run) == [
        "The stages, streaming at three times the trained length:",
        "Sapling of the config has Sparkle 30 (real 50), Murk 12.0 (real 5.0) and Pace 0.10 (real 0.50).",
        "B: watered, which went on from Sapling of the config, is better in 2 of 3 measures: Sparkle (40 from 30) and "
        "Murk (10.0 from 12.0); equal in 1.",
        "C: grafted, which went on from Sapling of the config, is better in 3 of 3 measures: Sparkle (60 from 30), "
        "Murk (4.0 from 12.0) and Pace (0.20 from 0.10, real 0.50).",
        "C: grafted beside B: watered is better in 3 of 3 measures: Murk (4.0 beside 10.0), Sparkle (60 beside 40) and "
        "Pace (0.20 beside 0.90, real 0.50).",
    ]
    head, *rows, words = text_table(run).splitlines()
    assert head.split() == ["Sparkle", "Murk", "Pace"] and rows[2].split() == ["C:", "grafted", "44/60", "7.0/4.0", "0.80/0.20"]
    assert rows[-1].startswith("Real video") and len({len(row) for row in rows}) == 1 == len({len(head), len(rows[0])})
    assert words == "Trained length/three times that. Better is higher: Sparkle; lower: Murk; near real: Pace."
    assert all(line in Page(write_report(tmp_path).read_text()).text for line in summary(run))


def test_an_empty_or_half_run_has_nothing_to_say(tmp_path: Path) -> None:
    assert summary(read_run(tmp_path)) == [] and text_table(read_run(tmp_path)) == ""
    rows = {"sapling": GROWN["sapling"], "grafted": figures(44, 7, 0.8)}
    lines = summary(read_run(small_run(tmp_path / "half", rows)))
    assert lines[-1].startswith("C: grafted, which went on from Sapling of the config, is at the trained length better in 2 of 3")


def test_every_clip_has_its_caption_in_the_same_place(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    np.save(path / "samples/web.npy", moving_squares(np.random.default_rng(5), 8, 13, 16))
    html = re.sub(r"data:image/\w+;base64,[^\"]*", "", write_report(path).read_text())
    panels = dict(re.findall(r'<figure class="clip"><figcaption>(.*?)</figcaption>(.*?)</figure>', html))
    assert "III: adversarial" in panels and "III: adversarial, long" in panels and len(panels) == 12
    for title, panel in panels.items():
        rows = re.findall(r'<canvas[^>]*aria-label="([^"]*)"[^>]*></canvas>((?:<span>.*?</span>)*)', panel)
        shown = [re.findall("<span>(.*?)</span>", captions) for _, captions in rows]
        if title.startswith("Pretraining clips"):
            assert shown == [[], []] and "a three" not in panel
            continue
        assert shown == [CAPTIONS[:4], CAPTIONS[4:]]
        assert all(label.endswith("; ".join(captions)) for (label, _), captions in zip(rows, shown, strict=True))
    sheets = re.findall(r'<h3>([^<]*)</h3><div class="strips">(.*?)</div>', html)
    assert [heading for heading, _ in sheets] == [
        *(f"Clip {i + 1}: {CAPTIONS[i]}" for i in range(3)),
        f"Clip 1, 37 frames: {CAPTIONS[0]}",
        "Other clips than the stages&#x27;",
    ]
    for (_, strips), caption in zip(sheets, [*CAPTIONS[:3], CAPTIONS[0]], strict=False):
        alts = re.findall('alt="([^"]*)"', strips)
        assert len(alts) >= 4 and all(alt.endswith(f"frames in order: {caption}") for alt in alts)
    assert "a three" not in sheets[-1][1]


def test_a_measure_by_parts_has_a_table(tmp_path: Path) -> None:
    rows = {
        name: {**row, "sparkle_by_corner": {"north east": 10.0 * i, "south": 90.0}} for i, (name, row) in enumerate(GROWN.items())
    }
    rows["grafted"]["sparkle_by_corner"]["west"] = 60.0
    html = write_report(small_run(tmp_path, rows)).read_text()
    _, head, table = next(found for found in tables(html) if found[0] == "Sparkle by corner, at the trained length")
    assert head == ["Stage", "north east", "south", "west"]
    assert table["B: watered"] == ["10", "90", "\u2013"] and table["C: grafted"] == ["20", "90", "60"]
    shades = [float(share) for share in re.findall(r"--share:([\d.]+)", html)]
    assert shades == pytest.approx([0, 1, 0.11, 1, 0.22, 1, 0.67], abs=0.01)


def test_steering_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    assert "after the change" not in write_report(small_run(tmp_path / "a", GROWN)).read_text()
    ways = {"kept": [32.0, 62.0, 80.0], "restarted": [95.0, 99.0, 100.0], "broken": "x", "empty": []}
    steering = {"stage": "grafted", "metric": "sparkle", "change": "sun becomes rain", "ways": ways}
    html = write_report(small_run(tmp_path / "b", GROWN, steering=steering)).read_text()
    assert any(
        (a["aria-label"] or "") == "Sparkle, after the change: kept, restarted over chunk after the change"
        for a in Page(html).all("svg")
    )
    text = Page(html).text
    assert "A stream of C: grafted whose caption changes on the way (sun becomes rain)." in text
    assert "kept: 32 in chunk 1, 80 in chunk 3; restarted: 95 in chunk 1, 100 in chunk 3." in text
    assert "Left out: A caption" not in text


def test_an_old_run_folder_still_gives_a_page(tmp_path: Path) -> None:
    path = make_run(tmp_path / "old")
    metrics = json.loads((path / "metrics.json").read_text())
    for key in ("titles", "metrics", "captions", "steps"):
        del metrics[key]
    metrics["seconds"] = {**metrics.pop("seconds_per_stage"), "total": 790.0}
    (path / "metrics.json").write_text(json.dumps(metrics))
    (path / "config.yaml").write_text("recipe: digits\nseed: 3\nteacher: neural\nchunks: [1, 4, 4, 4]\nwindow: 9\nsink: 1\n")
    run = read_run(path)
    assert list(run.stages) == ["pretrain", "ode", "dmd", "dmd_continued", "adversarial"] and run.stages["dmd"].title == "dmd"
    html = write_report(path).read_text()
    assert "13 min 10 s" in Page(html).text and "dmd continued" in tables(html)[0][2] and "Left out" not in html


def test_odd_settings_do_not_stop_the_page(tmp_path: Path) -> None:
    stages = {
        "a": None,
        3: {"start": ["b"]},
        "b": {"start": "c", "steps": 0},
        "c": {"start": "b", "steps": 0},
        "d": {"start": "b", "versus": 7},
    }
    odd = {
        "metrics": {"murk": 4, "pace": {"better": "sideways", "digits": "two", "name": None}},
        "titles": ["x"],
        "captions": {"a": 1},
    }
    run = read_run(small_run(tmp_path, {"d": figures(1, 2, 3)}, stages, **odd, steering={"ways": [1]}))
    assert list(run.stages) == ["a", "3", "d"] and run.stages["d"].start is None and run.stages["d"].versus is None
    assert run.measures["pace"].better == "near real" and run.measures["pace"].name == "pace"
    Page(write_report(tmp_path).read_text())


def test_equal_differences_are_told_in_the_order_of_the_run(tmp_path: Path) -> None:
    rows = {"watered": figures(49.7, 9.96, 0.2), "grafted": figures(51.2, 2.34, 0.4)}  # each the measure's whole range
    path = small_run(tmp_path, rows, reference={"real": {"pace": 0.4}})
    assert "in 3 of 3 measures: Sparkle (51 beside 50), Murk (2.3 beside 10.0) and Pace" in summary(read_run(path))[-1]
