"""The page in a real browser, headless Chromium: what stands on the canvas, pixel by pixel."""

from __future__ import annotations

import base64
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from aadkern_train.engine.video import read_video
from tests.serve.serve_models import FRAMES, dot_at, dot_frame, dot_server, running

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed here")]

PATIENCE = 120.0  # seconds
SIDE = 16
# Keeps each frame's chunk, number, seed and pixels (base64 of RGBA) as it is drawn, and the answers.
WATCH = """() => {
  const screen = document.getElementById("screen");
  window.drawn = []; window.acks = [];
  screen.addEventListener("drawn", ({detail}) => {
    const {data} = screen.getContext("2d").getImageData(0, 0, screen.width, screen.height);
    window.drawn.push({...detail, pixels: btoa(String.fromCharCode(...data))});
  });
  screen.addEventListener("ack", ({detail}) => window.acks.push(detail));
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium) -> Iterator[Any]:
    page = chromium.new_page()
    yield page
    page.close()


def opened(page: Any, address: str) -> None:
    page.goto(f"http://{address}/")
    page.evaluate(WATCH)
    sync_api.expect(page.locator("#status")).to_have_text("yours to steer", timeout=1000 * PATIENCE)


def wait(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def drawn(page: Any) -> list[dict]:
    """The frames drawn since the page was opened; each ``picture`` is square, [H, H, 4]."""
    frames = page.evaluate("window.drawn")
    for frame in frames:
        pixels = np.frombuffer(base64.b64decode(frame["pixels"]), np.uint8)
        side = round((len(pixels) / 4) ** 0.5)
        frame["picture"] = pixels.reshape(side, side, 4)
    return frames


def answer(page: Any, before: int) -> int:
    """The chunk that the newest command's answer names."""
    return wait(lambda: (acks := page.evaluate("window.acks"))[before:] and acks[-1]["chunk"])


def until_chunk(page: Any, number: int) -> list[dict]:
    wait(lambda: page.evaluate(f"window.drawn.some(({{chunk}}) => chunk >= {number})"))
    return drawn(page)


def steps(frames: list[dict]) -> dict[int, set[tuple[int, int]]]:
    """By chunk, how the dot moves from frame to frame within it."""
    moves: dict[int, set[tuple[int, int]]] = {}
    for a, b in itertools.pairwise(frames):
        if a["chunk"] == b["chunk"] and b["frame"] == a["frame"] + 1:
            (ax, ay), (bx, by) = dot_at(a["picture"]), dot_at(b["picture"])
            moves.setdefault(a["chunk"], set()).add(((bx - ax + 8) % SIDE - 8, (by - ay + 8) % SIDE - 8))
    return moves


STEER = {
    "a key": (lambda page: page.keyboard.press("ArrowUp"), (0, -1)),
    "a button": (lambda page: page.get_by_role("button", name="down left").click(), (-1, 1)),
    "a swipe": (lambda page: swipe(page, -60, 0), (-1, 0)),
}


def swipe(page: Any, dx: int, dy: int) -> None:
    box = page.locator("#screen").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()


def test_the_picture_moves_and_is_steered_from_the_chunk_that_is_named(page):
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    with running(dot_server(fps=20.0)) as address:
        opened(page, address)
        until_chunk(page, 3)
        course = [(0, (1, 0))]
        for steer, step in STEER.values():
            before = len(page.evaluate("window.acks"))
            steer(page)
            course.append((answer(page, before), step))
            frames = until_chunk(page, course[-1][0] + 2)
        for chunk, moves in steps(frames).items():
            wanted = [step for first, step in course if first <= chunk][-1]
            assert moves == {wanted}, f"chunk {chunk} of {course}"
        assert len(steps(frames)) > 6 and problems == []
        assert "ms" in page.inner_text("#latency") and "in slot" in page.inner_text("#place")
        assert page.inner_text("#backend") == "numpy" and page.inner_text("#shown") == "-1 0"


def test_the_same_seed_is_the_same_on_the_canvas(page):
    with running(dot_server(fps=20.0)) as address:
        opened(page, address)
        seen = []
        for seed in (5, 5, 6):
            page.fill("#seed", str(seed))
            before = len(page.evaluate("window.acks"))
            page.click("#reset")
            first = answer(page, before)
            frames = [frame for frame in until_chunk(page, first + 2) if frame["chunk"] >= first]
            seen.append({FRAMES * (frame["chunk"] - first) + frame["frame"]: frame["picture"] for frame in frames})
            for number, picture in seen[-1].items():
                assert np.array_equal(picture[..., :3], dot_frame(seed, number, (number + 1) % SIDE, 0, SIDE)), (seed, number)
                assert (picture[..., 3] == 255).all()
        assert seen[0].keys() & seen[1].keys() and len(seen[2]) > FRAMES


