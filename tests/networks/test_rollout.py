"""Self-rollout: the order of passes, the gradient by replay, streaming beyond the trained length."""

from __future__ import annotations

import itertools

import pytest
import torch

from aadkern import VideoLayout, Window
from aadkern.streaming.context import CausalContext
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.evaluation import evaluate
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.rollout import rollout, stream, uniform
from aadkern_train.run import Run
from tests.stages.tiny_runs import small_recipe

CHUNKS, WINDOW = (1, 2, 2, 2, 2), Window(5, sink=1)


@pytest.fixture(params=["relative", "absolute"])
def generator(request, tmp_path):
    run = Run.alone(small_recipe(f"network.rope={request.param}"), tmp_path)
    network = run.networks.plain(None).double()
    torch.nn.init.normal_(network.net.proj_out.weight, std=0.3)
    return network


def noise_table(seed=3, batch=2):
    made = {}

    def noise(chunk, step):
        draw = torch.Generator().manual_seed(seed * 1000 + chunk * 10 + step)
        return made.setdefault((chunk, step), torch.randn(batch, 2, 1, 12, 12, generator=draw, dtype=torch.float64))

    return noise


def roll(generator, steps=StepPlan(), **options):  # noqa: B008
    layout = VideoLayout(CHUNKS, 9)
    first = torch.randn(2, 1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return rollout(generator, Condition(first), layout, WINDOW, noise_table(), steps, **options), first, layout


def test_each_chunk_is_one_pass_over_its_clean_past(generator):
    """Chunk c of the rollout equals the last chunk of one full-clip forward over [clean earlier chunks, noise]."""
    made, first, layout = roll(generator)
    noise = noise_table()
    for chunk in range(1, len(CHUNKS)):
        start, end = layout.chunk_frames(chunk)
        x = torch.cat([made.x[:, :start], noise(chunk, 0)], dim=1)
        sigma = torch.cat([torch.zeros(2, start), torch.ones(2, end - start)], dim=1).double()
        with torch.no_grad():
            whole = generator(x, sigma, attention=CausalContext(VideoLayout(CHUNKS[: chunk + 1], 9), WINDOW))
        torch.testing.assert_close(whole[:, start:], made.x[:, start:end], rtol=1e-8, atol=1e-9)
    assert torch.equal(made.x[:, 0], first)


@pytest.mark.parametrize("steps", [StepPlan(), StepPlan((1.0, 0.9, 0.8), (1.0, 0.8333)), StepPlan((1.0, 0.8), (1.0, 0.8), exit=0)])
def test_replay_gives_the_recorded_graphs_gradient(generator, steps):
    recorded, _, _ = roll(generator, steps, with_grad=True)
    gradient = torch.randn_like(recorded.x)
    recorded.x.backward(gradient)
    expected = {name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None}
    assert len(expected) > 20
    generator.zero_grad()
    unrecorded, _, _ = roll(generator, steps)
    assert not unrecorded.x.requires_grad and torch.equal(unrecorded.x, recorded.x.detach())
    unrecorded.replay(gradient, generator)
    for name, p in generator.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_the_gradient_stays_in_its_own_chunk(generator):
    """Cached keys and values are constants: a loss on chunk 3 alone has the gradient of chunk 3's own pass alone."""
    made, _, layout = roll(generator, with_grad=True)
    start, end = layout.chunk_frames(3)
    made.x[:, start:end].sum().backward()
    whole = generator.net.proj_out.weight.grad.clone()
    generator.zero_grad()
    made.cache.rewind(start)
    generator(made.made[2].exit_input, uniform(made.made[2].x, 1.0), attention=made.cache).sum().backward()
    torch.testing.assert_close(whole, generator.net.proj_out.weight.grad)


def test_streaming_equals_the_rollout_and_goes_on(generator):
    made, first, _ = roll(generator)
    chunks = stream(generator, Condition(first), (1, 12, 12), WINDOW, itertools.repeat(2), noise_table(), StepPlan())
    with torch.no_grad():
        streamed = torch.cat([first[:, None], *itertools.islice(chunks, 12)], dim=1)
    torch.testing.assert_close(streamed[:, : made.x.shape[1]], made.x, rtol=1e-9, atol=1e-10)
    assert streamed.shape[1] == 25 and streamed.isfinite().all()


def test_the_beginning_of_a_long_clip_is_measured_as_the_shorter_one(tmp_path):
    found = {}
    for name, words in (("longer", ["evaluate.long=3", "evaluate.lengths=[2]"]), ("shorter", ["evaluate.long=2"])):
        run = Run.alone(small_recipe(*words), tmp_path / name)
        torch.manual_seed(0)
        network = run.networks.plain(None)
        torch.nn.init.normal_(network.net.proj_out.weight, std=0.3)
        found[name], _ = evaluate(run, network, 8, long=True)
    assert found["longer"]["2 times"] == found["shorter"]["long"] != found["longer"]["long"]


def test_step_plans():
    plan = StepPlan(first=(1.0, 0.9), rest=(1.0,))
    assert plan.levels(True) == (1.0, 0.9) and plan.levels(False) == (1.0,)
    two = StepPlan((1.0, 0.8333), (1.0, 0.8333))
    assert two.interval(0) == (0.8333, 1.0) and two.interval(1) == (0.0, 0.8333)
    assert StepPlan((1.0, 0.8), (1.0, 0.8), exit=0).levels(False) == (1.0,)
    for bad in ({"rest": ()}, {"rest": (0.5, 0.7)}, {"first": (1.2,)}, {"exit": -1}, {"exit": "random"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            StepPlan(**bad)


@pytest.fixture(params=["relative", "absolute"])
def reader(request, tmp_path):
    """A network that reads captions."""
    run = Run.alone(small_recipe(f"network.rope={request.param}"), tmp_path)
    network = run.networks.plain(None).double()
    torch.nn.init.normal_(network.net.proj_out.weight, std=0.3)
    return network


def told(first: bool, batch=2):
    draw = torch.Generator().manual_seed(5)
    image = torch.randn(batch, 1, 12, 12, dtype=torch.float64, generator=draw)
    return Condition(image if first else None, torch.randn(batch, 3, 16, dtype=torch.float64, generator=draw))


@pytest.mark.parametrize("first", [True, False])
def test_each_chunk_is_one_pass_under_its_caption(reader, first):
    """Also in text to video, whose first chunk sees nothing before it."""
    condition, noise = told(first), noise_table()
    chunks = CHUNKS if first else CHUNKS[1:]
    made = rollout(reader, condition, VideoLayout(chunks, 9), WINDOW, noise, StepPlan())
    assert len(made.made) == len(CHUNKS) - 1
    for number, chunk in enumerate(range(1 if first else 0, len(chunks)), start=1):
        layout = VideoLayout(chunks[: chunk + 1], 9)
        start, end = layout.chunk_frames(chunk)
        x = torch.cat([made.x[:, :start], noise(number, 0)], dim=1)
        sigma = torch.cat([torch.zeros(2, start), torch.ones(2, end - start)], dim=1).double()
        with torch.no_grad():
            whole = reader(x, sigma, condition.text, CausalContext(layout, WINDOW))
            other = reader(x, sigma, condition.text.flip(0), CausalContext(layout, WINDOW))
        torch.testing.assert_close(whole[:, start:], made.x[:, start:end], rtol=1e-8, atol=1e-9)
        assert not torch.allclose(other[:, start:], made.x[:, start:end], atol=1e-4), "each row has its own caption"


@pytest.mark.parametrize("first", [True, False])
def test_a_replay_makes_a_forgotten_cache_again_to_the_bit(reader, first):
    """What a batch in parts does while its discriminator learns: the caches of all parts would not fit."""
    layout, gradients = VideoLayout(CHUNKS if first else CHUNKS[1:], 9), []
    for forget in (False, True):
        made = rollout(reader, told(first), layout, WINDOW, noise_table(), StepPlan((1.0, 0.875), (1.0, 0.75)))
        if forget:
            made.forget_cache()
        made.replay(torch.randn(made.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)), reader)
        gradients.append({name: p.grad.clone() for name, p in reader.named_parameters() if p.grad is not None})
        reader.zero_grad()
    assert len(gradients[0]) > 20 and all(torch.equal(gradients[1][name], grad) for name, grad in gradients[0].items())


@pytest.mark.parametrize("first", [True, False])
def test_replay_and_streaming_agree_under_captions(reader, first):
    condition, steps = told(first), StepPlan((1.0, 0.875), (1.0, 0.75))  # exact in float32
    layout = VideoLayout(CHUNKS if first else CHUNKS[1:], 9)
    recorded = rollout(reader, condition, layout, WINDOW, noise_table(), steps, with_grad=True)
    gradient = torch.randn_like(recorded.x)
    recorded.x.backward(gradient)
    expected = {name: p.grad.clone() for name, p in reader.named_parameters() if p.grad is not None}
    assert expected["net.blocks.0.attn2.to_k.weight"].abs().max() > 0
    reader.zero_grad()
    rollout(reader, condition, layout, WINDOW, noise_table(), steps).replay(gradient, reader)
    for name, p in reader.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    chunks = stream(reader, condition, (1, 12, 12), WINDOW, itertools.repeat(2), noise_table(), steps)
    given = [condition.first[:, None]] if first else []
    with torch.no_grad():
        streamed = torch.cat([*given, *itertools.islice(chunks, 4)], dim=1)
    torch.testing.assert_close(streamed, recorded.x.detach(), rtol=1e-9, atol=1e-10)
