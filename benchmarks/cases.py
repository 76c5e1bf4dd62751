"""The cases: shapes and plans of the models this library serves, with exact FLOPs from the plan."""

from __future__ import annotations

from dataclasses import dataclass

from aadkern import AttentionPlan, VideoLayout, Window, plans


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem: a plan and the heads it runs with."""

    name: str
    plan: AttentionPlan
    heads: int
    head_dim: int

    @property
    def forward_flops(self) -> int:
        return self.plan.flops(self.heads, self.head_dim)

    @property
    def density(self) -> float:
        """Visible share of the dense mask."""
        return self.plan.area / (self.plan.q_len * self.plan.k_len)


def attention_cases(tokens_per_frame: int, heads: int, head_dim: int) -> list[AttentionCase]:
    """21 latent frames under every plan of training, at a number of tokens per frame that suits the machine."""
    n = tokens_per_frame
    image, regular = VideoLayout((1, 4, 4, 4, 4, 4), n), VideoLayout.regular(21, 3, n)
    made = {
        "i2v_window9_sink1": plans.block_causal(image, Window(9, sink=1)),
        "i2v": plans.block_causal(image),
        "7x3": plans.block_causal(regular),
        "7x3_window9_sink3": plans.block_causal(regular, Window(9, sink=3)),
        "framewise": plans.block_causal(VideoLayout.regular(21, 1, n)),
        "teacher_forcing": plans.teacher_forcing(regular),
        "bidirectional": plans.bidirectional(regular),
    }
    return [AttentionCase(name, plan, heads, head_dim) for name, plan in made.items()]
