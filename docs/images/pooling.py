"""Draws docs/images/pooling.svg, the layer and its absorbed form, from the sizes of Wan 1.3B: ``python docs/images/pooling.py``."""

from __future__ import annotations

from drawing import BLUE, GREEN, RED, write

TOKENS, CHANNELS, HEADS = 32760, 1536, 12  # 21 frames at 480p; one query token
WIDE, TALL, THIN = 58, 100, 9  # of a drawing of [tokens, channels], and of one that has heads in the place of either
TOP, WIDTH, HEIGHT = 52, 800, 366


def box(x: float, y: float, width: float, height: float, kind: str, name: str, note: str) -> str:
    """A tensor with its name above and its size below."""
    middle = x + width / 2
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}"/>'
        f'<text class="name" x="{middle}" y="{y - 6}">{name}</text><text x="{middle}" y="{y + height + 14}">{note}</text>'
    )


def arrow(x0: float, y0: float, x1: float, y1: float, label: str = "") -> str:
    text = f'<text x="{(x0 + x1) / 2}" y="{(y0 + y1) / 2 - (6 if y0 == y1 else 14)}">{label}</text>' if label else ""
    return f'<path d="M{x0} {y0}L{x1} {y1}"/>{text}'


def megabytes(*shape: int, each: int) -> str:
    size = each
    for extent in shape:
        size *= extent
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} KB"


def layer(x: float) -> str:
    """Keys and values of every token, each as large as x."""
    clip, scores = megabytes(TOKENS, CHANNELS, each=2), megabytes(TOKENS, HEADS, each=4)
    flops = 4 * TOKENS * CHANNELS**2 / 1e9
    y = TOP + 84
    return (
        f'<text class="title" x="{x}" y="20">the layer: {flops:.0f} GFLOP for K and V</text>'
        + box(x, y, WIDE, TALL, "clip", "x", clip)
        + arrow(x + WIDE + 4, y + 30, x + 146, y - 14, "W_k")
        + arrow(x + WIDE + 4, y + TALL - 26, x + 146, y + 118, "W_v")
        + box(x + 150, y - 66, WIDE, TALL, "formed", "K", clip)
        + box(x + 150, y + 78, WIDE, TALL, "formed", "V", clip)
        + arrow(x + 212, y - 16, x + 276, y - 16, "q")
        + box(x + 280, y - 66, THIN, TALL, "thin", "p", scores)
        + arrow(x + 285, y + 54, x + 285, y + 104)
        + arrow(x + 212, y + 128, x + 276, y + 128)
        + box(x + 280, y + 124, WIDE, THIN, "thin", "pooled", "3 KB")
    )


def absorbed(x: float) -> str:
    """The projections come to the queries; the tokens are read twice and nothing of their size is made."""
    clip, scores = megabytes(TOKENS, CHANNELS, each=2), megabytes(TOKENS, HEADS, each=4)
    thin, flops = megabytes(HEADS, CHANNELS, each=4), 4 * TOKENS * CHANNELS * HEADS / 1e9
    y = TOP + 72
    return (
        f'<text class="title" x="{x}" y="20">absorbed: {flops:.1f} GFLOP, x read twice</text>'
        + box(x, y, WIDE, TALL, "clip", "x", clip)
        + box(x + 130, y - 46, WIDE, THIN, "thin", "u = W_kᵀ q", thin)
        + arrow(x + 159, y - 12, x + 159, y - 4, "")
        + arrow(x + WIDE + 4, y + 50, x + 150, y + 50, "x u")
        + box(x + 155, y, THIN, TALL, "thin", "", scores)
        + f'<text x="{x + 176}" y="{y + 56}">p</text>'
        + arrow(x + 190, y + 64, x + 262, y + 64, "pᵀ x")
        + box(x + 268, y + 60, WIDE, THIN, "thin", "z", thin)
        + arrow(x + 297, y + 90, x + 297, y + 128, "")
        + f'<text x="{x + 318}" y="{y + 112}">W_v</text>'
        + box(x + 268, y + 148, WIDE, THIN, "thin", "pooled", "3 KB")
    )


def main() -> None:
    style = (
        "text{text-anchor:middle}.title{text-anchor:start}path{stroke:#777;fill:none;marker-end:url(#tip)}"
        f".clip{{fill:{BLUE}}}.formed{{fill:{RED}}}.thin{{fill:{GREEN}}}"
    )
    foot = "bf16 tokens, float32 sums: 21 frames of 1560 tokens, 1536 channels, 12 heads, one query"
    words = f'<text class="foot" x="{WIDTH / 2:g}" y="{HEIGHT - 10}">{foot}</text>'
    write("pooling", WIDTH, HEIGHT, layer(20), absorbed(430), words, style=style)


if __name__ == "__main__":
    main()
