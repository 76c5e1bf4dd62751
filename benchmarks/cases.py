"""The cases: shapes and plans of the models this library serves, with exact FLOPs from the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from aadkern import AttentionPlan, VideoLayout, Window, plans

FRAMES = 21
HEAD_DIM = 128  # Wan's, at 12 heads (1.3B) and at 40 (14B)
TOKENS_480P, TOKENS_720P = 1560, 3600


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem: a plan and the heads it runs with. ``trained`` is False where no gradient is ever wanted."""

    name: str
    plan: AttentionPlan
    tokens_per_frame: int
    heads: int
    head_dim: int
    trained: bool = True

    @property
    def id(self) -> str:
        """The name with the sizes: ``7x3/1560x12x128`` (tokens per frame, heads, head_dim)."""
        return f"{self.name}/{self.tokens_per_frame}x{self.heads}x{self.head_dim}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward", "backward", "both") if self.trained else ("forward",)

    def flops(self, direction: str = "forward") -> int:
        """Exact matmul FLOPs of one direction: 4 * area * heads * head_dim, 2.5 times that, and their sum."""
        forward = self.plan.flops(self.heads, self.head_dim)
        backward = self.plan.flops(self.heads, self.head_dim, backward=True)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    @property
    def density(self) -> float:
        """Visible share of the dense mask."""
        return self.plan.area / (self.plan.q_len * self.plan.k_len)


def ring_chunk(tokens_per_frame: int, chunk: int = 4, window: Window | None = None) -> AttentionPlan:
    """One chunk of a stream against a full ring, the frames in view at its end and its beginning, before it is written there.

    The key buffer is [sink | ring | the chunk's own keys], each part beginning at a multiple of 128 tokens, so that the view is
    four ranges that do not touch, the most a plan may have: sink, ring head, ring tail, the new chunk. The ring has twice the
    room of what it shows.
    """
    window = window or Window(9, sink=1)
    recent = window.recent(chunk)
    if recent is None or recent <= chunk or not window.sink:
        raise ValueError(f"window must have a limit, a sink, and frames in view beside the chunk's {chunk}, got {window}")
    n, seen = tokens_per_frame, recent - chunk  # earlier frames in view: half at the ring's end, the rest at its beginning

    def after(tokens: int) -> int:
        return -(-tokens // 128) * 128 + (128 if tokens % 128 == 0 else 0)

    ring = after(window.sink * n)
    ring_end = ring + 2 * seen * n
    own = after(ring_end)
    tail = seen // 2
    ranges = [(0, window.sink * n), (ring, ring + (seen - tail) * n), (ring_end - tail * n, ring_end), (own, own + chunk * n)]
    return AttentionPlan.from_ranges(chunk * n, own + chunk * n, [((0, chunk * n), ranges)])


def _image() -> tuple[int, ...]:
    return (1, 4, 4, 4, 4, 4)


# In order of importance, as the GPU check runs them. 21 latent frames, 7 chunks of 3, but where the name says otherwise.
PLANS: dict[str, Callable[[int], AttentionPlan]] = {
    "7x3_window9_sink3": lambda n: plans.block_causal(VideoLayout.regular(FRAMES, 3, n), Window(9, sink=3)),
    "7x3": lambda n: plans.block_causal(VideoLayout.regular(FRAMES, 3, n)),
    "i2v_window9_sink1": lambda n: plans.block_causal(VideoLayout(_image(), n), Window(9, sink=1)),
    "ring_chunk": ring_chunk,
    "bidirectional": lambda n: plans.bidirectional(VideoLayout.regular(FRAMES, 3, n)),
    "teacher_forcing": lambda n: plans.teacher_forcing(VideoLayout.regular(FRAMES, 3, n)),
    "framewise": lambda n: plans.block_causal(VideoLayout.regular(FRAMES, 1, n)),
}
STREAMED = {"ring_chunk"}


def attention_case(name: str, tokens_per_frame: int = TOKENS_480P, heads: int = 12, head_dim: int = HEAD_DIM) -> AttentionCase:
    """One of ``PLANS`` at a size. Raises ValueError for a name that is none."""
    if name not in PLANS:
        raise ValueError(f"case must be one of {', '.join(PLANS)}, got {name!r}")
    return AttentionCase(name, PLANS[name](tokens_per_frame), tokens_per_frame, heads, head_dim, trained=name not in STREAMED)


def attention_cases(tokens_per_frame: int, heads: int, head_dim: int) -> list[AttentionCase]:
    """Every plan at a size that suits the machine."""
    return [attention_case(name, tokens_per_frame, heads, head_dim) for name in PLANS]


def case_of(text: str) -> AttentionCase:
    """The case that an ``AttentionCase.id`` names, or a bare name at 480p with 12 heads."""
    name, _, sizes = text.partition("/")
    numbers = sizes.split("x") if sizes else []
    if len(numbers) not in (0, 3) or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"case must be NAME or NAME/TOKENSxHEADSxDIM, as in 7x3/1560x12x128, got {text!r}")
    return attention_case(name, *map(int, numbers))


def core_cases() -> list[str]:
    """What a GPU is asked first: every plan at 480p with 12 heads."""
    return [attention_case(name).id for name in PLANS]


def further_cases() -> list[str]:
    """What follows while time lasts: the 14B model's heads, and 720p."""
    larger = [(TOKENS_480P, 40, name) for name in ("7x3_window9_sink3", "ring_chunk", "7x3", "i2v_window9_sink1", "bidirectional")]
    wider = [(TOKENS_720P, 12, name) for name in ("7x3_window9_sink3", "ring_chunk", "i2v_window9_sink1", "bidirectional")]
    return [f"{name}/{tokens}x{heads}x{HEAD_DIM}" for tokens, heads, name in (*larger[:3], *wider[:2], *larger[3:], *wider[2:])]
