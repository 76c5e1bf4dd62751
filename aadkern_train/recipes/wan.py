"""Wan 2.1 on prepared latents: ``wan_i2v_14b`` is AAD-1's own setting (arXiv 2606.03972), ``wan_t2v_1.3b`` its method at the size
that the Self-Forcing family trains, ``wan_smoke`` the same path through networks of a few thousand weights.

``ORIGINS`` says of each figure where it is from, and ``aad train RECIPE --show`` prints it. What the paper leaves open is taken
from the public code that it builds on. None of the large settings has been run: see docs/training_wan.md.
"""

from __future__ import annotations

from aadkern_train.engine.recipe import EvaluationSettings, ModelsSettings, NetworkSettings, Recipe, ValidationSettings
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.stages.adversarial import AdversarialRefinement
from aadkern_train.stages.dmd import DmdWarmUp
from aadkern_train.stages.ode import OdeInitialisation
from aadkern_train.worlds.latents import LatentsData

SHAPES = {
    "14B": {"heads": 40, "head_dim": 128, "layers": 40, "ffn": 13824},
    "1.3B": {"heads": 12, "head_dim": 128, "layers": 30, "ffn": 8960},
    "smoke": {"heads": 4, "head_dim": 32, "layers": 2, "ffn": 256},
}
MEMORY = {"replay": True, "checkpointing": "blocks"}
MEASURED = EvaluationSettings(every=10, clips=8, final_clips=16, batch=1, long=3, show=4, teacher_steps=48)
TO_BE_NAMED = ""  # a folder that only the user knows: a run without it is refused, by the setting's name


def networks_of(size: str) -> dict:
    """What all Wan networks share. A folder gives the weights; the shape is stated so that it can be checked first."""
    shape = NetworkSettings(
        **SHAPES[size], patch=2, predicts="flow", rope="relative", torus_rope=False, rope_frames=None, qk_gain=1.0
    )
    models = ModelsSettings(generator=TO_BE_NAMED, teacher=TO_BE_NAMED, given="noised")
    return {"network": shape, "models": models, "data": LatentsData()}


def ode_of_lineage(guidance: float) -> OdeInitialisation.Settings:
    """Stage I from a folder of pairs, which the user names."""
    return OdeInitialisation.Settings(
        start=None,
        steps=2000,
        batch=64,
        pairs_from=TO_BE_NAMED,
        solver_steps=48,
        shift=5.0,
        guidance=guidance,
        clip=10.0,
        optimiser=OptimConfig(lr=2e-6, betas=(0.9, 0.999)),
        **MEMORY,
    )


def dmd_of_lineage() -> dict:
    """What stage II and what is built on it take from Self-Forcing."""
    scores = {"betas": (0.0, 0.999), "weight_decay": 0.01}
    return {
        "batch": 64,
        "fake_per_generator": 5,
        "fake_rollouts": "fresh",
        "guidance": 4.0,
        "shift": 5.0,
        "level_range": (0.02, 0.98),
        "clip": 10.0,
        "generator": OptimConfig(lr=2e-6, **scores),
        "fake": OptimConfig(lr=4e-7, **scores),
        **MEMORY,
    }


def _stages(taps: tuple[int, ...], guidance: float) -> dict:
    """The three stages with the paper's figures, and the lineage's where it has none."""
    plain = {"betas": (0.0, 0.999)}
    return {
        "ode": ode_of_lineage(guidance),
        "dmd": DmdWarmUp.Settings(
            steps=100,
            ema=0.0,
            **dmd_of_lineage(),
        ),
        "adversarial": AdversarialRefinement.Settings(
            start="dmd",
            steps=200,
            batch=256,
            discriminator_first=0,
            layers=taps,
            queries=1,
            penalty=20.0,
            delta=0.05,
            penalty_every=1,
            shift=1.0,
            image_clean=False,
            ema=0.98,
            clip=10.0,
            generator=OptimConfig(lr=4e-7, **plain),
            discriminator=OptimConfig(lr=1e-6, **plain),
            heads_lr=2e-6,
            **MEMORY,
        ),
    }


def wan_i2v_14b() -> Recipe:
    """AAD-1: image to video at 480p from Wan2.1-T2V-14B, all networks of that size."""
    return Recipe(
        recipe="wan_i2v_14b",
        task="i2v",
        chunks=(1, 4, 4, 4, 4, 4),
        window=9,
        sink=1,
        levels=(1.0,),
        stages=_stages((19, 29, 39), guidance=5.0),
        evaluate=MEASURED,
        validation=ValidationSettings(every=50),
        checkpoint_every=25,
        keep_checkpoints=1,
        **networks_of("14B"),
    )


def wan_t2v_1_3b() -> Recipe:
    """The paper's method on text to video with Wan2.1-T2V-1.3B; the teacher may be the 14B."""
    return Recipe(
        recipe="wan_t2v_1.3b",
        task="t2v",
        chunks=(3,) * 7,
        window=9,
        sink=3,
        levels=(1.0,),
        first_levels=(1.0, 0.9375, 0.8333, 0.625),
        stages=_stages((14, 21, 29), guidance=6.0),
        evaluate=MEASURED,
        validation=ValidationSettings(every=50),
        checkpoint_every=50,
        keep_checkpoints=1,
        **networks_of("1.3B"),
    )


