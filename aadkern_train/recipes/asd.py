"""Adversarial self-distillation with first-frame enhancement (arXiv 2511.01419): ``digits_asd`` on captioned digits, and
``wan_t2v_1.3b_asd`` with the paper's figures, where it states them.

One student for 1, 2 and 4 steps a chunk, of which the first chunk always runs four. ``ORIGINS`` says of each figure where it is
from.
"""

from __future__ import annotations

from aadkern_train.engine.recipe import EvaluationSettings, Recipe, ValidationSettings
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.recipes.wan import MEASURED, OURS, PAPER, SELF_FORCING, dmd_of_lineage, networks_of, ode_of_lineage
from aadkern_train.stages.asd import AdversarialSelfDistillation
from aadkern_train.stages.ode import OdeInitialisation
from aadkern_train.stages.pretrain import Pretrain
from aadkern_train.worlds.digits import DigitsData

LEVELS = (1.0, 0.9375, 0.8333, 0.625)  # Self-Forcing's 1000, 750, 500, 250, shifted by 5


def digits_asd() -> Recipe:
    """Text to video on moving digits: a teacher, stage I at four levels, and stage II with self-distillation."""
    return Recipe(
        recipe="digits_asd",
        task="t2v",
        data=DigitsData(),
        chunks=(3, 3, 3, 3),
        window=9,
        sink=3,
        levels=LEVELS,
        first_levels=LEVELS,
        stages={
            "pretrain": Pretrain.Settings(steps=1400, shift=7.0),
            "ode": OdeInitialisation.Settings(steps=300),
            "asd": AdversarialSelfDistillation.Settings(steps=100),
        },
        evaluate=EvaluationSettings(final_clips=256, steps=(1, 2)),
    )


def wan_t2v_1_3b_asd() -> Recipe:
    """The paper's setting: Wan2.1-T2V-1.3B, Self-Forcing's training with a discriminator among the student's own steps."""
    networks = networks_of("1.3B")
    networks["network"] = networks["network"].model_copy(update={"rope": "absolute"})
    return Recipe(
        recipe="wan_t2v_1.3b_asd",
        task="t2v",
        chunks=(3,) * 7,
        window=21,
        sink=0,
        levels=LEVELS,
        first_levels=LEVELS,
        stages={
            "ode": ode_of_lineage(guidance=6.0),
            "asd": AdversarialSelfDistillation.Settings(
                steps=120,
                alpha=30.0,
                stop_below_dynamic=0.0,
                layers=(14, 21, 29),
                penalty=20.0,
                delta=0.05,
                penalty_every=1,
                ema=0.99,
                heads=OptimConfig(lr=2e-6, betas=(0.0, 0.999)),
                **dmd_of_lineage(),
            ),
        },
        evaluate=MEASURED.model_copy(update={"steps": (1, 2)}),
        validation=ValidationSettings(every=20),
        checkpoint_every=20,
        keep_checkpoints=1,
        **networks,
    )


UNSTATED = "not in what is public of the paper; Self-Forcing's"
AAD_1 = "not in what is public of the paper; AAD-1's"
ORIGINS = {
    "task": PAPER,
    "chunks": PAPER,
    "window": "Self-Forcing's: every frame of a clip",
    "sink": SELF_FORCING,
    "levels": "paper: four steps, Self-Forcing's",
    "first_levels": "paper: the first chunk always in four steps; in training too, as Causal-Forcing++ has it",
    "spacing": "a reading of the paper's algorithm: n steps are the first n of four; respaced is the other",
    "network.layers": PAPER,
    "network.rope": SELF_FORCING,
    "models.given": "no frame is given",
    "data.null_text": "the whole lineage: Wan's negative prompt",
    "ode.steps": "paper: CausVid's initialisation; the count is AAD-1's",
    "ode.batch": UNSTATED,
    "ode.optimiser.lr": UNSTATED,
    "ode.optimiser.betas": "torch's",
    "ode.solver_steps": UNSTATED,
    "ode.shift": "the student's own shift",
    "ode.guidance": UNSTATED,
    "ode.clip": UNSTATED,
    "ode.ema": "ours",
    "ode.optimiser.weight_decay": "ours",
    "asd.steps": f"{UNSTATED} 600 iterations, of which each fifth trains the generator",
    "asd.batch": UNSTATED,
    "asd.alpha": "paper: the best of 0, 10, 20, 30",
    "asd.fake_per_generator": "paper: the generator every fifth iteration, fake score and discriminator in each",
    "asd.fake_rollouts": UNSTATED,
    "asd.guidance": f"{UNSTATED}, which writes it 3",
    "asd.shift": UNSTATED,
    "asd.level_range": UNSTATED,
    "asd.stop_below_dynamic": "the paper stops after its steps",
    "asd.real": "the paper says n up to N; of N + 1 steps there is nothing to hold it against",
    "asd.shared_level": "ours; the paper's algorithm draws two",
    "asd.first_exit": "paper: the first chunk always in four steps",
    "asd.layers": f"{OURS}: AAD-1's relative depths; the paper reads the fake score",
    "asd.queries": AAD_1,
    "asd.penalty": f"{AAD_1}; the paper: R1 and R2, as R3GAN",
    "asd.delta": AAD_1,
    "asd.penalty_every": AAD_1,
    "asd.ema": f"{UNSTATED}, which begins at step 200",
    "asd.clip": UNSTATED,
    "asd.generator.lr": UNSTATED,
    "asd.generator.betas": UNSTATED,
    "asd.generator.weight_decay": UNSTATED,
    "asd.fake.lr": UNSTATED,
    "asd.fake.betas": UNSTATED,
    "asd.fake.weight_decay": UNSTATED,
    "asd.heads.lr": AAD_1,
    "asd.heads.betas": UNSTATED,
    "asd.heads.weight_decay": "ours",
}
SHORTHANDS = {"one_gpu": ["ode.accumulate=64", "asd.accumulate=64"]}
