"""A stream that starts anew from its last frame under another text."""

from __future__ import annotations

import pytest
import torch

from aadkern import StreamingGenerator, Window
from tests.streaming.streams import cache_for, merged_cache, noise_table, small_model

LEVELS = {"levels": (1.0, 0.6), "first_levels": (1.0, 0.8, 0.5)}


@pytest.fixture(params=["absolute", "relative"])
def model(request):
    return small_model(request.param)


def streamer(model, text, merged=True):
    make = merged_cache if merged else cache_for
    return StreamingGenerator(model, make(model, Window(9, sink=1), (4,)), text=text, **LEVELS)


def texts():
    return [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("made", [1, 4])
def test_a_restart_is_a_new_video_from_the_last_frame(model, merged, made):
    """What follows equals a fresh stream that was given the last frame, under the new text, with the same noise."""
    (first, second), noise = texts(), noise_table(4)
    stream = streamer(model, first, merged)
    chunks = list(stream.chunks(noise, made))
    stream.set_text(second, restart=True)
    ours = list(stream.chunks(noise, 3))
    fresh = streamer(model, second, merged)
    later = fresh.chunks(lambda chunk, step: noise(chunk + made, step), 3, first_frame=chunks[-1][:, :, -1:])
    for mine, theirs in zip(ours, later, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    plain = streamer(model, first, merged)
    list(plain.chunks(noise, made))
    plain.set_text(second)
    assert not torch.allclose(next(plain.chunks(noise, 1)), ours[0], atol=1e-4), "a restart forgets what lay before"


def test_a_restart_before_the_start_changes_the_text_alone(model):
    (first, second), noise = texts(), noise_table(4)
    stream = streamer(model, first)
    stream.set_text(second, restart=True)
    for mine, theirs in zip(stream.chunks(noise, 2), streamer(model, second).chunks(noise, 2), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with pytest.raises(ValueError, match="recache must be False with restart"):
        stream.set_text(first, recache=True, restart=True)
