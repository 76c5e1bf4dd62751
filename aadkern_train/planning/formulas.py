"""Memory and time of a stage's step on one GPU of many, by closed formulas.

N GPUs share the weights, P of them a clip's tokens; p parameters, pb of a block; unit = rows * L / P * C * 2 bytes: one block's
input in bf16.

    state     4 p weights, 8 p AdamW, 4 p average, / N;  frozen 2 p / N;  gradients 4 p / N of the learner whose update is made
    gathered  2 (2 pb + p outside of blocks), or 2 p kept;  reduced  (2 + 4) pb
    boundary  blocks * unit, recomputed from;  working  w * unit, one block alive;  without recomputation  s * blocks * unit
    exchange  2 (3 + 1) unit;  cache  2 * layers * frames * n * C / P * 2
    time      sum of max(FLOPs / rate, bytes / copy) + exchange + what a gathering takes beyond the computing beside it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from aadkern.plans import AttentionPlan, VideoLayout, Window, bidirectional, block_causal, frame_isolated
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.processes import WHOLE_GRADIENTS_BELOW
from aadkern_train.engine.work import Pass, Sizes, Work
from aadkern_train.planning.machines import Machine
from aadkern_train.planning.networks import Net

Parts = dict[str, float]
CHUNKED = ("rollout", "clean", "exits")
Piece = tuple[float, int, int]
"""How often one pass runs, its tokens, and the area of its attention."""

# Tensors of a block's input's size, as multiples of it: constant + slope * ffn / C. From the trace with plain operators (tests).
WORKING = (44.2, 2.05)  # alive at the peak of a block's recomputation and backward
SAVED = (37.1, 2.0)  # kept of a block for its backward, without recomputation
FORWARD = (11.6, 1.28)  # alive at the peak of a block's forward, without gradient
TOUCHED = (21.0, 2.0)  # read and written by what is no product, counted by hand on the fused operators; a backward: twice
CLIPS = 6  # fp32 clips that a pass has beside its network: noise, levels, views, gradients
RESERVE = 0.1  # of a GPU's memory, for what the allocator cannot use and what is not counted: CUDA, NCCL, fragments


@dataclass(frozen=True)
class Clip:
    """What a stage trains on: the clip, the window, how many frames are given, and the passes of a chunk."""

    layout: VideoLayout
    window: Window
    given: int
    steps: StepPlan
    sizes: Sizes

    @cached_property
    def plans(self) -> dict[str, AttentionPlan]:
        """The plans of whole clips by what a token sees."""
        causal, isolated = block_causal(self.layout, self.window), frame_isolated(self.layout)
        return {"bidirectional": bidirectional(self.layout), "causal": causal, "isolated": isolated}

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """Each chunk's tokens, and the area of its attention through the cache."""
        spans = [self.layout.chunk_tokens(chunk) for chunk in range(len(self.layout.chunks))]
        return [(end - start, area_of(self.plans["causal"], start, end)) for start, end in spans]

    def pieces(self, one: Pass) -> list[Piece]:
        """What one pass is made of: (how many, tokens, area)."""
        if one.sees in self.plans:
            return [(1.0, self.layout.tokens, self.plans[one.sees].area)]
        clean = [(1.0, *chunk) for chunk in self.chunks[:-1]]
        noisy = self.chunks[self.given :]
        if one.sees == "clean":
            return clean
        if one.sees == "exits":
            return [(1.0, *chunk) for chunk in noisy]
        drawn = ((len(self.steps.first) + 1) / 2, (len(self.steps.rest) + 1) / 2)  # exits among them, each as likely
        first, rest = drawn if one.depth is None else one.depth
        return [*clean, *((first if i == 0 else rest, *chunk) for i, chunk in enumerate(noisy))]

    @property
    def bytes(self) -> int:
        """Of a clip in fp32."""
        channels, height, width = self.sizes.frame
        return 4 * self.layout.frames * channels * height * width

    @property
    def text_bytes(self) -> int:
        """Of a padded text in fp32."""
        return 0 if self.sizes.text is None else 4 * self.sizes.text[0] * self.sizes.text[1]


def area_of(plan: AttentionPlan, start: int, end: int) -> int:
    """Visible pairs of the queries ``[start, end)``."""
    seen = ((max(0, min(b, end) - max(a, start)), ranges) for (a, b), ranges in plan.runs)
    return sum(queries * sum(k1 - k0 for k0, k1 in ranges) for queries, ranges in seen)


