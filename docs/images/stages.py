"""Draws docs/images/stages.svg: who learns from whom in AAD-1's three stages."""

from __future__ import annotations

from drawing import BLUE, GREEN, GREY, PALE, arrow, box, text, write


def column(x: float, title: str, *rows: str) -> str:
    return text(x, 24, title, "title") + "".join(text(x, 42 + 15 * n, line) for n, line in enumerate(rows))


def main() -> None:
    parts = [
        column(16, "I. ODE initialisation", "regress where the teacher's", "many-step path ends"),
        box(16, 92, 190, 46, PALE, "teacher", "many steps, sees all frames"),
        arrow(111, 138, 111, 176, ""),
        text(118, 160, "noise and its end point"),
        box(16, 180, 190, 46, BLUE, "generator", "causal, one step a chunk"),
        arrow(210, 203, 262, 203, ""),
        column(268, "II. DMD under self-rollout", "pull the generator's own clips towards", "where the teacher says data are"),
        box(268, 92, 100, 46, PALE, "teacher", "frozen"),
        box(382, 92, 100, 46, GREEN, "fake score", "follows"),
        arrow(318, 138, 350, 176, ""),
        arrow(432, 138, 400, 176, ""),
        text(300, 160, "+", "name"),
        text(446, 160, "&#8722;", "name"),
        box(268, 180, 214, 46, BLUE, "generator", "rolls out from its own frames"),
        arrow(486, 203, 538, 203, ""),
        column(544, "III. Adversarial refinement", "a judge that sees the whole clip", "against chosen real clips"),
        box(544, 92, 100, 46, GREY, "real clips"),
        box(658, 92, 136, 46, GREEN, "discriminator", "sees all frames"),
        arrow(644, 115, 656, 115),
        arrow(726, 138, 700, 176, ""),
        box(544, 180, 250, 46, BLUE, "generator", "the one that streams"),
        text(
            16,
            254,
            "Blue learns to generate, green learns beside it, pale is frozen. Each stage starts from the generator before it.",
        ),
    ]
    write("stages", 812, 268, *parts)


if __name__ == "__main__":
    main()
