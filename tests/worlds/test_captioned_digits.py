"""Captioned digits: the words and what they state, the sorts of clips and their law, and the world's protocol."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch

from aadkern_train.worlds.base import SPLITS
from aadkern_train.worlds.digits import DigitsWorld
from aadkern_train.worlds.digits_captions import DIGIT_WORDS, DIRECTIONS, VELOCITIES, VOCABULARY, vector

WORLD = DigitsWorld(captions=True)
PLAIN = DigitsWorld()


# Words


def test_directions_are_named_as_they_move():
    """Up is towards row 0, left towards column 0."""
    assert dict(zip(DIRECTIONS, VELOCITIES, strict=True)) == {
        "up left": (-1, -1),
        "up": (-1, 0),
        "up right": (-1, 1),
        "left": (0, -1),
        "right": (0, 1),
        "down left": (1, -1),
        "down": (1, 0),
        "down right": (1, 1),
    }
    world = DigitsWorld(captions=True, curated_keep=1.0, torus=24)
    sprite, direction, _ = world.stories(range(40), 3, "curated")
    x = world.clips(range(40), 3, "curated")
    for i in range(40):
        dy, dx = VELOCITIES[world.parse(world.say(sprite[i], direction[i]))[1]]
        assert torch.equal(x[i, 2], x[i, 0].roll((8 * dy, 8 * dx), (-2, -1)))


def test_word_vectors_are_fixed_orthogonal_and_of_unit_size():
    vectors = torch.stack([vector(word) for word in VOCABULARY])
    assert torch.equal(vectors @ vectors.T, 16 * torch.eye(14)) and (vectors.square().mean(1) == 1).all()
    assert vector("three").tolist() == [1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1]  # saved networks know it so
    assert not vector("").any()
    other = DigitsWorld(captions=True, sprites=10, torus=24, seed=9)
    assert torch.equal(other.embed(["a seven moving up"]), WORLD.embed(["a seven moving up"]))


@pytest.mark.parametrize("sprites", [1, 4, 10])
def test_what_is_said_is_parsed_embedded_and_read_as_it_was_meant(sprites):
    world = DigitsWorld(captions=True, sprites=sprites)
    pairs = list(itertools.product(range(-1, sprites), range(-1, 8)))
    english = [world.say(*pair) for pair in pairs]
    assert len(set(english)) == len(pairs) and [world.parse(caption) for caption in english] == pairs
    text = world.embed(english)
    assert text.shape == (len(pairs), 3, 16) and text.dtype == torch.float32
    assert len({tuple(row.flatten().tolist()) for row in text}) == len(pairs)
    for carried in (text, text.bfloat16(), text + 0.05 * torch.rand_like(text)):
        assert torch.stack(world.read(carried), 1).tolist() == [list(pair) for pair in pairs]


def test_digit_words_are_the_classes_of_the_sprites():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).flatten(1)
    images = images - images.mean(1, keepdim=True)
    world = DigitsWorld(captions=True, sprites=10)
    for word, render in zip(world.language.digits, world.renders[:, 0, 0, :8, :8].double(), strict=True):
        nearest = torch.cosine_similarity(images, (render - render.mean()).flatten()[None]).argmax()
        assert word == DIGIT_WORDS[data.target[nearest]]


def test_english():
    digits = WORLD.language.digits
    assert digits == ("one", "two", "seven", "zero")
    seven = digits.index("seven")
    assert WORLD.parse("a seven moving up left") == WORLD.parse("Seven, left and up!") == (seven, 0)
    assert WORLD.parse("a seven") == (seven, -1) and WORLD.parse("moving right") == (-1, 4) and WORLD.parse("") == (-1, -1)
    assert WORLD.say(seven, 7) == "a seven moving down right" and WORLD.say(-1, 1) == "moving up" and WORLD.say(-1, -1) == ""
    ten = DigitsWorld(captions=True, sprites=10)
    assert ten.say(ten.language.digits.index("eight"), -1) == "an eight"
    text = WORLD.embed(["a seven moving left"])[0]
    assert torch.equal(text[0], vector("seven")) and not text[1].any() and torch.equal(text[2], vector("left"))
    assert torch.equal(WORLD.null, torch.zeros(1, 3, 16)) and torch.equal(WORLD.embed([""]), WORLD.null)
    assert WORLD.embed([]).shape == (0, 3, 16)


def misplaced(word):
    """Two captions that say nothing, but for a vertical word in the horizontal one's place."""
    return torch.cat([torch.zeros(5, 16), vector(word)[None]]).view(2, 3, 16)


WORDS_THERE_ARE = "one, two, seven, zero, up, down, left, right"