@dataclass(frozen=True)
class Layout:
    """How a run lies on its GPUs, and how a stage's batch is cut: what ``aad plan`` chooses.

    ``gpus`` = replicate * shard * sequence; ``clips`` of a micro-batch on each group of ``sequence`` GPUs, ``accumulate`` of them a
    step; ``node``: GPUs that NVLink joins; ``network``: GB/s of each GPU to other nodes.
    """

    gpus: int = 1
    replicate: int = 1
    sequence: int = 1
    clips: int = 1
    accumulate: int = 1
    keep_gathered: bool = False
    checkpointing: str = "blocks"
    node: int = 8
    network: float = 50.0

    @property
    def ranks(self) -> int:
        """GPUs that share the weights: shard * sequence."""
        return self.gpus // self.replicate

    def share(self, tokens: int, per_frame: int) -> float:
        """A GPU's tokens of so many: the same slice of each frame, the longest."""
        return tokens // per_frame * -(-per_frame // self.sequence)


def affine(pair: tuple[float, float], net: Net) -> float:
    """One of the numbers above, for a network."""
    return pair[0] + pair[1] * net.shape.ffn / net.shape.dim


def unit(net: Net, tokens: float, rows: float) -> float:
    """Bytes of a block's input in bf16."""
    return 2.0 * rows * tokens * net.shape.dim


def memory(work: Work, nets: Mapping[str, Net], clip: Clip, layout: Layout) -> dict[str, Parts]:
    """Bytes on a GPU by part, in each pass of a step."""
    lasting: Parts = {}
    for net in nets.values():
        for part, count in net.state(layout.ranks).items():
            lasting[part] = lasting.get(part, 0.0) + count
    whole_share = layout.clips * layout.accumulate
    lasting["clips"] = whole_share * (work.clips * clip.bytes + work.texts * clip.text_bytes)
    held = {one.role: graph(one, nets[one.role], clip, layout) for one in work.passes if not one.replay}
    return {one.name: _of_pass(one, nets, clip, layout, lasting, held) for one in work.passes}


def _of_pass(one: Pass, nets: Mapping[str, Net], clip: Clip, layout: Layout, lasting: Parts, held: Mapping[str, Parts]) -> Parts:
    net, n = nets[one.role], clip.layout.tokens_per_frame
    parts = dict(lasting)
    learner = nets[one.updates]
    if one.gradient == "weights" or layout.accumulate > 1:
        parts["gradients"] = 4 * learner.trained / layout.ranks
    if _waits(one, learner, layout):
        parts["gradients"] = 4.0 * learner.trained
    others = sum(2.0 * other.root for other in nets.values() if other is not net and layout.ranks > 1)
    kept = (layout.keep_gathered and one.sees in CHUNKED) or (net is learner and _waits(one, learner, layout))
    parts["gathered"] = net.gathered(kept) + others
    if one.gradient == "weights" and layout.ranks > 1:
        parts["reduced"] = 6.0 * net.shape.block
    longest = layout.share(max(tokens for _, tokens, _ in clip.pieces(one)), n)
    rows = one.rows * layout.clips
    parts |= held.get(one.role, {}) if not one.replay else _added(held) | graph(one, net, clip, layout)
    measure = WORKING if one.gradient != "none" else FORWARD
    parts["working"] = affine(measure, net) * unit(net, longest, rows)
    if layout.sequence > 1:
        parts["exchange"] = 2 * 4 * unit(net, longest, rows)
    if one.cache:
        shape, tokens = nets["generator"].shape, layout.share(clip.layout.tokens, n) * layout.clips
        parts["cache"] = 4.0 * shape.layers * tokens * shape.dim
    if one.sees == "rollout" and net.shape.text is not None:
        parts["text"] = 4.0 * net.shape.layers * net.shape.text[0] * net.shape.dim * layout.clips
    parts["clips"] += rows * (CLIPS * clip.bytes + clip.text_bytes)
    return parts


def _waits(one: Pass, learner: Net, layout: Layout) -> bool:
    """Whether whole gradients, and the weights beside them, wait for the last of several backwards: ``accumulating``'s way for
    smaller networks."""
    several = layout.accumulate > 1 or (one.sees == "exits" and one.replay)
    small = learner.parameters < WHOLE_GRADIENTS_BELOW and layout.ranks > 1
    return small and several and (one.gradient == "weights" or layout.accumulate > 1)


