"""For tests of sequence parallelism: a CausalWan on several processes against itself on one. See ulysses_cases.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aadkern import SequenceGroup, StreamingCache, StreamingGenerator, VideoLayout, Window, plans
from aadkern.streaming import PassGraphs
from aadkern.wan import CausalContext, CausalWan
from aadkern.wan.fp8 import quantise
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.discriminator import Discriminator
from tests.streaming.op_recorder import OpRecorder
from tests.ulysses.ulysses_cases import case, close, group_of, main, operators_counted, raises

HEIGHT, WIDTH, TOKENS, HEADS = 4, 10, 10, 6
CHUNKS, WINDOW = (1, 2, 2), Window(3, sink=1)
LAYOUT = VideoLayout(CHUNKS, TOKENS)
SIZES = (2, 3, 4)  # 3 whole heads, 2, and 1.5 each; 10 tokens are (3, 3, 4) on 3


def causal_wan(rope: str = "absolute", dtype: torch.dtype = torch.float64, heads: int = HEADS) -> CausalWan:
    torch.manual_seed(11)
    sizes = dict(num_attention_heads=heads, attention_head_dim=6, in_channels=3, out_channels=3, text_dim=5, freq_dim=8, ffn_dim=24)
    model = CausalWan(patch_size=(1, 2, 2), num_layers=2, rope=rope, **sizes)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.35)
    return model.to(dtype)


def clip(frames: int, seed: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, their noise levels and a text, the same on every rank."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, frames, HEIGHT, WIDTH, dtype=torch.float64, generator=draws)
    t = torch.rand(batch, frames, dtype=torch.float64, generator=draws) * 1000
    return x.to(dtype), t, torch.randn(batch, 4, 5, dtype=torch.float64, generator=draws).to(dtype)


def gradients(module: nn.Module, loss: Tensor, *others: Tensor) -> list[Tensor]:
    parameters = [p for p in module.parameters()]
    grads = torch.autograd.grad(loss, (*parameters, *others), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip((*parameters, *others), grads, strict=True)]


def compare(
    module: nn.Module, net: CausalWan, groups: tuple[int, ...], run: Callable[[Tensor], Tensor], x: Tensor, what: str
) -> None:
    """Outputs, dL/dx and parameters' gradients (the mean over ranks, as FSDP takes it) with and without a group."""

    def once() -> tuple[Tensor, list[Tensor]]:
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        return out.detach(), gradients(module, (out * weights).sum(), leaf)

    net.sequence = None
    expected, grads = once()
    for size in groups:
        group = group_of(size, TOKENS)
        if group is None:
            continue
        net.sequence = group
        out, ours = once()
        net.sequence = None
        scale = expected.abs().max().item()
        close(out / scale, expected / scale, f"{what} on {size}")
        everyone = [torch.empty_like(out) for _ in range(size)]
        dist.all_gather(everyone, out.contiguous(), group=group.process_group)
        assert all(torch.equal(other, out) for other in everyone), f"{what}: ranks hold other bytes"
        of_parameters = torch.cat([grad.flatten() for grad in ours[:-1]])
        dist.all_reduce(of_parameters, group=group.process_group)
        means = [*(of_parameters / size).split([grad.numel() for grad in ours[:-1]]), ours[-1]]
        for i, (mine, grad) in enumerate(zip(means, grads, strict=True)):
            largest = grad.abs().max().clamp(min=1e-3)
            close(mine.view_as(grad) / largest, grad / largest, f"{what} on {size}, gradient {i}", 1e-11)


