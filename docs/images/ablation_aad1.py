"""Draws docs/images/ablation_aad1.svg out of docs/data/aad1.json: what each cell has at three times the trained length."""

from __future__ import annotations

from dots import draw

CELLS = {
    "as the recipe": "as the recipe",
    "bidirectional, frame logits": "frame logits",
    "causal, video logit": "causal judge",
    "causal, frame logits": "causal judge, frame logits",
    "isolated, frame logits": "judge of single frames",
    "no penalty": "no penalty",
    "penalty x 2.5": "penalty x 2.5",
    "III without II": "III without II",
    "II five times as long": "II five times as long, no III",
    "two steps": "two steps a chunk",
    "four steps, II alone": "four steps, no III",
}
PANELS = [(name, name, "long") for name in ("quality", "drift", "contrast", "grid")]


def main() -> None:
    draw("ablation_aad1", "aad1", ("adversarial", "dmd"), PANELS, CELLS)


if __name__ == "__main__":
    main()