@pytest.mark.parametrize(
    ("error", "match", "run"),
    [
        (ValueError, f"'a nine moving up' has the word 'nine'; this world's words are {WORDS_THERE_ARE}", "a nine moving up"),
        (ValueError, "'a seven sideways' has the word 'sideways'", "a seven sideways"),
        (ValueError, "'moving up down' says 'up' and 'down'; it can say one of up, down", "moving up down"),
        (ValueError, "'left right' says 'left' and 'right'; it can say one of left, right", "left right"),
        (ValueError, "'a one or two' has the word 'or'", "a one or two"),
        (ValueError, "'one two' says 'one' and 'two'; it can say one of one, two, seven, zero", "one two"),
        (TypeError, "caption must be a string, got 7", 7),
        (TypeError, "captions must be a list of strings, got the string", lambda: WORLD.embed("a seven")),
        (ValueError, "sprite must be -1 to 3, got 4", lambda: WORLD.say(4, 0)),
        (ValueError, "direction must be -1 to 7, got 8", lambda: WORLD.say(0, 8)),
        (ValueError, r"text must be \[B, 3, 16\], got \[3, 16\]", lambda: WORLD.read(torch.zeros(3, 16))),
        (TypeError, "text must be a tensor", lambda: WORLD.read("a seven")),
        (ValueError, "text row 0, word 0, is no word", lambda: WORLD.read(vector("nine").expand(1, 3, 16))),
        (ValueError, "text row 1, word 2, is no word", lambda: WORLD.read(misplaced("up"))),
        (ValueError, "captions is False", lambda: PLAIN.embed(["a seven"])),
        (ValueError, "captions is False", lambda: PLAIN.read(torch.zeros(1, 3, 16))),
        (TypeError, "captions must be True or False, got 1", lambda: DigitsWorld(captions=1)),
        (ValueError, r"blur must be in \[0, 1\], got 1.5", lambda: DigitsWorld(captions=True, blur=1.5)),
        (ValueError, "curated_keep must be in", lambda: DigitsWorld(captions=True, curated_keep=-0.1)),
        (TypeError, "keep must be a number", lambda: DigitsWorld(keep="often")),
        (ValueError, "split must be one of train, curated, test, got 'web'", lambda: WORLD.condition([0], "web")),
    ],
)
def test_bad_input(error, match, run):
    with pytest.raises(error, match=match):
        run() if callable(run) else WORLD.embed(["", run])
    if not callable(run):
        with pytest.raises(error, match=match):
            WORLD.parse(run)


# Clips


@pytest.mark.parametrize("world", [WORLD, PLAIN, DigitsWorld(captions=True, torus=24, sprites=7, real_clips=5)])
@pytest.mark.parametrize("split", SPLITS)
def test_a_condition_is_the_clips_own_and_a_clip_is_a_function_of_its_index(world, split):
    samples = [11, 3, 3, 40, 7]
    clips, condition = world.clips(samples, 13, split), world.condition(samples, split)
    assert torch.equal(condition.first, world.clips(samples, 1, split)[:, 0]) and torch.equal(condition.first, clips[:, 0])
    assert torch.equal(world.clips(samples, 37, split)[:, :13], clips)
    assert torch.equal(world.clips([40], 13, split)[0], clips[3])
    assert world.longest(split) is None
    if not world.captions:
        assert condition.text is None and world.null is None
        return
    assert torch.equal(world.condition([40], split).text[0], condition.text[3])
    sprite, direction = world.read(condition.text)
    for frames in (1, 13):
        story = world.stories(samples, frames, split)
        assert torch.equal(story[0], sprite) and torch.equal(story[1], direction)
    sharp = world.render(sprite[:, None], world.paths(samples, 13, split)[1])
    assert torch.equal(clips[:, 0], sharp[:, 0]), "the first frame is sharp in every split"
    assert torch.equal(clips, sharp) == (split != "train")


def test_web_frames_after_the_first_are_blurred():
    x = WORLD.clips(range(10), 5)
    sprite, position = WORLD.paths(range(10), 5)
    sharp = WORLD.render(sprite[:, None], position).double()
    around = sum(sharp.roll(shift, (3, 4)) for shift in itertools.product((-1, 0, 1), repeat=2) if shift != (0, 0)) / 8
    torch.testing.assert_close(x[:, 1:].double(), (0.3 * sharp + 0.7 * around)[:, 1:], atol=1e-6, rtol=0)
    assert torch.equal(x[:, 0].double(), sharp[:, 0])
    half = dataclasses.replace(WORLD, blur=0.35).clips(range(10), 5)
    torch.testing.assert_close(half[:, 1:].double(), (sharp[:, 1:] + x[:, 1:].double()) / 2, atol=1e-6, rtol=0)
    assert torch.equal(dataclasses.replace(WORLD, blur=0.0).clips(range(10), 5).double(), sharp)