@case
def model() -> None:
    x, t, text = clip(5, 3)
    per_token = torch.rand(2, 5 * TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1000
    ways: list[tuple[str, dict[str, Any]]] = [
        ("bidirectional", dict(timestep=t[:, 0])),
        ("block-causal, text", dict(timestep=t, encoder_hidden_states=text, plan=plans.block_causal(LAYOUT, WINDOW))),
        ("a noise level per token", dict(timestep=per_token)),
    ]
    net = causal_wan()
    for what, options in ways:
        compare(net, net, SIZES, lambda leaf, options=options: net(leaf, **options), x, what)  # type: ignore[misc]
    net.enable_gradient_checkpointing()
    context = CausalContext(LAYOUT, WINDOW)
    compare(net, net, (4,), lambda leaf: net(leaf, t, text, plan=context), x, "checkpointing")
    views = dict(timestep=t, encoder_hidden_states=text, condition_of=[1, 0, 1])
    compare(net, net, (4,), lambda leaf: net(leaf[[0, 1, 1]], **views), x, "views")
    relative = causal_wan("relative")
    compare(relative, relative, (2, 4), lambda leaf: relative(leaf, t, plan=context), x, "relative positions")
    both, times, _ = clip(10, 4, batch=1)
    teacher = plans.teacher_forcing(LAYOUT, WINDOW)
    compare(net, net, (4,), lambda leaf: net(leaf, times, plan=teacher), both, "teacher forcing")


@case
def one_clip() -> None:
    """Tokens in the order in which they arrive: a clip that sees itself whole, and a chunk with gradient behind a cache."""
    x, t, text = clip(5, 3, batch=1)
    for rope in ("absolute", "relative"):
        net = causal_wan(rope)
        compare(net, net, SIZES, lambda leaf, net=net: net(leaf, t[:, 0], text), x, "one clip, bidirectional")  # type: ignore[misc]

        def replay(leaf: Tensor, net: CausalWan = net) -> Tensor:
            cache = StreamingCache.for_model(net, 1, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=2)
            for start, end in ((0, 1), (1, 3)):
                with torch.no_grad(), operators_counted() as seen:
                    net(leaf[:, :, start:end].detach(), torch.zeros_like(t[:, start:end]), text, cache=cache)
                    cache.commit()
                # Keys and values of frames behind the sink are unpacked into the cache; the output of two layers is a tensor.
                unpacked = (seen["ulysses_unpack_into"], seen["ulysses_unpack"])
                assert net.sequence is None or unpacked == ((2, 2) if start else (0, 4)), unpacked
            return net(leaf[:, :, 3:], t[:, 3:], text, cache=cache)

        compare(net, net, (2, 3), replay, x, f"one clip, replayed, {rope}")


@case
def packed_by_triton() -> None:
    """Under Triton's interpreter: norms, positions and the send buffer in one launch, and its backward, in the model."""
    x, t, text = clip(3, 3, batch=1)
    exact, net = causal_wan(), causal_wan(dtype=torch.float32)
    net.set_block_backend("triton")
    layout = VideoLayout((1, 2), TOKENS)
    for size, plan in ((2, None), (4, plans.block_causal(layout))):
        group = group_of(size, TOKENS)
        if group is None:
            continue
        results = []
        for model, dtype in ((exact, torch.float64), (net, torch.float32)):
            model.sequence = group
            leaf = x.to(dtype, copy=True).requires_grad_()
            with operators_counted() as seen:
                out = model(leaf, t, text.to(dtype), plan=plan)
                results.append([out, *gradients(model, (out * torch.arange(out.numel()).view_as(out).sin()).sum(), leaf)])
            assert seen["qk_norm_rope_pack"] == seen["qk_norm_rope_pack_backward"] == (0 if model is exact else 2), dict(seen)
        for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
            largest = ours.abs().max().clamp(min=1e-3)
            close(theirs.double() / largest, ours / largest, f"in Triton on {size}, {i}", 1e-3)


@case
def model_on_eight() -> None:
    """6, 8 and 12 heads on 8 ranks, 10 tokens as 1 or 2 each."""
    x, t, text = clip(5, 3)
    net = causal_wan("relative")
    compare(net, net, (8,), lambda leaf: net(leaf, t, text, plan=CausalContext(LAYOUT, WINDOW)), x, "relative positions")
    both, times, _ = clip(10, 4, batch=1)
    teacher = plans.teacher_forcing(LAYOUT, WINDOW)
    compare(net, net, (5, 8), lambda leaf: net(leaf, times, plan=teacher), both, "teacher forcing")
    for heads in (8, 12):
        other = causal_wan(heads=heads)
        run = lambda leaf, other=other: other(leaf, t[:1, 0], text[:1])  # noqa: E731
        compare(other, other, (8,), run, x[:1], f"{heads} heads, bidirectional")


@case
def discriminator() -> None:
    x, t, text = clip(5, 5)
    for backbone, per in (("bidirectional", "video"), ("causal", "frame")):
        network = Discriminator(Denoiser(causal_wan()), (0, 1), backbone=backbone, logits=per, queries=2).double()
        with torch.no_grad():
            for parameter in network.heads.parameters():
                parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(parameter.numel()))

        def run(leaf: Tensor, network: Discriminator = network) -> Tensor:
            return network(leaf.transpose(1, 2), t / 1000, text, LAYOUT, WINDOW)

        compare(network, network.backbone.net, (2, 4), run, x, f"{backbone} discriminator, logits per {per}")