def _added(held: Mapping[str, Parts]) -> Parts:
    """What graphs of other passes keep meanwhile."""
    return {"recorded": sum(sum(parts.values()) for parts in held.values())} if held else {}


def graph(one: Pass, net: Net, clip: Clip, layout: Layout) -> Parts:
    """What a pass keeps for its backward: blocks' inputs, or all that their backward reads."""
    if one.gradient == "none":
        return {}
    pieces = [layout.share(tokens, clip.layout.tokens_per_frame) for _, tokens, _ in clip.pieces(one)]
    tokens = max(pieces) if one.replay else sum(pieces)
    size = net.blocks * unit(net, tokens, one.rows * layout.clips)
    return {"boundary": size} if layout.checkpointing == "blocks" else {"saved": size * affine(SAVED, net)}


def peak(phases: Mapping[str, Parts]) -> tuple[str, Parts]:
    """The pass that needs most, and its parts."""
    return max(phases.items(), key=lambda item: sum(item[1].values()))


def fits(parts: Parts, machine: Machine) -> bool:
    """Whether they fit, with the reserve left free."""
    return sum(parts.values()) <= (1 - RESERVE) * machine.memory * 2**30


def flops(one: Pass, net: Net, clip: Clip, checkpointing: str) -> dict[str, float]:
    """FLOPs of a pass for one clip, by what they are: linear, attention and the attention's backward."""
    linear = attention = 0.0
    for often, tokens, area in clip.pieces(one):
        reads = 0 if net.judge is None else 2 * tokens * net.shape.dim**2 * len(net.judge.taps)  # the keys behind each tap
        linear += often * one.rows * (net.shape.linear(tokens, net.depth) + reads)
        attention += often * one.rows * net.shape.attention(area, net.depth)
    conditioning = net.shape.words(net.depth) + net.shape.levels(clip.layout.frames)
    texts = 1.0 if one.gradient == "none" or one.sees != "exits" else len(clip.pieces(one))
    linear += texts * conditioning * (one.rows if one.role == "teacher" else 1)
    if one.gradient == "none":
        return {"linear": linear, "attention": attention, "attention backward": 0.0}
    recorded = one.sees == "exits" and not one.replay  # in the rollout, which is counted by itself
    forwards = (0 if recorded else 1) + (checkpointing == "blocks")
    backwards = 2 if one.gradient == "weights" else 1
    return {
        "linear": (forwards + backwards) * linear,
        "attention": forwards * attention,
        "attention backward": 2.5 * attention,
    }


def seconds(passes: Sequence[Pass], nets: Mapping[str, Net], clip: Clip, layout: Layout, machine: Machine) -> dict[str, Parts]:
    """Seconds of a step by pass, and in each by part; and of the optimiser."""
    by_pass: dict[str, Parts] = {}
    for one in passes:
        parts = _seconds(one, nets[one.role], clip, layout, machine)
        by_pass[one.name] = {part: value * one.times * layout.accumulate for part, value in parts.items()}
        if layout.keep_gathered and one.sees == "rollout":  # once, and kept for all parts of the batch and their backwards
            by_pass[one.name]["gather"] += one.times * _gathering(nets[one.role], layout, machine)
    learning = {one.updates: one.times for one in passes if one.gradient == "weights"}
    steps = sum(48.0 * nets[role].trained / layout.ranks * max(1.0, times) for role, times in learning.items())
    shared = sum(8.0 * nets[role].trained / layout.ranks for role in learning) * (1 - 1 / layout.replicate)
    by_pass["optimiser"] = {"optimiser": steps / (machine.copy * 1e9), "gather": shared / (layout.network * 1e9)}
    return by_pass


def _gathering(net: Net, layout: Layout, machine: Machine) -> float:
    """Seconds to gather the whole network once."""
    return 2.0 * _running(net, layout) / (1e9 * (machine.link if layout.ranks <= layout.node else layout.network))


