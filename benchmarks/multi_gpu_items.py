"""What ``benchmarks.multi_gpu`` does on every rank: each item checks before it times, and gives the times of the slowest rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aadkern import (
    AttentionPlan,
    SequenceGroup,
    StreamingGenerator,
    VideoLayout,
    Window,
    attention,
    plans,
    ulysses_attention,
)
from aadkern.blocks import RotaryGrid, qk_norm_rope
from aadkern.blocks.api import can_pack
from aadkern.blocks.ops import qk_norm_rope_pack
from aadkern.testing import Results, assert_results_close, eager, exact, make_gradients, make_inputs
from aadkern.ulysses import ops
from aadkern.ulysses.api import by_frame
from aadkern.ulysses.exchange import Ends, Moves, exchange, exchange_ends, route, rows_on
from aadkern.ulysses.shares import shares
from benchmarks.cases import FRAMES, PLANS
from benchmarks.streaming_shapes import PIXEL_FRAMES, SIZES, Size, model_of
from benchmarks.timing import Job, Run, alternate, medians, peak_bytes

KINDS = ("correct", "copies", "exchange", "layer", "blocks", "streaming", "graphs")
PRETENDED = 8  # ranks whose copies one GPU makes
CHUNK, WINDOW = 3, Window(FRAMES)
CHECKED = {"bidirectional": 0, "block-causal": 1, "teacher forcing": 2}
MOST_DIFFERENCE = 0.05  # of two right results of a model in bf16, in terms of their norm: benchmarks.streaming_contenders
TIMED_CHUNKS = 8

Item = Callable[[], Mapping[str, Any]]


def named_items(bench: Bench, models: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[str, Item]]:
    """Every item by name, correctness first, and CUDA graphs with collectives inside, which nobody has tried, last."""
    for kind in KINDS:
        for model in models if kind in kinds else ():
            size = SIZES[model]
            if kind == "correct":
                yield from ((f"correct: {model}, {plan}", partial(bench.correct, size, plan)) for plan in CHECKED)
            elif kind == "layer":
                yield from ((f"layer: {model}, {plan}", partial(bench.layer, size, plan)) for plan in ("bidirectional", "7x3"))
            elif kind == "graphs":
                if bench.device.type == "cuda":
                    yield f"graphs: {model}", partial(bench.streaming, size, True)
            else:
                yield f"{kind}: {model}", partial(getattr(bench, kind), size)


def lines(name: str, record: Mapping[str, Any]) -> list[str]:
    """An item for people."""
    figures = [f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, (int, float)) and key != "seconds"]
    rows = [f"{name}: {record['outcome']}" + (f"; {', '.join(figures)}" if figures else "")]
    return rows + [
        f"    {key}: " + ", ".join(f"{of} {value:.4g}" for of, value in by_name.items())
        for key, by_name in record.items()
        if isinstance(by_name, dict)
    ]


def leaving(moves: Moves, rank: int, row_bytes: int) -> int:
    """The bytes that leave a rank for others."""
    return row_bytes * sum(ops.volume(box) for to, boxes in enumerate(moves.sent) if to != rank for box in boxes)


def rate(bytes_moved: float, ms: float) -> float:
    """GB/s."""
    return bytes_moved / ms / 1e6


def apart(one: Tensor, other: Tensor) -> float:
    """How far two results of a model lie apart, in terms of their norm."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


