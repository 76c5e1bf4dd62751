"""The discriminator: what each backbone can see, query-token pooling, and logits."""

from __future__ import annotations

import pytest
import torch

from aadkern_train.networks.discriminator import Discriminator, QueryTokenHead, QueryTokenHeads
from aadkern_train.run import Run
from tests.stages.tiny_runs import small_recipe


@pytest.fixture
def run(tmp_path):
    return Run.alone(small_recipe(), tmp_path)


def discriminator(run, **options):
    network = Discriminator(run.networks.plain(None), (0, 1), **options).double()
    torch.nn.init.normal_(network.heads.logit.weight)
    torch.nn.init.normal_(network.backbone.net.proj_out.weight)
    for block in network.backbone.net.blocks:
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    return network


def clip(run, batch=2):
    return torch.randn(batch, run.recipe.frames, 1, 12, 12, dtype=torch.float64)


def test_one_query_pools_as_the_formula_says():
    torch.manual_seed(1)
    head = QueryTokenHead(6, 2, queries=1).double()
    torch.nn.init.normal_(head.tokens)
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    normed = x[0] / (x[0].square().mean(-1, keepdim=True) + 1e-6).sqrt()
    pooled = []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        q, k = head.to_q(head.tokens)[0, part], head.to_k(normed)[:, part]
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        pooled.append(torch.softmax(k @ q / 3**0.5, 0) @ head.to_v(normed)[:, part])
    y = head.tokens[0] + head.to_out(torch.cat(pooled))
    y = head.project((y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt())
    torch.testing.assert_close(head(x)[0, 0, 0], y, rtol=1e-6, atol=1e-6)


def test_frame_logits_are_video_logits_of_each_frame():
    heads = QueryTokenHeads(6, 2, taps=2)
    taps = [torch.randn(3, 12, 6) for _ in range(2)]
    by_frame = heads(taps, segments=4)
    for f in range(4):
        alone = heads([x[:, 3 * f : 3 * f + 3] for x in taps])
        torch.testing.assert_close(by_frame[:, f], alone[:, 0])


def test_logits_start_near_zero_and_in_float32():
    heads = QueryTokenHeads(16, 2, taps=3).to(torch.bfloat16)
    logits = heads([torch.randn(64, 8, 16, dtype=torch.bfloat16) for _ in range(3)])
    assert logits.dtype == torch.float32 and logits.abs().mean() < 0.3


def sensitivity(run, network, of_frame: int) -> list[bool]:
    """Whether each frame of the clip changes this frame's logit (frame logits) or the logit (video)."""
    x = clip(run, 1).requires_grad_()
    sigma = torch.full((1, run.recipe.frames), 0.5, dtype=torch.float64)
    logits = network(x, sigma, None, run.layout, run.window)
    out = logits[0, of_frame] if logits.dim() == 2 else logits[0]
    (gradient,) = torch.autograd.grad(out, x)
    return (gradient.abs().amax((0, 2, 3, 4)) > 0).tolist()


def test_a_bidirectional_backbone_sees_every_frame_in_every_logit(run):
    assert all(sensitivity(run, discriminator(run), 0))
    assert all(sensitivity(run, discriminator(run, logits="frame"), 2))


def test_a_causal_backbones_frame_logit_sees_no_later_chunk(run):
    network = discriminator(run, backbone="causal", logits="frame")
    assert sensitivity(run, network, 2) == [True, True, True, False, False, False, False]
    assert all(sensitivity(run, discriminator(run, backbone="causal"), 0))


def test_an_isolated_backbone_is_blind_to_time(run):
    network = discriminator(run, backbone="isolated", logits="frame")
    assert sensitivity(run, network, 3) == [f == 3 for f in range(7)]


def test_shapes(run):
    x, sigma = clip(run, 3), torch.rand(3, 7, dtype=torch.float64)
    assert discriminator(run)(x, sigma, None, run.layout).shape == (3,)
    assert discriminator(run, logits="frame", queries=2)(x, sigma, None, run.layout).shape == (3, 7)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"backbone": "forward"}, "backbone"),
        ({"logits": "pixel"}, "logits"),
        ({"layers": (1, 0)}, "layers"),
        ({"layers": (5,)}, "layers"),
    ],
)
def test_bad_input(run, options, says):
    with pytest.raises(ValueError, match=says):
        Discriminator(run.networks.plain(None), **{"layers": (0, 1), **options})


def test_segments_must_divide():
    with pytest.raises(ValueError, match="segments"):
        QueryTokenHead(4, 2)(torch.randn(1, 7, 4), segments=2)