def test_large_frames_come_as_jpeg_and_in_order(page):
    side = 132
    with running(dot_server(side=side, fps=20.0)) as address:
        opened(page, address)
        frames = until_chunk(page, 4)
    for frame in frames:
        number = FRAMES * (frame["chunk"] - 1) + frame["frame"]
        # Noise is what JPEG keeps least of: the right frame is off by 20 on average, another one by 66.
        right, wrong = (dot_frame(0, n, 0, 0, side)[..., 0].astype(int) for n in (number, number + 1))
        assert np.abs(frame["picture"][..., 0] - right).mean() < 35 < np.abs(frame["picture"][..., 0] - wrong).mean(), number


def test_a_broken_connection_is_made_again_and_the_stream_goes_on(page):
    with running(server := dot_server(fps=20.0)) as address:
        opened(page, address)
        before = len(page.evaluate("window.acks"))
        page.keyboard.press("ArrowDown")
        until_chunk(page, answer(page, before) + 1)
        last = drawn(page)[-1]["chunk"]
        for person in list(server.people.there):
            server._loop.call_soon_threadsafe(person.outbox.close, 1011, "a test breaks it")
        frames = until_chunk(page, last + 4)
        assert set.union(*(moves for chunk, moves in steps(frames).items() if chunk > last)) == {(0, 1)}
        page.reload()  # the same tab keeps its seat
        opened(page, address)
        later = until_chunk(page, frames[-1]["chunk"] + 1)
        assert set.union(*steps(later).values()) == {(0, 1)}


def test_pause_space_and_a_second_page_that_watches(page, chromium):
    with running(dot_server(fps=20.0)) as address:
        opened(page, address)
        other = chromium.new_page()
        other.goto(f"http://{address}/")
        sync_api.expect(other.locator("#status")).to_have_text("watching; 0 before you wait for a seat", timeout=1000 * PATIENCE)
        assert other.locator("#reset").is_disabled() and not page.locator("#reset").is_disabled()
        before = len(page.evaluate("window.acks"))
        page.keyboard.press("Space")
        last = answer(page, before) - 1
        until_chunk(page, last)
        time.sleep(0.5)
        assert drawn(page)[-1]["chunk"] == last and page.inner_text("#pause") == "Go on"
        page.keyboard.press("Space")
        until_chunk(page, last + 1)
        assert other.inner_text("#shown") == "1 0"
        other.close()


def test_a_recording_is_a_video_of_what_was_seen(page, tmp_path):
    with running(dot_server(fps=20.0)) as address:
        opened(page, address)
        until_chunk(page, 1)
        page.click("#record")
        until_chunk(page, drawn(page)[-1]["chunk"] + 6)
        with page.expect_download(timeout=1000 * PATIENCE) as saved:
            page.click("#record")
        path = tmp_path / saved.value.suggested_filename
        saved.value.save_as(path)
    assert path.name in ("stream-0.mp4", "stream-0.webm")
    frames, _ = read_video(path)
    assert len(frames) > 2 and frames.shape[1:] == (256, 256, 3) and (frames[0] != frames[-1]).any()


def test_a_foreign_page_cannot_steer(page):
    with running(dot_server()) as address:
        port = address.rpartition(":")[2]
        page.goto(f"http://{address}/")
        page.goto("about:blank")  # whose origin is "null"
        code = f"""() => new Promise(done => {{
          const socket = new WebSocket("ws://127.0.0.1:{port}/stream");
          socket.onopen = () => done("open"); socket.onerror = () => done("refused");
        }})"""
        assert page.evaluate(code) == "refused"


@pytest.mark.parametrize("minutes", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_memory_is_flat_for_minutes(page, minutes):
    process = psutil.Process()
    with running(dot_server(side=64, fps=60.0)) as address:
        opened(page, address)
        page.evaluate("window.drawn = {push() {}}")

        def used() -> tuple[int, int]:
            heap = page.evaluate("performance.memory.usedJSHeapSize")
            return process.memory_info().rss, heap

        end, samples = time.monotonic() + 60 * minutes, []
        while time.monotonic() < end:
            time.sleep(min(5.0, 6 * minutes))
            page.keyboard.press("ArrowUp" if len(samples) % 2 else "ArrowLeft")
            samples.append(used())
        half = len(samples) // 2
        for early, late in zip(*(map(min, zip(*part, strict=True)) for part in (samples[1:half], samples[half:])), strict=True):
            assert late < early + 20e6, samples
