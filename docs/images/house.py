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
    middle = WIDTH / 2
    parts = [floor(12, 72, "people", ""), arrow(middle, 84, middle, 100)]
    parts += row(26, GREY, ("aad", "the command line"), ("benchmarks/", "timed behind checks"), ("your project", "compat.patch"))
    parts += [floor(102, 124, "aadkern_train", "a laptop to many GPUs"), arrow(middle, 226, middle, 242)]
    parts += row(114, GREEN, ("stages/", "losses, who learns"), ("worlds/", "clips, captions, measures"), ("recipes/", "settings"))
    below = (
        ("networks/", "denoiser, teacher, judge"),
        ("engine/", "processes, checkpoints"),
        ("diffusion/, learning/", "levels, optimisers"),
    )
    parts += row(168, GREEN, *below)
    parts += [floor(244, 178, "aadkern", "needs torch alone"), arrow(middle, 422, middle, 438)]
    above = (
        ("compat/", "drop-ins for others"),
        ("wan/", "CausalWan, VAE, text"),
        ("streaming/", "ring, merged step"),
        ("ulysses/", "a clip on many GPUs"),
    )
    parts += row(256, BLUE, *above)
    below = (
        ("range_attention/", "plans to kernels"),
        ("pooling/, noise/", "judge's heads, views"),
        ("blocks/, fp8/", "norms, linear layers"),
    )
    parts += row(310, BLUE, *below)
    parts += row(364, BLUE, ("rotary/", "positions of frame, row, column"), ("weights/", "Wan's files, names of weights"))
    parts += [floor(440, 70, "csrc", "CUDA C++ for Hopper")]
    parts += row(453, PALE, ("attention/", "forward, backward"), ("primitives/", "wgmma, TMA: PTX and a host model"))
    parts += [text(12, 530, "Imports point down only; tests/house/test_contracts.py holds them to it.")]
    write("house", WIDTH, 542, *parts)


if __name__ == "__main__":
    main()