def _seconds(one: Pass, net: Net, clip: Clip, layout: Layout, machine: Machine) -> Parts:
    """Of one micro-batch."""
    n = clip.layout.tokens_per_frame
    counted = flops(one, net, clip, layout.checkpointing)
    share = layout.clips / layout.sequence / 1e12
    pieces = clip.pieces(one)
    often, tokens = sum(piece[0] for piece in pieces), sum(piece[0] * layout.share(piece[1], n) for piece in pieces)
    recorded = one.sees == "exits" and not one.replay
    forwards = (0 if recorded else 1) + (one.gradient != "none" and layout.checkpointing == "blocks")
    backwards = 0 if one.gradient == "none" else 1
    weights = 2.0 * net.blocks * net.shape.block * often * (forwards + 2 * backwards)
    size = net.blocks * unit(net, tokens, one.rows * layout.clips)
    touched = affine(TOUCHED, net) * size * (forwards + 2 * backwards)
    parts = {
        "linear": max(counted["linear"] * share / machine.linear, weights / (machine.copy * 1e9)),
        "attention": share * (counted["attention"] / machine.attention + counted["attention backward"] / machine.backward),
        "elementwise": touched / (machine.copy * 1e9),
    }
    if layout.sequence > 1:
        link = machine.link if layout.sequence <= layout.node else layout.network
        parts["exchange"] = _exchanged(one, net, clip, layout) / (link * 1e9)
    computing = sum(parts.values())
    if net.member.offloaded:
        parts["gather"] = max(0.0, 2.0 * net.parameters / (PCIE * 1e9) - computing)
        return parts
    rate = machine.link if layout.ranks <= layout.node else layout.network
    parts["gather"] = max(0.0, _gathered(one, net, clip, layout) / (rate * 1e9) - computing)
    return parts


def _gathered(one: Pass, net: Net, clip: Clip, layout: Layout, width: int = 2) -> float:
    """Bytes that leave a GPU in a pass of one micro-batch to gather weights of ``width`` bytes, and to reduce gradients in fp32."""
    often = sum(piece[0] for piece in clip.pieces(one))
    forwards = 0 if one.sees == "exits" and not one.replay else 1
    kept = layout.keep_gathered and one.sees in CHUNKED
    gathers = 0.0 if kept else often * (forwards + (one.gradient != "none"))
    reduces = often if one.gradient == "weights" else 0.0
    return _running(net, layout) * (width * gathers + 4 * reduces)


def _running(net: Net, layout: Layout) -> float:
    """Parameters of what runs that other ranks need of a GPU's share, or it of theirs."""
    return (net.root + net.blocks * net.shape.block) * (1 - 1 / layout.ranks)


def _exchanged(one: Pass, net: Net, clip: Clip, layout: Layout, width: int = 2) -> float:
    """Bytes that leave a GPU in a pass of one micro-batch: q, k, v and the output of each block, in ``width`` bytes; where heads do
    not divide, shared ones travel more often, which is left out."""
    if layout.sequence == 1:
        return 0.0
    tokens = sum(piece[0] * layout.share(piece[1], clip.layout.tokens_per_frame) for piece in clip.pieces(one))
    size = net.blocks * unit(net, tokens, one.rows * layout.clips) * width / 2
    recorded = one.sees == "exits" and not one.replay
    forwards = (0 if recorded else 1) + (one.gradient != "none" and layout.checkpointing == "blocks")
    return 4 * size * (forwards + (one.gradient != "none")) * (1 - 1 / layout.sequence)


def traffic(passes: Sequence[Pass], nets: Mapping[str, Net], clip: Clip, layout: Layout, width: int = 2) -> Parts:
    """Bytes that leave a GPU in a step: of the exchange of tokens and heads, and of gathering, reducing and sharing weights.
    ``width``: bytes of a number that networks compute in."""
    times = {one.name: one.times * layout.accumulate for one in passes}
    exchange = sum(times[one.name] * _exchanged(one, nets[one.role], clip, layout, width) for one in passes)
    there = [one for one in passes if not nets[one.role].member.offloaded]
    gather = sum(times[one.name] * _gathered(one, nets[one.role], clip, layout, width) for one in there)
    if layout.keep_gathered:
        gather += sum(one.times * width * _running(nets[one.role], layout) for one in there if one.sees == "rollout")
    learning = {one.updates for one in passes if one.gradient == "weights"}
    gather += sum(8.0 * nets[role].trained / layout.ranks for role in learning) * (1 - 1 / layout.replicate)
    return {"exchange": exchange, "gather": gather}


PCIE = 25.0
"""GB/s from host memory: PCIe 5.0 x16 has 64, and 25 is what copies of pinned memory reach on PCIe 4.0."""
