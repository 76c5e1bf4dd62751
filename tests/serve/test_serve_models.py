"""What is served is what ``aad generate`` makes: a run's streams and Wan's, and the memory told of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from aadkern_train.cli import main
from aadkern_train.generate.from_run import condition_for, made
from aadkern_train.generate.from_wan import WanStreamer, fitting_parts
from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.folders import write_folder
from aadkern_train.run import Run
from aadkern_train.serve.memory import of_run, of_wan
from aadkern_train.serve.models import RunModel
from aadkern_train.serve.options import ServeSettings
from aadkern_train.serve.protocol import Header, RingPlace, chunk_bytes
from tests.serve.serve_models import Page, client_of
from tests.stages.tiny_runs import small_recipe
from tests.wan.tiny_decoder import random_state

CHUNKS = 7  # beyond the ring


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A generator with random weights, large enough that captions show."""
    path = tmp_path_factory.mktemp("runs") / "run"
    run = Run.alone(small_recipe("chunks=[1,4,4]", "window=9"), path)
    (path / "weights").mkdir(parents=True)
    denoiser = run.networks.plain(None)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    told = {"recipe": run.recipe.model_dump(mode="json"), "predicts": "x0", "streams": True}
    write_folder(path / "weights" / "dmd", denoiser.net, denoiser.net.state_dict().items(), told)
    return path / "weights" / "dmd"


def test_a_served_stream_is_the_one_that_is_generated(weights):
    """Through the server: the direction is obeyed in the very chunk that the answer names."""
    from aadkern_train.serve.app import Server

    model = RunModel(weights, fps=60.0)
    assert (model.about.chunk, model.about.height, model.about.directions) == (4, 12, True)
    server = Server(model, [model.player()], ServeSettings(seed=5, allow=("testserver",)))
    with client_of(server) as client, client.websocket_connect("/stream") as socket:
        page = Page(socket)
        page.chunk(3)
        turned = page.ask("direction", x=-1, y=0)["chunk"]
        page.chunk(turned + CHUNKS)
        prompt = page.chunks[turned][0]["prompt"]
    condition = condition_for(model.world, model.recipe, None, None, 5)
    (own,) = model.world.describe(condition)
    assert prompt.endswith("moving left") and prompt.split()[1] == own.split()[1]
    texts = {turned: model.world.embed([prompt])}
    wanted = made(model.recipe, model.world, model.network, condition, texts, "restarted", turned + CHUNKS, 5)
    first, *chunks = [np.asarray(model.world.to_rgb(x)[0]) for x in wanted]
    assert len(page.chunks) > CHUNKS
    for number, (head, frames) in page.chunks.items():
        if number == 1:
            assert np.array_equal(frames[:1], first)
            frames = frames[1:]
        if number <= len(chunks):
            assert np.array_equal(frames, chunks[number - 1]), number
        assert head["prompt"] == (prompt if number >= turned else own)
    other = made(model.recipe, model.world, model.network, condition, {}, "kept", turned, 5)
    *_, unturned = other
    assert not np.array_equal(np.asarray(model.world.to_rgb(unturned)[0]), chunks[turned - 1]), "the direction shows at once"


def test_a_run_says_what_it_cannot_show(weights):
    model = RunModel(weights)
    for prompt in ("nonsense", "a nine moving up down"):
        with pytest.raises(ValueError, match="caption"):
            model.check(prompt)
    with pytest.raises(ValueError, match="picture must be left out"):
        model.picture(b"")


