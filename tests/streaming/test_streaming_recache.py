"""A change of prompt with the keys and values in view made anew, against one forward of the whole clip under such a plan."""

from __future__ import annotations

import pytest
import torch

from aadkern import AttentionPlan, StreamingGenerator, Window
from tests.streaming.op_recorder import OpRecorder
from tests.streaming.streams import ROPE, TOKENS, WINDOW, cache_for, merged_cache, noise_table, small_model
from tests.wan.models import assert_near

CASES = [
    (Window(9, sink=1), 4, True),
    (Window(9, sink=1), 4, False),
    (Window(8, sink=2), 3, True),  # a chunk in view is cut by the window, and the sink ends within a chunk
    (Window(8, sink=2), 3, False),
    (Window(8), 4, False),
    (Window(None), 4, True),
]


def stream(model, window, size, merged, image, texts, noise, chunks, **options):
    capacity = 1 + size * (len(chunks) + 1) if window.frames is None else None
    make = merged_cache if merged else cache_for
    cache = make(model, window, (size,), **({} if capacity is None else {"capacity_frames" if merged else "capacity": capacity}))
    generator = StreamingGenerator(model, cache, text=texts[0])
    made = []
    for number in chunks:
        if number == 6:
            generator.set_text(texts[1], **options)
        made += generator.chunks(noise, 1, first_frame=image if number == 1 else None)
    return made


def clean_and_noisy(window, size, image, made, noise):
    """The clip before chunk 7 is made: chunk 6, made by the recached cache, is the last clean one."""
    parts = ([image] if image is not None else []) + made[:6]
    return torch.cat([*parts, noise(7, 0)], dim=2), [part.shape[2] for part in parts]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(("window", "size", "with_image"), CASES)
def test_a_recached_stream_equals_a_clip_that_never_had_another_text(window, size, with_image, merged):
    model, noise = small_model("absolute"), noise_table(size)
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    image = torch.randn(2, 3, 1, 2, 4, dtype=torch.float64) if with_image else None
    made = stream(model, window, size, merged, image, texts, noise, range(1, 7), recache=True)
    # Chunk 6 is made from noise that sees chunks 1 to 5, of which those in view when the text changed, before chunk 5's clean
    # pass, see but the sink and each other.
    parts = ([image] if image is not None else []) + made[:5]
    sizes = [part.shape[2] for part in parts] + [size]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pending, last = len(sizes) - 2, len(sizes) - 1
    seen_by_pending = window.visible_frames(starts[pending], starts[pending] + size)[-1][0]
    again = [i for i in range(pending) if starts[i] >= window.sink and starts[i] + sizes[i] > seen_by_pending]
    oldest = starts[again[0]]
    runs = []
    for i, (start, length) in enumerate(zip(starts, sizes, strict=True)):
        first = window.visible_frames(start, start + length)[-1][0]
        if i < pending and start >= window.sink:
            first = max(first, min(oldest, start))
        frames = [(0, min(window.sink, start + length)), (first, start + length)]
        runs.append(((start * TOKENS, (start + length) * TOKENS), [(a * TOKENS, b * TOKENS) for a, b in frames if a < b]))
    clip = torch.cat([*parts, noise(6, 0)], dim=2)
    t = torch.zeros(2, clip.shape[2])
    t[:, starts[last] :] = 1000
    plan = AttentionPlan.from_ranges(clip.shape[2] * TOKENS, clip.shape[2] * TOKENS, runs)
    with torch.no_grad():
        flow = model(clip, t, texts[1], plan=plan)[:, :, starts[last] :]
    assert_near(made[5], noise(6, 0) - flow)
    kept = stream(model, window, size, merged, image, texts, noise, range(1, 7))
    assert (kept[5] - made[5]).abs().max() > 1e-4  # the old text's keys and values made another chunk


