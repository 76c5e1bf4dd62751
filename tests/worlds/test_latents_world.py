"""Prepared data as a world: which items a run takes, in which order, and what does not fit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from aadkern_train.engine.processes import start
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.prepared.format import padded
from aadkern_train.recipes import make_recipe
from aadkern_train.run import Run
from aadkern_train.worlds.latents import LatentsData, LatentsWorld
from tests.prepared.prepared_data import CHANNELS, COLUMNS, ROWS, TEXT_DIM, write_prepared

FRAME = (CHANNELS, ROWS, COLUMNS)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("clips"), count=7, frames=9)


def world_of(clips, curated=None, frames=3, held_out=2, **options):
    return LatentsWorld(clips, curated or clips, Path("nowhere"), frames, held_out=held_out, **options)


def test_clips_and_conditions_are_the_stored_ones(clips):
    world = world_of(clips)
    assert world.frame_shape == FRAME and world.count("train") == 5 and world.count("test") == 2 and world.longest("test") == 9
    x, condition = world.clips([0, 3, 4]), world.condition([0, 3, 4])
    assert x.shape == (3, 3, *FRAME) and x.dtype == torch.float32 and torch.equal(x[:, 0], condition.first)
    assert condition.text.shape == (3, 512, TEXT_DIM)
    stored = {item.caption: item for item in clips.items}
    for row, caption in enumerate(world.describe(condition)):
        assert torch.equal(x[row], clips.latents(stored[caption])[:3].float())
        assert torch.equal(condition.text[row], padded(clips.text(stored[caption])).float())
    assert torch.equal(world.null[0], padded(clips.null("negative")).float())
    assert torch.equal(world_of(clips, null="empty").null[0], padded(clips.null("empty")).float())


def test_each_pass_shows_every_item_once_in_an_order_of_its_own(clips):
    world = world_of(clips)
    epochs = [tuple(world.describe(world.condition(range(5 * e, 5 * e + 5)))) for e in range(6)]
    assert all(len(set(epoch)) == 5 for epoch in epochs) and len(set(epochs)) > 3
    again, other = world_of(clips), world_of(clips, seed=1)
    assert again.describe(again.condition([13, 2, 27])) == [epochs[2][3], epochs[0][2], epochs[5][2]], "any index by itself"
    assert [tuple(other.describe(other.condition(range(5 * e, 5 * e + 5)))) for e in range(6)] != epochs
    held = world.describe(world.condition([0, 1], "test"))
    assert not set(held) & set(epochs[0]) and Counter(world.describe(world.condition(range(4), "test"))) == Counter(held * 2)


def test_shorter_and_other_clips_are_left_out_and_counted(clips, tmp_path):
    mixed = write_prepared(tmp_path / "short", count=4, frames=2)
    with pytest.raises(ValueError, match=r"data.path must hold clips of 3 latent frames of 4x6, .*\(2, 4, 6\): 4"):
        world_of(mixed)
    with pytest.raises(ValueError, match=r"data.path must hold clips of 3 latent frames of 8x6"):
        world_of(clips, frame=(CHANNELS, 8, 6))
    records = clips.folder / "shard-00001.jsonl"
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in clips.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[0]["bucket"] = [9, 8, 8]
    (copy / records.name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.warns(UserWarning, match="data.path: 1 of 7 clips are left out"):
        assert world_of(type(clips)(copy)).count("train") == 4


def test_clips_longer_than_trained_come_from_those_that_have_them(clips):
    world = world_of(clips)
    assert world.clips([0, 1], 9, "test").shape == (2, 9, *FRAME)
    with pytest.raises(ValueError, match="must hold items for 'test' of 10 latent frames"):
        world.clips([0], 10, "test")


def test_prompts_alone_have_no_first_frame_and_no_clips(clips, tmp_path):
    prompts = write_prepared(tmp_path, "prompts", count=3, seed=3)
    world = world_of(prompts, curated=clips)
    assert world.condition([0]).first is None and world.frame_shape == FRAME and world.longest() == 0
    assert world.clips([0], split="curated").shape == (1, 3, *FRAME)
    assert world.condition([0], "test").first is not None, "measured beside real clips"
    with pytest.raises(ValueError, match="must hold clips for this, it holds prompts alone"):
        world.clips([0])
    with pytest.raises(ValueError, match=r"data.frame must be \(channels, rows, columns\)"):
        world_of(prompts)


def test_data_of_another_vae_are_refused(clips, tmp_path):
    other = write_prepared(tmp_path, count=3, frames=9, vae="b")
    with pytest.raises(ValueError, match=r"data.curated must be made with the vae of data.path, a, got b"):
        world_of(clips, curated=other)
    pairs = write_prepared(tmp_path / "pairs", "pairs", count=3, levels=[1.0, 0.0])
    with pytest.raises(ValueError, match=r"data.path must hold clips or prompts, .* holds pairs"):
        world_of(pairs)


def run_of(folder, processes, data, *words):
    recipe = make_recipe(
        "wan_smoke",
        [
            f"data.path={data}",
            "data.parts=nowhere",
            "data.held_out=2",
            "chunks=[1,1,1]",
            "window=3",
            "evaluate.final_clips=2",
            *words,
        ],
    )
    return Run(recipe, processes, RunFolder.create(folder, recipe))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ode.batch=6"], r"data.path must hold a batch of items to train on, 6, .* holds 5"),
        (["evaluate.final_clips=3"], r"evaluate must take no more clips than are held out, it takes 3, 2 are there"),
        (["data.held_out=7"], r"data.held_out must leave clips to train on, got 7 of 7"),
    ],
)
def test_what_the_recipe_asks_for_must_be_there(clips, tmp_path, words, said):
    with start("cpu") as processes, pytest.raises(ValueError, match=said):
        _ = run_of(tmp_path / "run", processes, clips.folder, *words).world


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"evaluate must be left out .*prompts alone"),
        (["evaluate={every: 0, final_clips: 0}"], r"task must be t2v where data.path holds prompts alone"),
        (["evaluate={every: 0, final_clips: 0}", "task=t2v"], r"adversarial must have real clips"),
    ],
)
def test_prompts_serve_no_stage_that_needs_clips(tmp_path, words, said):
    prompts = write_prepared(tmp_path / "prompts", "prompts", count=9)
    with start("cpu") as processes, pytest.raises(ValueError, match=said):
        run = run_of(tmp_path / "run", processes, prompts.folder, f"data.frame={list(FRAME)}", *words)
        _ = run.world


def test_a_run_keeps_to_the_data_that_it_began_with(clips, tmp_path):
    with start("cpu") as processes:
        run = run_of(tmp_path / "run", processes, clips.folder, "evaluate.final_clips=0")
        _ = run.world
        again = Run(run.recipe, processes, RunFolder.open(tmp_path / "run"))
        assert again.world.fingerprint == json.loads((tmp_path / "run" / "data.json").read_text())["data"]
        other = write_prepared(tmp_path / "other", count=7, frames=9, seed=5)
        changed = run.recipe.model_copy(update={"data": LatentsData(path=str(other.folder), parts="nowhere", held_out=2)})
        with pytest.raises(ValueError, match="data must be what the run began with, it has changed since"):
            _ = Run(changed, processes, RunFolder.open(tmp_path / "run")).world


def test_a_damaged_item_is_named(clips, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in clips.folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    file = copy / "shard-00000.latents.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    world = world_of(type(clips)(copy), frames=9)
    with pytest.raises(ValueError, match=r"item 'item-0\d' of shard 0 is damaged: the crc32 of its latents"):
        world.clips(range(5))
        world.clips(range(2), split="test")
