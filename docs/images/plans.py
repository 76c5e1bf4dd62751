"""Draws docs/images/plans.svg from the plans themselves: ``python docs/images/plans.py``."""

from __future__ import annotations

from drawing import BLUE, write

from aadkern import AttentionPlan, VideoLayout, Window, plans

IMAGE_TO_VIDEO = VideoLayout((1, 4, 4, 4, 4, 4), tokens_per_frame=1)
SHORT = VideoLayout((1, 2, 2, 2), tokens_per_frame=1)
CELL, GAP, TOP, LEFT = 9, 34, 46, 12

# Slot 0 is the sink, slots 1 to 12 a ring of three chunks. The new chunk has overwritten the oldest one in slots 1 to 4, and
# Window(11, sink=1) reaches back through the chunk in slots 9 to 12 to the last two frames of the one in 5 to 8.
RING = AttentionPlan.from_ranges(4, 13, [((0, 4), [(0, 1), (1, 5), (7, 13)])])

PANELS = [
    ("block-causal, image to video", plans.block_causal(IMAGE_TO_VIDEO), "chunks 1+4+4+4+4+4"),
    (
        "with Window(9, sink=1)",
        plans.block_causal(IMAGE_TO_VIDEO, Window(9, sink=1)),
        "9 frames, sink and chunk included",
    ),
    ("teacher forcing [clean, noisy]", plans.teacher_forcing(SHORT, Window(5, sink=1)), "noisy chunks see earlier clean ones"),
    ("one streaming step", RING, "sink and ring; two slots out of view"),
]


def panel(title: str, plan: AttentionPlan, note: str, x: int) -> tuple[str, int]:
    width, height = plan.k_len * CELL, plan.q_len * CELL
    cells = [
        f'<rect x="{x + k0 * CELL}" y="{TOP + q0 * CELL}" width="{(k1 - k0) * CELL - 1}" height="{(q1 - q0) * CELL - 1}"/>'
        for (q0, q1), ranges in plan.runs
        for k0, k1 in ranges
    ]
    frame = f'<rect class="frame" x="{x - 2}" y="{TOP - 2}" width="{width + 3}" height="{height + 3}"/>'
    words = (
        f'<text x="{x}" y="18" class="title">{title}</text><text x="{x}" y="34">{note}</text>'
        f'<text x="{x}" y="{TOP + height + 18}">{plan.q_len} x {plan.k_len} frames, {plan.area} visible pairs</text>'
    )
    return f"{frame}<g>{''.join(cells)}</g>{words}", max(width, 8 * len(title), 6 * len(note))


def main() -> None:
    x, parts, bottom = LEFT, [], 0
    for title, plan, note in PANELS:
        drawn, width = panel(title, plan, note, x)
        parts.append(drawn)
        x += width + GAP
        bottom = max(bottom, TOP + plan.q_len * CELL + 26)
    write("plans", x, bottom, *parts, style=f"rect.frame{{fill:none}}g rect{{fill:{BLUE}}}")


if __name__ == "__main__":
    main()
