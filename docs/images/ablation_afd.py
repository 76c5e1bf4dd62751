"""Draws docs/images/ablation_afd.svg out of docs/data/afd.json: what each student has at three times the trained length."""

from __future__ import annotations

from dots import draw

CELLS = {
    "AFD": "AFD",
    "reward constant": "reward constant (= stage II)",
    "discriminator frozen": "discriminator frozen",
    "GAN loss": "GAN loss",
    "advantage over the batch": "advantage over the batch",
    "joint context": "joint context",
    "stage III (GAN, real gradients)": "stage III",
    "supervised": "supervised",
    "broad teacher, AFD": "broad teacher: AFD",
    "broad teacher, supervised": "broad teacher: supervised",
}
PANELS = [(name, name, "long") for name in ("obey", "contrast", "quality", "drift")]


def main() -> None:
    draw("ablation_afd", "afd", ("adversarial", "afd"), PANELS, CELLS)


if __name__ == "__main__":
    main()