def wan_smoke() -> Recipe:
    """The whole path in minutes on two cores: real file formats, random networks, two steps a stage. Its videos mean nothing."""
    stages = _stages((0, 1), guidance=5.0)
    fast = OptimConfig(lr=1e-3, betas=(0.0, 0.999))
    small = {"steps": 2, "batch": 2}
    stages["ode"] = stages["ode"].model_copy(update={**small, "optimiser": fast})
    stages["dmd"] = stages["dmd"].model_copy(
        update={**small, "fake_per_generator": 2, "fake_rollouts": "same", "generator": fast, "fake": fast}
    )
    stages["adversarial"] = stages["adversarial"].model_copy(
        update={**small, "generator": fast, "discriminator": fast, "heads_lr": 2e-3}
    )
    return Recipe(
        recipe="wan_smoke",
        task="i2v",
        chunks=(1, 4, 4),
        window=9,
        sink=1,
        levels=(1.0,),
        stages=stages,
        evaluate=EvaluationSettings(every=0, clips=2, final_clips=2, batch=1, long=1, show=1, teacher_steps=2),
        validation=ValidationSettings(every=0),
        checkpoint_every=2,
        keep_checkpoints=1,
        **networks_of("smoke"),
    )


PAPER = "paper"
SELF_FORCING = "open in the paper; Self-Forcing's"
OURS = "ours"
_COMMON = {
    "ode.steps": PAPER,
    "ode.batch": SELF_FORCING,
    "ode.optimiser.lr": SELF_FORCING,
    "ode.optimiser.betas": "open in the paper; torch's",
    "ode.solver_steps": "open in the paper; Self-Forcing's and CausVid's",
    "ode.shift": "open in the paper; the student's own shift",
    "ode.clip": SELF_FORCING,
    "dmd.steps": PAPER,
    "dmd.batch": SELF_FORCING,
    "dmd.fake_per_generator": PAPER,
    "dmd.fake_rollouts": SELF_FORCING,
    "dmd.guidance": "open in the paper; Self-Forcing's, which writes it 3",
    "dmd.shift": PAPER,
    "dmd.level_range": SELF_FORCING,
    "dmd.ema": "open in the paper; Self-Forcing's begins at step 200",
    "dmd.clip": SELF_FORCING,
    "dmd.generator.lr": SELF_FORCING,
    "dmd.generator.betas": SELF_FORCING,
    "dmd.generator.weight_decay": SELF_FORCING,
    "dmd.fake.lr": SELF_FORCING,
    "dmd.fake.betas": SELF_FORCING,
    "dmd.fake.weight_decay": SELF_FORCING,
    "adversarial.steps": PAPER,
    "adversarial.batch": PAPER,
    "adversarial.queries": PAPER,
    "adversarial.penalty": PAPER,
    "adversarial.delta": PAPER,
    "adversarial.penalty_every": PAPER,
    "adversarial.shift": PAPER,
    "adversarial.generator_per_discriminator": "open in the paper",
    "adversarial.generator.lr": PAPER,
    "adversarial.generator.betas": SELF_FORCING,
    "adversarial.discriminator.lr": PAPER,
    "adversarial.discriminator.betas": SELF_FORCING,
    "adversarial.heads_lr": PAPER,
    "adversarial.ema": PAPER,
    "adversarial.clip": SELF_FORCING,
    "adversarial.image_clean": "open in the paper; its backbone never saw a clean first frame",
    "adversarial.discriminator_first": OURS,
    "models.given": "Self-Forcing: one level for all frames",
    "levels": PAPER,
    "data.null_text": "the whole lineage: Wan's negative prompt",
}
ORIGINS: dict[str, dict[str, str]] = {
    "wan_i2v_14b": {
        **_COMMON,
        "task": PAPER,
        "chunks": PAPER,
        "window": PAPER,
        "sink": PAPER,
        "network.layers": PAPER,
        "network.rope": PAPER,
        "adversarial.layers": PAPER,
        "ode.guidance": "open in the paper; Wan's own for 14B",
    },
    "wan_t2v_1.3b": {
        **_COMMON,
        "task": SELF_FORCING,
        "chunks": SELF_FORCING,
        "window": "Reward-Forcing's",
        "sink": "Reward-Forcing's",
        "first_levels": "ASD's first-frame enhancement with Self-Forcing's four levels",
        "network.layers": "Wan2.1-T2V-1.3B",
        "network.rope": "Reward-Forcing's",
        "adversarial.layers": "the paper's, at the same relative depths; Self-Forcing's code taps 13, 21, 29",
        "ode.guidance": "open in the paper; Self-Forcing's, and Wan's for 1.3B",
    },
    "wan_smoke": {},
}
# Words that stand for several settings.
SHORTHANDS: dict[str, dict[str, list[str]]] = {
    "wan_t2v_1.3b": {
        "one_gpu": [
            "ode.accumulate=64",
            "dmd.accumulate=64",
            "adversarial.accumulate=256",
            "adversarial.views=2",
        ],
        "two_steps": ["levels=[1.0, 0.8333]"],
    },
    "wan_i2v_14b": {"two_steps": ["levels=[1.0, 0.8333]"]},
}
