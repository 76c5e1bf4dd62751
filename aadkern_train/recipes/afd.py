"""Learning from a black-box teacher's finished clips (AFD, arXiv 2605.26105): ``digits_afd`` on captioned digits, ``wan_afd`` for a
causal Wan student on a prepared folder of the teacher's videos.

The paper's text was not to be had whole: figures marked as a port's are those of the table of its third-party port and of its
published weights, unchecked against the paper. ``wan_afd`` has not been run: see docs/methods_afd.md.
"""

from __future__ import annotations

from aadkern_train.engine.recipe import (
    EvaluationSettings,
    LoraSettings,
    ModelsSettings,
    NetworkSettings,
    Recipe,
    ValidationSettings,
)
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.recipes.wan import MEMORY, OURS, SELF_FORCING, SHAPES, TO_BE_NAMED
from aadkern_train.stages.afd import FeedbackDistillation
from aadkern_train.worlds.latents import LatentsData

PORT = "the port's table"
NFT = "open in the port's table; DiffusionNFT's"


def digits_afd(digits: Recipe) -> Recipe:
    """The stages of ``digits`` up to II, whose student has the web clips' faults, and then feedback from curated clips. Baselines
    are stages of 0 steps: ``supervised.steps=120`` on the same clips, ``adversarial.steps=60`` with real gradients."""
    learned = {name: digits.stages[name] for name in ("pretrain", "ode", "dmd")}
    feedback = FeedbackDistillation.Settings(
        versus="dmd",
        steps=120,
        batch=32,
        group=8,
        ema=0.9,
        layers=(3,),
        penalty=8.0,
        discriminator_first=30,
        generator=OptimConfig(lr=1e-4, betas=(0.9, 0.999)),
        discriminator=OptimConfig(lr=1e-3, betas=(0.0, 0.99)),
        heads_lr=2e-3,
    )
    supervised = feedback.model_copy(update={"learns": "clips", "steps": 0, "title": "Supervised (baseline)"})
    adversarial = digits.stages["adversarial"].model_copy(update={"steps": 0, "versus": "dmd", "title": "GAN (baseline)"})
    stages = {**learned, "afd": feedback, "supervised": supervised, "adversarial": adversarial}
    return digits.model_copy(update={"recipe": "digits_afd", "stages": stages})


def wan_afd() -> Recipe:
    """A causal Wan 1.3B that streams in four steps (Self-Forcing's, Causal-Forcing's) and a folder of a teacher's videos."""
    feedback = FeedbackDistillation.Settings(
        start=None,
        steps=300,
        batch=64,
        group=2,
        ema=0.99,
        clip=1.0,
        beta=0.1,
        advantage_clip=5.0,
        prior=1e-4,
        old="type1",
        layers=(14, 21, 29),
        discriminator_first=50,
        generator=OptimConfig(lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-4),
        discriminator=OptimConfig(lr=5e-6, betas=(0.9, 0.999)),
        heads_lr=1e-5,
        **MEMORY,
    )
    return Recipe(
        recipe="wan_afd",
        task="t2v",
        chunks=(3,) * 7,
        window=21,
        sink=0,
        levels=(1.0, 0.9375, 0.8333, 0.625),
        data=LatentsData(),
        network=NetworkSettings(
            **SHAPES["1.3B"], patch=2, predicts="flow", rope="absolute", torus_rope=False, rope_frames=None, qk_gain=1.0
        ),
        models=ModelsSettings(
            generator=TO_BE_NAMED,
            teacher=TO_BE_NAMED,
            discriminator=TO_BE_NAMED,
            given="noised",
            lora=LoraSettings(rank=256, alpha=256.0),
        ),
        stages={"afd": feedback},
        # Measuring would sample a teacher's network beside the stages, and there is none.
        evaluate=EvaluationSettings(every=0, final_clips=0),
        validation=ValidationSettings(every=50),
        checkpoint_every=25,
        keep_checkpoints=1,
    )


WAN_AFD_ORIGINS = {
    "task": SELF_FORCING,
    "chunks": SELF_FORCING,
    "window": SELF_FORCING,
    "sink": SELF_FORCING,
    "levels": SELF_FORCING,
    "network.layers": "Wan2.1-T2V-1.3B",
    "network.rope": SELF_FORCING,
    "models.lora.rank": PORT,
    "models.lora.alpha": PORT,
    "models.lora.targets": OURS,
    "models.discriminator": "ours: a Wan; the paper's is VideoAlign with LoRA of rank 64 (afd.judge)",
    "afd.steps": PORT,
    "afd.batch": "32 prompts, the port's, of two clips each",
    "afd.group": "ours: the paper centres over the batch",
    "afd.advantage": "ours: the paper centres over the batch",
    "afd.ema": PORT,
    "afd.clip": PORT,
    "afd.beta": PORT,
    "afd.advantage_clip": PORT,
    "afd.prior": PORT,
    "afd.normalised": NFT,
    "afd.old": NFT,
    "afd.context": "open; ours, as the student streams",
    "afd.generator.lr": f"{PORT}, which tried 5e-6 to 5e-5",
    "afd.generator.betas": PORT,
    "afd.generator.weight_decay": PORT,
    "afd.discriminator.lr": f"{PORT}; 1e-6 saturates, 5e-5 says nothing",
    "afd.discriminator.betas": "open; torch's",
    "afd.discriminator.weight_decay": "open; ours",
    "afd.heads_lr": OURS,
    "afd.queries": "ours: AAD-1's heads",
    "afd.layers": "ours: at AAD-1's relative depths",
    "afd.discriminator_first": "open: the paper's judge was warmed up beforehand",
    "afd.penalty": PORT + ": none",
    "data.null_text": "no part of this stage",
}