@pytest.mark.parametrize("rope", ROPE)
def test_recaching_is_the_same_merged_or_not_and_replayed(rope):
    model, noise = small_model(rope), noise_table()
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    image = torch.randn(2, 3, 1, 2, 4, dtype=torch.float64)
    arguments = (image, texts, noise, range(1, 15))
    expected = stream(model, Window(9, sink=1), 4, False, *arguments, recache=True)
    for made, wanted in zip(stream(model, Window(9, sink=1), 4, True, *arguments, recache=True), expected, strict=True):
        assert_near(made, wanted)


@pytest.mark.parametrize("rope", ROPE)
def test_recaching_the_same_text_while_all_is_in_view_changes_nothing(rope):
    model, noise = small_model(rope), noise_table()
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    for recache in (True, False):
        cache = merged_cache(model, Window(21, sink=1), (4,))
        generator = StreamingGenerator(model, cache, text=text)
        made = list(generator.chunks(noise, 4))
        generator.set_text(text, recache=recache)
        made += generator.chunks(noise, 4)
        if recache:
            expected = made
    for a, b in zip(made, expected, strict=True):
        assert_near(a, b)


def test_recaching_is_refused_where_the_ring_has_not_kept_what_is_in_view():
    model = small_model("absolute")
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    generator = StreamingGenerator(model, cache_for(model, Window(8, sink=1), (4,)), text=text)
    noise = lambda chunk, step: torch.randn(2, 3, 1 if chunk == 5 else 4, 2, 4, dtype=torch.float64)  # noqa: E731
    list(generator.chunks(noise, 6))
    frame = generator.cache.frame
    with pytest.raises(ValueError, match="recache must be False: frame"):
        generator.set_text(text, recache=True)
    assert generator.cache.frame == frame
    assert all(chunk.isfinite().all() for chunk in generator.chunks(noise, 2))
    with pytest.raises(ValueError, match="frame and oldest must be of the sink or held"):
        generator.cache.revisit(frame + 40, frame)


@pytest.mark.parametrize("rope", ROPE)
def test_recaching_keeps_the_place_in_the_stream(rope):
    """Also where nothing but the sink is in view, after an error, and after a reset."""
    model, noise = small_model(rope), noise_table()
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    for window in (Window(5, sink=1), WINDOW):
        generator, new = (StreamingGenerator(model, merged_cache(model, window, (4,)), text=texts[0]) for _ in range(2))
        list(generator.chunks(noise_table(), 4))
        generator.reset()
        videos = []
        for stream in (generator, new):
            made = list(stream.chunks(noise, 4))
            here = stream.cache.frame
            stream.set_text(texts[1], recache=True)
            assert stream.cache.frame == here
            videos.append([*made, *stream.chunks(noise, 3)])
        assert all(map(torch.equal, *videos))
        here, write = generator.cache.frame, generator._write
        generator._write = lambda *_: (_ for _ in ()).throw(MemoryError)
        with pytest.raises(MemoryError):
            generator.set_text(texts[0], recache=True)
        generator._write = write
        assert generator.cache.frame == here
        assert all(chunk.isfinite().all() for chunk in generator.chunks(noise, 3))


def test_recaching_before_anything_was_made_is_a_change_of_text():
    model, noise = small_model("absolute"), noise_table()
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    generator = StreamingGenerator(model, merged_cache(model, Window(9, sink=1), (4,)), text=texts[0])
    generator.set_text(texts[1], recache=True)
    expected = StreamingGenerator(model, merged_cache(model, Window(9, sink=1), (4,)), text=texts[1])
    assert all(map(torch.equal, generator.chunks(noise, 3), expected.chunks(noise, 3)))


def test_graphs_and_recaching():
    model, noise = small_model("relative"), noise_table()
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    streams = []
    for recorder in (None, OpRecorder()):
        generator = StreamingGenerator(model, merged_cache(model, Window(9, sink=1), (4,)), text=texts[0])
        if recorder is not None:
            from aadkern.streaming.graphs import PassGraphs

            generator._options["graphs"] = PassGraphs(recorder)
        made = []
        for number in range(24):
            if number and number % 3 == 0:
                generator.set_text(texts[number % 2], recache=True)
            made += generator.chunks(noise, 1)
        streams.append(made)
    assert all(map(torch.equal, *streams))
