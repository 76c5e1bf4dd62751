"""Draws docs/images/house.svg: the rooms, and which way imports point."""

from __future__ import annotations

from drawing import BLUE, GREEN, GREY, PALE, arrow, box, rect, text, write

WIDTH = 760


def floor(y: float, height: float, title: str, note: str) -> str:
    return (
        rect(12, y, WIDTH - 24, height, "none", 'stroke="#bbb" rx="7"') + text(24, y + 20, title, "title") + text(24, y + 36, note)
    )


def row(y: float, fill: str, *names: tuple[str, str], left: float = 190) -> str:
    width = (WIDTH - left - 24) / len(names)
    return "".join(box(left + n * width, y, width - 10, 44, fill, *name) for n, name in enumerate(names))


def main() -> None:
    parts = [
        floor(12, 72, "people", ""),
        row(26, GREY, ("aad", "the command line"), ("benchmarks/", "timed behind checks"), ("your project", "compat.patch")),
        arrow(WIDTH / 2, 84, WIDTH / 2, 100),
        floor(102, 124, "aadkern_train", "a laptop to many GPUs"),
        row(
            114,
            GREEN,
            ("stages/", "which loss, who learns"),
            ("worlds/", "clips, captions, measures"),
            ("recipes/", "all settings"),
        ),
        row(
            168,
            GREEN,
            ("networks/", "denoiser, teacher, judge"),
            ("engine/", "processes, checkpoints"),
            ("diffusion/, learning/", "levels, optimisers"),
        ),
        arrow(WIDTH / 2, 226, WIDTH / 2, 242),
        floor(244, 124, "aadkern", "needs torch alone"),
        row(
            256,
            BLUE,
            ("wan/", "CausalWan, VAE, text"),
            ("streaming/", "ring, merged step, graphs"),
            ("ulysses/", "one clip on many GPUs"),
        ),
        row(
            310,
            BLUE,
            ("range_attention/", "plans to kernels"),
            ("pooling/, noise/", "judge's heads, views"),
            ("blocks/, fp8/", "norms, rotary, linear"),
        ),
        arrow(WIDTH / 2, 368, WIDTH / 2, 384),
        floor(386, 70, "csrc", "CUDA C++ for Hopper"),
        row(399, PALE, ("attention/", "forward, backward"), ("primitives/", "wgmma, TMA: PTX and a host model")),
        text(12, 476, "Imports point down only; tests/test_contracts.py holds them to it."),
    ]
    write("house", WIDTH, 488, *parts)


if __name__ == "__main__":
    main()