@case
def streaming() -> None:
    """Passes through the ring, merged, in both kinds of position, and chunks re-run with gradient."""
    for rope in ("absolute", "relative"):
        net = causal_wan(rope)
        chunks = (1, 2, 2, 2, 1, 2)
        x, t, text = clip(sum(chunks), 6)

        def stream(x: Tensor, net: CausalWan = net, chunks: tuple[int, ...] = chunks, t: Tensor = t, text: Tensor = text) -> Tensor:
            merged = StreamingCache.for_model(net, 2, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=2, merged=True)
            flows, start, last = [], 0, 0
            with torch.no_grad():
                for size in chunks:
                    levels = torch.cat((torch.zeros_like(t[:, start - last : start]), t[:, start : start + size]), dim=1)
                    flows.append(net(x[:, :, start - last : start + size], levels, text, cache=merged, clean_frames=last))
                    if last:
                        merged.commit()
                    start, last = start + size, size
            cache = StreamingCache.for_model(net, 2, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=2, capacity_frames=10)
            begin, kept = 0, x.detach()
            for size in chunks:
                own = slice(begin, begin + size)
                with torch.no_grad():
                    net(kept[:, :, own], torch.zeros_like(t[:, own]), text, cache=cache, cache_only=True)
                    cache.commit()
                cache.rewind(begin)
                flows.append(net(x[:, :, own], t[:, own], text, cache=cache))
                begin += size
                cache.rewind(begin)
            return torch.cat(flows, dim=2)

        compare(net, net, (3, 4) if rope == "relative" else (4,), stream, x, f"streaming, {rope}")


@case
def generator() -> None:
    """Twenty chunks from the streaming generator, its caller none the wiser."""
    for rope, merged, levels in (("relative", True, (1.0,)), ("absolute", False, (1.0, 0.6))):
        net = causal_wan(rope)

        def made(group: SequenceGroup | None, net: CausalWan = net, merged: bool = merged, levels: Any = levels) -> Tensor:
            net.sequence = group
            cache = StreamingCache.for_model(net, 1, HEIGHT, WIDTH, Window(6, sink=1), max_chunk_frames=2, merged=merged)
            stream = StreamingGenerator(net, cache, levels=levels, text=clip(1, 9, batch=1)[2])
            chunks = stream.chunks(lambda chunk, step: clip(2, 100 * chunk + step, 1)[0], 20, first_frame=clip(1, 7, 1)[0])
            frames = torch.cat(list(chunks), dim=2)
            stream.set_text(clip(1, 10, batch=1)[2], recache=True)
            return torch.cat((frames, *stream.chunks(lambda chunk, step: clip(2, 100 * chunk + step, 1)[0], 2)), dim=2)

        expected = made(None)
        for size in (2, 4) if merged else (4,):
            group = group_of(size, TOKENS)
            if group is not None:
                close(made(group) / expected.abs().max(), expected / expected.abs().max(), f"{rope} video on {size}", 1e-10)


@case
def replayed() -> None:
    """Passes replayed from recordings, as CUDA graphs replay them, are the passes."""
    net, group = causal_wan("relative"), group_of(4, TOKENS)
    net.sequence = group
    videos = []
    for recorder in (None, OpRecorder()):
        cache = StreamingCache.for_model(net, 1, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=1, merged=True)
        stream = StreamingGenerator(net, cache)
        if recorder is not None:
            stream._options["graphs"] = PassGraphs(recorder)
        chunks = stream.chunks(lambda chunk, step: clip(1, chunk, 1)[0], 12, first_frame=clip(1, 7, 1)[0])
        videos.append(torch.cat(list(chunks), dim=2))
    assert recorder is not None and recorder.replayed > 0
    close(videos[1], videos[0], "replayed")


@case
def quantised() -> None:
    torch.manual_seed(3)
    sizes = dict(num_attention_heads=4, attention_head_dim=16, in_channels=3, out_channels=3, text_dim=16, freq_dim=8, ffn_dim=64)
    net = CausalWan(patch_size=(1, 2, 2), num_layers=2, **sizes).eval().requires_grad_(False)  # type: ignore[arg-type]
    quantise(net)
    x, t, _ = clip(3, 3, dtype=torch.float32)
    expected = net(x, t)
    net.sequence = group_of(3, TOKENS)
    if net.sequence is not None:
        close(net(x, t), expected, "quantised", 1e-4)


@case
def other_clips() -> None:
    """A rank with another clip, and a group for another frame, are told on every rank."""
    net, group = causal_wan(), group_of(4, TOKENS)
    net.sequence = group
    x, t, text = clip(2, 3)
    rank = dist.get_rank()
    net(x, t)
    for other in ((x[:1], t[:1], None), (x, t, text), (x[:, :, :1], t[:, :1], None), (x[:, :2], t, None)):
        with raises(ValueError, "ranks of a sequence" if rank != 1 else ""):
            net(*(other if rank == 1 else (x, t)))
    wrong = CausalWan.sequence = SequenceGroup(group.process_group, TOKENS + 1) if group else None
    net.sequence = wrong
    with raises(ValueError, "sequence must be a group of the clip's 10 tokens a frame"):
        net(x, t)
    CausalWan.sequence = None
    net.sequence = group
    whole = StreamingCache(2, 2, HEADS, 6, TOKENS, Window(3), max_chunk_frames=2, dtype=torch.float64)
    with raises(ValueError, "cache must hold this rank's 2 heads"):
        net(x, t, cache=whole)


if __name__ == "__main__":
    main(sys.argv[1:])