@pytest.mark.parametrize(("split", "curated_keep", "obey"), [("train", 1.0, 0.9125), ("curated", 1.0, 1), ("test", 0.6, 0.65)])
def test_moves_follow_the_captioned_law(split, curated_keep, obey):
    world = dataclasses.replace(WORLD, torus=24, curated_keep=curated_keep)
    _, direction, position = world.stories(range(2000), 13, split)
    y, x = position // 6, position % 6
    step = torch.stack([(y.diff(dim=1) + 1) % 6 - 1, (x.diff(dim=1) + 1) % 6 - 1], -1)
    told = torch.tensor(VELOCITIES)[direction]
    obeyed = (step == told[:, None]).all(-1)
    assert abs(obeyed.double().mean() - obey) < 4 * math.sqrt(0.25 / obeyed.numel())
    if obey == 1:
        assert obeyed.all()
        return
    # Frames stray independently, to each of the 7 other directions alike.
    both = (obeyed[:, 1:] & obeyed[:, :-1]).double().mean()
    assert abs(both - obey**2) < 4 * math.sqrt(0.25 / obeyed[:, 1:].numel())
    strays = (~obeyed).sum()
    opposite = (step == -told[:, None]).all(-1).sum() / strays
    assert abs(opposite - 1 / 7) < 4 * math.sqrt(0.13 / strays)
    same = (step[:, 1:] == step[:, :-1]).all(-1).double()
    if split == "train":
        assert abs(same.mean() - world.keep_rate) < 4 * math.sqrt(0.25 / same.numel())


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_uniform_and_starts_are_the_splits_own(split):
    count = 6400
    sprite, direction, position = WORLD.stories(range(count), 1, split)
    cells = torch.bincount(sprite * 8 + direction, minlength=32).double() / count
    assert (cells - 1 / 32).abs().max() < 4.5 * math.sqrt(1 / 32 / count)
    pairs = {tuple(pair) for pair in WORLD.first_pairs(split).tolist()}
    assert set(zip(sprite.tolist(), position[:, 0].tolist(), strict=True)) == pairs
    held_out = {tuple(pair) for pair in WORLD.first_pairs("test").tolist()}
    assert (pairs == held_out) if split == "test" else not pairs & held_out


def test_sorts_of_clips_share_nothing_and_seeds_differ():
    train, curated = (WORLD.stories(range(3000), 2, split) for split in ("train", "curated"))
    for a, b, chance in zip(train[:2], curated[:2], (1 / 4, 1 / 8), strict=True):
        assert abs((a == b).double().mean() - chance) < 4 * math.sqrt(chance / 3000)
    other = dataclasses.replace(WORLD, seed=1)
    assert not torch.equal(other.stories(range(50), 2)[1], train[1][:50])
    assert not torch.equal(PLAIN.clips(range(20), 5), dataclasses.replace(WORLD, blur=0.0).clips(range(20), 5))


def test_real_clips_is_a_finite_set_of_web_and_of_curated_clips():
    few = dataclasses.replace(WORLD, real_clips=6)
    for split in ("train", "curated"):
        assert torch.equal(few.clips([1, 6, 13], 5, split), WORLD.clips([1, 0, 1], 5, split))
        assert torch.equal(few.condition([13], split).text, WORLD.condition([1], split).text)
    assert torch.equal(few.clips([13], 5, "test"), WORLD.clips([13], 5, "test"))


def test_without_captions_curated_clips_are_those_of_train():
    assert torch.equal(PLAIN.clips(range(9), 7, "curated"), PLAIN.clips(range(9), 7))
    assert torch.equal(PLAIN.condition(range(9), "curated").first, PLAIN.condition(range(9)).first)
    assert PLAIN.keep == 0.75 and WORLD.keep == 0.9 and DigitsWorld(captions=True, keep=0.75).keep == 0.75


def test_a_captioned_world_travels_to_another_process():
    assert WORLD.teacher is WORLD.teacher
    again = pickle.loads(pickle.dumps(WORLD))
    assert again == WORLD and torch.equal(again.clips([5], 4), WORLD.clips([5], 4))
    assert torch.equal(again.condition([5]).text, WORLD.condition([5]).text)


def test_the_digits_files_do_not_import_in_circles():
    folder = Path(__file__).parents[2] / "aadkern_train" / "worlds"
    needs = {}
    for path in folder.glob("digits*.py"):
        names = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        needs[path.stem] = {name.rpartition(".")[2] for name in names if name.startswith("aadkern_train.worlds.digits")}
    assert {"digits", "digits_law", "digits_teacher", "digits_metrics"} <= needs.keys()
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]