class Bench:
    """This rank, its device, and how many rounds are timed."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def group(self, tokens_per_frame: int) -> SequenceGroup:
        return SequenceGroup(dist.group.WORLD, tokens_per_frame)

    def worst(self, values: Mapping[str, float]) -> dict[str, float]:
        """The largest of all ranks'."""
        heard: list[Any] = [None] * self.ranks
        dist.all_gather_object(heard, dict(values))
        return {name: max(of[name] for of in heard) for name in values}

    def times(self, jobs: Mapping[str, Job]) -> dict[str, float]:
        """Median milliseconds. The same number of rounds on every rank, as their jobs wait for one another."""
        return self.worst(medians(jobs, self.device, 0.0, self.rounds))

    def both_times(self, runs: Mapping[str, Run]) -> dict[str, float]:
        taken = alternate(runs, self.device, 0.0, self.rounds)
        times = {f"{name}, {what}": [r[what] for r in taken[name]] for name in runs for what in ("forward", "backward")}
        return self.worst({name: 1e3 * statistics.median(seconds) for name, seconds in times.items()})

    def slice_of(self, x: Tensor, group: SequenceGroup) -> Tensor:
        """This rank's tokens of x [B, F n, ...]."""
        return by_frame(x, group.tokens_per_frame)[:, :, slice(*group.span)].flatten(1, 2)

    def inputs(self, plan: AttentionPlan, size: Size) -> list[Tensor]:
        q, k, v = make_inputs(plan, size.heads, size.head_dim, self.dtype, self.device)
        return [q, k, v, make_gradients(q)[0]]

    def correct(self, size: Size, which: str) -> dict[str, Any]:
        """Outputs and gradients of six frames against fp64, by the rule of every test: at most twice as far off as plain torch in
        the same dtype, and rounding."""
        n = max(50, 2 * self.ranks + 1)
        layout, window = VideoLayout.regular(6, CHUNK, n), Window(5, sink=1)
        of = (plans.bidirectional(layout), plans.block_causal(layout, window), plans.teacher_forcing(layout, window))
        plan, group, scale = of[CHECKED[which]], self.group(n), size.head_dim**-0.5
        q, k, v, dout = self.inputs(plan, size)
        truth, plain = exact(q, k, v, plan, scale, dout), eager(q, k, v, plan, scale, dout)
        leaves = [self.slice_of(x, group).clone().requires_grad_() for x in (q, k, v)]
        out = ulysses_attention(*leaves, plan, group)
        grads = torch.autograd.grad(out, leaves, self.slice_of(dout, group))
        ours = Results(out.detach(), truth.lse.float(), *grads)
        exactly, plainly = (
            Results(self.slice_of(r.out, group), r.lse, *(self.slice_of(x, group) for x in r[2:])) for r in (truth, plain)
        )
        assert_results_close(ours, exactly, plainly)
        errors = {
            name: (mine.double() - theirs).abs().max().item()
            for name, mine, theirs in zip(ours._fields, ours, exactly, strict=True)
        }
        del errors["lse"]
        return {"largest_error": self.worst(errors)}

    def copies(self, size: Size) -> dict[str, Any]:
        """What one rank of the group, or of 8, does beside the collective, before and after it; bytes read and written."""
        ranks, n = (self.ranks if self.ranks > 1 else min(PRETENDED, size.tokens // size.chunk)), size.tokens // size.chunk
        way = route(PLANS["bidirectional"](n).code, size.heads, 0, ranks, n, FRAMES, False)
        places = way.to_heads.shapes[0][1]
        q, k, v = (
            torch.randn(1, FRAMES * places, size.heads, size.head_dim, device=self.device, dtype=self.dtype) for _ in range(3)
        )
        weights = [torch.ones(size.dim, device=self.device, dtype=self.dtype) for _ in range(2)]
        turns = RotaryGrid(FRAMES, size.height // 2, size.width // 2).turns(
            size.head_dim, self.dtype, self.device, spread=not can_pack(q, k, v, None)
        )
        turns = turns.within(0, places)
        flat, back = ([x for boxes in side for box in boxes for x in box] for side in (way.to_heads.sent, way.to_heads.received))
        shapes = [x for shape in way.to_heads.new_shapes for x in shape]
        parts, together = [by_frame(x, places) for x in (q, k, v)], way.to_heads.together
        arrived = torch.randn(size.head_dim * sum(ops.volume(b) for bs in way.to_heads.received for b in bs), device=self.device)
        arrived = arrived.to(self.dtype)
        a_row, sent = size.head_dim * q.element_size(), sum(ops.volume(box) for boxes in way.to_heads.sent for box in boxes)
        own = 3 * q.numel() // size.head_dim
        jobs: dict[str, Job] = {
            "norm and positions": lambda: qk_norm_rope(q, k, *weights, turns),
            "pack": lambda: ops.ulysses_pack(*parts, None, None, flat, together),
            "unpack": lambda: ops.ulysses_unpack(arrived, back, together, shapes, 1, size.head_dim),
        }
        moved = {"norm and positions": 4 * own // 3, "pack": own + sent, "unpack": 2 * arrived.numel() // size.head_dim}
        if can_pack(q, k, v, None):
            table, rows = rows_on(way.to_heads, 1, self.device)
            numbers = turns.numbers(size.head_dim)
            jobs["norm, positions and pack in one"] = lambda: qk_norm_rope_pack(
                q, k, v, *weights, turns.axes, table, numbers, 1e-6, rows
            )
            moved["norm, positions and pack in one"] = own + sent
        with torch.no_grad():
            ms = self.times(jobs)
        return {"of_ranks": ranks, "median_ms": ms, "gb_per_s": {name: rate(a_row * moved[name], ms[name]) for name in ms}}

    def exchange(self, size: Size) -> dict[str, Any]:
        """Both exchanges of a layer's forward, the collective alone and with its copies; GB/s of what leaves a rank."""
        n = size.tokens // size.chunk
        group = self.group(n)
        way = route(PLANS["bidirectional"](n).code, size.heads, self.rank, self.ranks, n, FRAMES, False)
        jobs: dict[str, Job] = {}
        out: dict[str, float] = {}
        for what, moves in (("q, k, v", way.to_heads), ("output", way.to_tokens)):
            parts = [torch.randn(1, f, p, h, size.head_dim, device=self.device, dtype=self.dtype) for f, p, h in moves.shapes]
            sent = size.head_dim * sum(ops.volume(box) for boxes in moves.sent for box in boxes)
            packed = torch.randn(sent, device=self.device, dtype=self.dtype)
            jobs[f"{what}, alone"] = partial(exchange_ends, [packed], moves, group, Ends(True, True), size.head_dim)
            jobs[f"{what}, with copies"] = partial(exchange, parts, moves, group)
            bytes_out = leaving(moves, self.rank, size.head_dim * parts[0].element_size())
            out |= {f"{what}, alone": bytes_out, f"{what}, with copies": bytes_out}
        with torch.no_grad():
            ms = self.times(jobs)
        most = self.worst(out)
        return {"bytes_out": most, "median_ms": ms, "gb_per_s": {name: rate(most[name], ms[name]) for name in ms}}

    def layer(self, size: Size, which: str) -> dict[str, Any]:
        """Attention of 21 frames, forward and backward, shared and on one rank."""
        n = size.tokens // size.chunk
        plan, group = PLANS[which](n), self.group(n)
        q, k, v, dout = self.inputs(plan, size)
        whole = [x.requires_grad_() for x in (q, k, v)]
        local, local_dout = [self.slice_of(x.detach(), group).clone().requires_grad_() for x in whole], self.slice_of(dout, group)
        with torch.no_grad():
            alone = self.slice_of(attention(q, k, v, plan), group)
            off = self.worst({"difference": apart(ulysses_attention(*local, plan, group), alone)})
        if not off["difference"] < MOST_DIFFERENCE:
            raise RuntimeError(f"the shared result differs from one rank's by {off['difference']:.2g} of its norm; not timed")
        ms = self.both_times({
            "shared": Run(lambda: ulysses_attention(*local, plan, group), lambda out: torch.autograd.grad(out, local, local_dout)),
            "one rank": Run(lambda: attention(q, k, v, plan), lambda out: torch.autograd.grad(out, whole, dout)),
        })  # fmt: skip
        areas = [plan.rows(f * n, (f + 1) * n).area for f in range(FRAMES)]
        loads = [sum((h1 - h0) * sum(areas[f0:f1]) for h0, h1, f0, f1 in own) for own in shares(size.heads, self.ranks, areas)]
        balance = max(loads) * self.ranks / sum(loads)
        return {**off, "largest_share_over_mean": balance, "median_ms": ms, "times_one_rank": _over(ms)}

    def blocks(self, size: Size) -> dict[str, Any]:
        """Two blocks, recomputed in the backward as in a training step, under a block-causal plan, shared and on one rank."""
        n = size.tokens // size.chunk
        model = model_of(size._replace(layers=2), self.device, self.dtype).requires_grad_(True)
        model.enable_gradient_checkpointing()
        plan, parameters = PLANS["7x3"](n), list(model.parameters())
        draws = torch.Generator(self.device).manual_seed(0)
        x, dout = (torch.randn(1, 16, FRAMES, size.height, size.width, device=self.device, generator=draws) for _ in range(2))
        t = torch.rand(1, FRAMES, device=self.device, generator=draws) * 1000
        text = torch.randn(1, size.text_tokens, size.text_dim, device=self.device, generator=draws).to(self.dtype)

        def forward(group: SequenceGroup | None) -> Tensor:
            model.sequence = group
            return model(x.to(self.dtype), t, text, plan=plan)

        def backward(flow: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(flow, parameters, dout.to(flow.dtype), allow_unused=True)

        def run(group: SequenceGroup | None) -> Run:
            def both(flow: Tensor) -> object:
                model.sequence = group  # recomputation asks for it again
                return backward(flow)

            return Run(partial(forward, group), both)

        group = self.group(n)
        outcomes = []
        for of in (group, None):
            flow = forward(of)
            grad = torch.cat([g.float().flatten() for g in backward(flow) if g is not None])
            if of is not None:
                dist.all_reduce(grad)
                grad /= self.ranks
            outcomes.append((flow.detach(), grad))
        off = self.worst({"flow": apart(outcomes[0][0], outcomes[1][0]), "gradients": apart(outcomes[0][1], outcomes[1][1])})
        del outcomes
        if not max(off.values()) < MOST_DIFFERENCE:
            raise RuntimeError(f"the shared blocks differ from one rank's by {off} of their norms; not timed")
        runs = {"shared": run(group), "one rank": run(None)}
        peaks = {name: peak_bytes(one, self.device) for name, one in runs.items()}
        ms = self.both_times(runs)
        known = {name: float(peak) for name, peak in peaks.items() if peak is not None}
        return {"difference": off, "median_ms": ms, "times_one_rank": _over(ms), "peak_bytes": self.worst(known)}

    def streaming(self, size: Size, graphs: bool = False) -> dict[str, Any]:
        """Chunks of 3 latent frames with a window of 21, merged passes: frames a second, shared and on one rank."""
        n = size.tokens // size.chunk
        model = model_of(size, self.device, self.dtype)
        draws = torch.Generator(self.device).manual_seed(0)
        shape = (1, 16, CHUNK, size.height, size.width)
        noises = [torch.randn(shape, device=self.device, generator=draws).to(self.dtype) for _ in range(4)]
        text = torch.randn(1, size.text_tokens, size.text_dim, device=self.device, generator=draws).to(self.dtype)
        warm = FRAMES // CHUNK + 1 + (2 * (FRAMES // CHUNK + 1) if graphs else 0)  # a graph a phase, seen once and recorded once
        ms: dict[str, float] = {}
        videos = []
        for name, group in (("shared", self.group(n)), ("one rank", None)):
            model.sequence = group
            cache = model.new_cache(1, size.height, size.width, WINDOW, max_chunk_frames=CHUNK, merged=True)
            stream = StreamingGenerator(model, cache, text=text, cuda_graphs=graphs)
            chunks = stream.chunks(lambda chunk, step: noises[(chunk + step) % len(noises)])
            videos.append(torch.cat([chunk.clone() for chunk in islice(chunks, warm)], dim=2))
            taken = []
            for _ in range(TIMED_CHUNKS):
                self._wait()
                began = time.perf_counter()
                next(chunks)
                self._wait()
                taken.append(time.perf_counter() - began)
            ms[name] = 1e3 * statistics.median(taken)
            del cache, stream, chunks
        off = self.worst({"difference": apart(*videos)})
        if not off["difference"] < MOST_DIFFERENCE:
            raise RuntimeError(
                f"the shared video differs from one rank's by {off['difference']:.2g} of its norm; its times are dropped"
            )
        ms = self.worst(ms)
        fps = {name: 1e3 * CHUNK * PIXEL_FRAMES / of for name, of in ms.items()}
        return {**off, "ms_per_chunk": ms, "fps": fps, "times_one_rank": ms["one rank"] / ms["shared"]}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _over(ms: Mapping[str, float]) -> dict[str, float]:
    return {what: ms[f"one rank, {what}"] / ms[f"shared, {what}"] for what in ("forward", "backward")}