def test_memory_is_told_before_and_is_what_it_will_be(weights, capsys):
    told = of_run(weights, 3)
    model = RunModel(weights)
    player = model.player()
    assert told.weights == {"generator": sum(p.nbytes for p in model.network.parameters())}
    assert told.cache == player._stream.cache.nbytes and told.total >= sum(told.weights.values()) + 3 * told.cache
    assert 0 < told.working < 10 * told.weights["generator"]
    player.begin(0, None, None)
    assert player.next().shape == (5, 12, 12, 3), "what counting remembered is forgotten"
    assert main(["serve", "--checkpoint", str(weights), "--show", "--sessions", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == told.lines()


def test_large_frames_are_sent_as_jpeg():
    y, x = np.mgrid[:480, :832]
    frames = np.stack([np.stack([x * 255 // 831, y * 255 // 479, (x + y + 40 * i) % 256], -1) for i in range(3)]).astype(np.uint8)
    message = chunk_bytes(Header(4, "a", 1, 16.0, 16.0, 0.1, RingPlace(1, 2, 3, 1)), frames)
    import json

    length = int.from_bytes(message[:4], "little")
    head = json.loads(message[4 : 4 + length])
    assert head["format"] == "jpeg" and (head["chunk"], head["frames"], head["place"]["slot"]) == (4, 3, 2)
    at = 4 + length
    for frame, size in zip(frames, head["sizes"], strict=True):
        seen = np.asarray(Image.open(io.BytesIO(message[at : at + size])))
        assert np.abs(seen.astype(int) - frame).mean() < 6
        at += size
    assert at == len(message)


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


class Frames:
    """Takes a video's frames as ``GrowingVideo`` does."""

    path, rate = "frames", 16

    def __init__(self):
        self.parts, self.count = [], 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, frames):
        self.parts.append(np.asarray(frames))

    def holds(self):
        return ""


@pytest.mark.parametrize("decoder", ["full", "tiny"])
def test_a_served_wan_is_the_one_that_is_generated(tmp_path, capsys, decoder):
    from aadkern_train.serve.wan import WanModel
    from tests.wan.tiny_wan import save_tiny_wan

    save_tiny_wan(tmp_path / "wan")
    torch.save(random_state(), tmp_path / "wan" / "taew2_1.pth")
    settings = WanSettings(size=(16, 32), device="cpu", window=7, chunks=4, decoder=decoder)
    parts = fitting_parts(tmp_path / "wan", None, settings)
    model = WanModel(parts, settings, "kept")
    player, picture = model.player(), model.picture(png(20, 40))
    player.begin(9, "a cat runs", picture)
    served = [player.next() for _ in range(2)]
    player.turn("the beach")
    served += [player.next() for _ in range(2)]
    video = Frames()
    streamer = WanStreamer(parts, settings)
    texts = [model.embedded(prompt) for prompt in ("a cat runs", "the beach")]
    streamer.write(video, texts[0], 9, pixels=picture, later={3: texts[1]})
    assert np.array_equal(np.concatenate(served), np.concatenate(video.parts))
    player.begin(9, "a cat runs", None)
    assert not np.array_equal(player.next(), served[0][: 4 * 3 - 3]), "the picture counts"
    words = ["serve", "--checkpoint", str(tmp_path / "wan"), "--size", "16x32", "--device", "cpu", "--window", "7", "--show"]
    words += ["--decoder", decoder]
    capsys.readouterr()
    assert main(words) == 0
    told = of_wan(parts, settings, 1)
    assert capsys.readouterr().out.splitlines() == told.lines()
    assert told.cache == player._stream.cache.nbytes and told.decoder == player._decoder.nbytes
    assert ("tiny decoder" in told.weights) is (decoder == "tiny")
    assert told.weights["text encoder"] == sum(p.nbytes for p in model.encoder.parameters())
    for file in (b"", b"\x00" * 1000, png(20, 40)[:200], b"%PDF-1.4"):
        with pytest.raises(ValueError, match=r"image must be an image file, what was sent is not$"):
            model.picture(file)
    bomb = io.BytesIO()
    Image.new("L", (10_000, 5_000)).save(bomb, "PNG")
    with pytest.raises(ValueError, match="picture must have at most 40000000 pixels, got 50000000"):
        model.picture(bomb.getvalue())
