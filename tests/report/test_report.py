"""The report: one self-contained page that shows what the run folder holds, names what it lacks, escapes all text."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from aadkern_train.report import write_report
from aadkern_train.report.charts import Series, line_chart
from aadkern_train.report.reading import read_run
from aadkern_train.report.stages import PALETTE, REFERENCE_COLOURS

CONFIG = """\
recipe: digits
seed: 3
data: {kind: digits, captions: true}
models: {teacher: pretrain}
chunks: [1, 4, 4, 4]
window: 9
sink: 1
levels: [1.0]
network: {heads: 4, head_dim: 16, layers: 4}
stages:
  pretrain: {kind: pretrain, start: null, title: null, versus: null, steps: 800}
  ode: {kind: ode, start: pretrain, steps: 600}
  dmd: {kind: dmd, start: ode, steps: 168}
  dmd_continued: {kind: dmd, start: dmd, title: a title of the config, steps: 276}
  adversarial: {kind: adversarial, start: dmd, versus: dmd_continued, steps: 281}
evaluate: {every: 40, long: 3}
"""
TITLES = {
    "pretrain": "Teacher pretraining",
    "ode": "I: ODE regression",
    "dmd": "II: DMD",
    "dmd_continued": "II continued (control)",
    "adversarial": "III: adversarial",
}
STEPS = {"pretrain": 800, "ode": 600, "dmd": 168, "dmd_continued": 276, "adversarial": 281}
FIELDS = {
    "pretrain": {"loss": 1.0},
    "ode": {"loss": 0.6},
    "dmd": {"generator_loss": 0.5, "fake_loss": 0.3},
    "dmd_continued": {"generator_loss": 0.4, "fake_loss": 0.25},
    "adversarial": {
        "generator_loss": 0.9,
        "discriminator_loss": 1.3,
        "penalty": 0.02,
        "real_logit": 0.6,
        "fake_logit": -0.5,
    },
}
FINAL = {  # the figures of a real prototype run
    "ode": (89.9, 69.8, 0.31, 0.30, 97.0, 2.7, 2.89),
    "dmd": (94.7, 88.2, 0.43, 0.33, 100.0, 2.0, 1.76),
    "dmd_continued": (96.1, 88.8, 0.46, 0.34, 100.0, 1.8, 1.64),
    "adversarial": (93.9, 90.6, 0.51, 0.38, 100.0, 1.9, 1.40),
    "real": (100.0, 100.0, 0.80, 0.06, 100.0, 0.0, 0.0),
    "teacher": (99.6, 75.1, 0.37, 0.25, 100.0, 0.4, 2.53),
    "static": (100.0, 0.0, float("nan"), 1.0, 0.0, 0.0, 9.1),
}
METRICS = {  # name, better, digits
    "quality": ("Quality", "higher", 1),
    "legal": ("Legal", "higher", 1),
    "keep": ("Keep", "near real", 2),
    "velocity_tv": ("Velocity TV", "lower", 2),
    "dynamic": ("Dynamic", "higher", 1),
    "drift": ("Drift", "lower", 1),
    "nll_excess": ("Excess NLL", "lower", 2),
}
KEYS = tuple(METRICS)
CAPTIONS = [f"a {digit} moving {way}" for digit in ("three", "seven") for way in ("up", "down", "left", "up right")]


def make_run(folder: Path, seed: int = 0, size: int = 16) -> Path:
    """A run folder as a whole demo leaves it, its curves and clips drawn at random."""
    rng = np.random.default_rng(seed)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "weights").mkdir()
    for stage in ("ode", "adversarial"):
        tensors = {"a": torch.zeros(3, 7), "b.c": torch.zeros(11 if stage == "ode" else 71_304)}
        (folder / f"weights/{stage}").mkdir()
        for shard, (name, tensor) in enumerate(tensors.items()):
            file = folder / f"weights/{stage}/diffusion_pytorch_model-0000{shard + 1}-of-00002.safetensors"
            save_file({name: tensor}, file, {"format": "pt"})
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in log_lines(rng)) + '\n{"stage": "adv')
    (folder / "metrics.json").write_text(json.dumps(final_metrics(rng)))
    streams = ("ode", "dmd", "dmd_continued", "adversarial")
    shown = {name: 13 for name in ("real", "teacher", "static", *streams)} | {f"{name}_long": 37 for name in streams}
    for name, frames in shown.items():
        np.save(
            folder / f"samples/{name}.npy",
            moving_squares(np.random.default_rng(seed + 1), 8, frames, size, name == "static"),
        )
    return folder


def log_lines(rng: np.random.Generator) -> list[dict[str, Any]]:
    lines = []
    for stage, steps in STEPS.items():
        for step in range(1, steps + 1):
            decay = np.exp(-3 * step / steps)
            values = {
                f: round(v * (0.3 + decay) * float(rng.lognormal(0, 0.15)), 5) for f, v in FIELDS[stage].items() if "logit" not in f
            }
            logits = {f: v + float(rng.normal(0, 0.3)) for f, v in FIELDS[stage].items() if "logit" in f}
            common = {"grad_norm": float(rng.lognormal(0, 0.5)), "lr": 1e-3 * (0.1 + 0.9 * decay)}
            lines.append({"stage": stage, "step": step, "seconds": step * 0.3, **values, **logits, **common})
        if stage == "pretrain":
            continue
        for step in [*range(0, steps, 40), steps]:
            share = step / steps
            values = {k: v * (1 + float(rng.normal(0, 0.01)) - 0.2 * (1 - share)) for k, v in zip(KEYS, FINAL[stage], strict=True)}
            lines.append(
                {
                    "stage": stage,
                    "step": step,
                    "kind": "eval",
                    **values,
                    "long": {k: v * 0.97 for k, v in values.items()},
                }
            )
    lines.append({"stage": "dmd", "step": 120, "kind": "note", "text": "stopped early: dynamic 70.0 of 99.0"})
    return lines


def final_metrics(rng: np.random.Generator) -> dict[str, Any]:
    def row(name: str) -> dict[str, Any]:
        values = dict(zip(KEYS, FINAL[name], strict=True))
        wobble = 0 if name in ("real", "static") else 1
        segments = {k: [values[k] - 2 * i for i in range(5)] for k in ("quality", "legal")}
        long = {k: v + wobble * float(rng.normal(0, 0.01)) for k, v in values.items()}
        return {**values, "segments": segments, "long": {**long, "segments": segments}}

    seconds = {"pretrain": 80.2, "ode": 92.0, "dmd": 135.4, "dmd_continued": 225.0, "adversarial": 257.4}
    stages = {name: row(name) for name in ("ode", "dmd", "dmd_continued", "adversarial")}
    return {
        "recipe": "digits",
        "seed": 3,
        "titles": TITLES,
        "metrics": {
            key: {"name": name, "better": better, "digits": digits, "meaning": f"What {key} means."}
            for key, (name, better, digits) in METRICS.items()
        },
        "captions": CAPTIONS,
        "stages": stages,
        "reference": {name: row(name) for name in ("real", "teacher", "static")},
        "steps": STEPS,
        "seconds": 790.0,
        "seconds_per_stage": seconds,
        "profile": "full",
        "machine": {"device": "cpu: a CPU of 2 cores", "torch": "2.13.0"},
    }


def moving_squares(rng: np.random.Generator, clips: int, frames: int, size: int, still: bool = False) -> np.ndarray:
    video = np.zeros((clips, frames, size, size, 3), np.uint8)
    for clip in range(clips):
        picture = np.zeros((size, size), np.uint8)
        picture[: size // 2, : size // 2] = rng.integers(0, 256, (size // 2, size // 2))
        at = rng.integers(0, size, 2)
        for t in range(frames):
            video[clip, t] = np.roll(picture, tuple(at), (0, 1))[..., None]
            at = at if still else at + rng.integers(-4, 5, 2)
    return video


class Page(HTMLParser):
    """Collects tags and text, and fails on a tag that is closed out of order."""

    VOID = ("meta", "img", "input", "br", "rect", "line", "circle", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] not in (["style"], ["script"]) else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.tags if found == tag]


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
