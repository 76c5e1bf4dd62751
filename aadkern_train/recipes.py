"""The recipes: every setting of a run, with its default and its reason. ``aad train RECIPE key.sub=value`` changes any of them.

Two recipes: ``digits``, moving digits on a torus with an exact teacher to measure against (the demo), and ``clips``, a folder of
videos. The paper's own figures (14B, 64 GPUs) stand beside the defaults where they differ: small networks want far larger rates.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from aadkern.plans import Window
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.config import Config
from aadkern_train.learning.optim import OptimConfig

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class DigitsData(Config):
    """Moving digits on a torus (worlds/digits.py)."""

    sprites: Annotated[int, Field(ge=1, le=10)] = 4
    torus: int = 16  # pixels; a multiple of the 4-pixel lattice
    keep: Share = 0.75  # probability that a frame keeps the velocity


class ClipsData(Config):
    """A folder of video files (worlds/clips.py)."""

    path: str = ""
    height: Count = 32  # pixels, after resize and centre crop
    width: Count = 32
    fps: Rate = 8.0  # frames per second that the model sees
    patch: Count = 4  # pixels per side of a latent's patch
    channels: Count = 16  # principal components kept of the 3 patch^2 numbers in a patch


class NetworkSettings(Config):
    """The shape of every CausalWan in the run."""

    heads: Count = 4
    head_dim: Count = 16
    layers: Count = 4
    ffn: Count = 192
    patch: Count = 4
    predicts: Literal["x0", "flow"] = "x0"  # Wan predicts flow; a small net learns x0 faster at sigma 1
    rope: Literal["relative", "absolute"] = "relative"
    torus_rope: bool = True  # spatial frequencies that close on the torus
    # Whole multiples of 2 pi / 16 in time tell neighbouring frames apart far better than Wan's 1, 0.1, 0.01, ... for head_dim 16:
    # after 400 steps the teacher's legal moves were 60 % against 51 (chance is 50). Positions differ by less than 16 within a
    # window or clip.
    rope_frames: Count | None = 16
    qk_gain: Rate = 1.7  # initial weight of the norms of q and k: sharper attention from the start


class StageSettings(Config):
    """What every stage has."""

    steps: Annotated[int, Field(ge=0)] = 100  # optimiser steps of the stage's main network; 0 leaves the stage out
    batch: Count = 16  # clips per step over all processes
    accumulate: Count = 1  # parts that a batch is computed in, one after another
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.98
    clip: Rate = 1.0  # total norm of a gradient
    replay: bool = False  # take a rollout's gradient chunk by chunk: the memory of one chunk for one more forward


class PretrainSettings(StageSettings):
    """A bidirectional flow-matching model: the neural teacher, and the discriminator's backbone."""

    steps: Annotated[int, Field(ge=0)] = 1600
    batch: Count = 12
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    shift: Rate = 4.0  # noise levels drawn for training; digits move legally or not at sigma 0.85 to 0.95
    optimiser: OptimConfig = OptimConfig(kind="muon", lr=3e-3, muon_lr=0.03, decay="cosine", warmup_steps=20)


class OdeSettings(StageSettings):
    """Stage I: regression on the teacher's ODE pairs (paper: 2000 steps, AdamW 2e-6)."""

    steps: Annotated[int, Field(ge=0)] = 700
    batch: Count = 12
    pairs: Count = 1024
    solver_steps: Count = 16  # the pairs cost pairs * solver_steps forwards of the teacher
    optimiser: OptimConfig = OptimConfig(kind="muon", lr=2e-3, decay="cosine", warmup_steps=20)


class DmdSettings(StageSettings):
    """Stage II: distribution matching under self-rollout, stopped early (paper: 100 steps, rates 2e-6 and 4e-7, 1:5)."""

    steps: Annotated[int, Field(ge=0)] = 200
    fake_per_generator: Count = 3
    shift: Rate = 5.0
    level_range: tuple[Share, Share] = (0.02, 0.98)
    generator: OptimConfig = OptimConfig(lr=6e-4, betas=(0.0, 0.99), decay="cosine")
    fake: OptimConfig = OptimConfig(lr=2e-3, betas=(0.0, 0.99))
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.96
    stop_below_dynamic: Share = 0.9  # stop when dynamic degree falls below this share of the best seen (motion collapse)


class AdversarialSettings(StageSettings):
    """Stage III: the generator against a bidirectional discriminator on real clips (paper: 200 steps, rates 4e-7, 1e-6, heads
    2e-6)."""

    steps: Annotated[int, Field(ge=0)] = 180
    discriminator_first: Annotated[int, Field(ge=0)] = 20  # steps in which only the discriminator learns
    generator_per_discriminator: Count = 1  # generator updates for each of the discriminator's (paper: unstated)
    backbone: Literal["bidirectional", "causal", "isolated"] = "bidirectional"
    logits: Literal["video", "frame"] = "video"
    layers: tuple[int, ...] = (1, 2, 3)  # tapped blocks (paper: 19, 29, 39 of 40)
    queries: Count = 1
    relativistic: bool = False
    penalty: Annotated[float, Field(ge=0)] = 16.0  # lambda (paper: 20); lambda * delta^2 is what counts: 1 (paper: 0.05)
    # Standard deviation of the perturbation (paper: 0.05). At 0.25 the discriminator learns to overlook the blur of one step, by
    # which it would else tell real from fake, and judges motion. With lambda 4 on a quarter of the batch it still won in one run of
    # four, and the generator's quality fell; with 16 on a half, in one of the three seeds of docs/demo.md.
    delta: Rate = 0.25
    penalty_every: Count = 2  # the penalty is taken on every second clip
    shift: Rate = 3.0  # noise levels the discriminator sees: 1 is the paper's U[0, 1], 5 the lineage's
    image_clean: bool = True  # the discriminator sees the first frame without noise
    warm_up: bool = True  # start from stage II (False: from stage I, the ablation)
    generator: OptimConfig = OptimConfig(lr=3e-4, betas=(0.0, 0.99))
    discriminator: OptimConfig = OptimConfig(lr=3e-4, betas=(0.0, 0.99))
    heads_lr: Rate = 6e-4


class EvaluationSettings(Config):
    """How stages are measured: one-step streaming from first frames held out of training."""

    every: Annotated[int, Field(ge=0)] = 50  # steps between measurements of a stage; 0 is only at its end
    clips: Count = 128  # clips in such a measurement
    final_clips: Count = 512  # clips in a stage's last one
    batch: Count = 128
    long: Count = 3  # the long measurement is this many times the trained length
    show: Count = 8  # clips kept for the report


class Recipe(Config):
    """A whole run."""

    recipe: Literal["digits", "clips"] = "digits"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DigitsData | ClipsData = DigitsData()
    teacher: Literal["neural", "exact"] = "neural"  # whom stages I and II distil
    chunks: tuple[Count, ...] = (1, 4, 4, 4)
    window: Count = 9  # frames in view, the sink and the chunk itself counted
    sink: Annotated[int, Field(ge=0)] = 1
    levels: tuple[Share, ...] = (1.0,)  # noise levels of the student's passes per chunk: (1,) is one step, (1, 0.8333) two
    first_levels: tuple[Share, ...] | None = None  # those of the first generated chunk, if others
    network: NetworkSettings = NetworkSettings()
    pretrain: PretrainSettings = PretrainSettings()
    ode: OdeSettings = OdeSettings()
    dmd: DmdSettings = DmdSettings()
    # Further generator steps of stage II: the control for stage III, which takes as long.
    dmd_continued: Annotated[int, Field(ge=0)] = 0
    adversarial: AdversarialSettings = AdversarialSettings()
    evaluate: EvaluationSettings = EvaluationSettings()
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.chunks[0] != 1:
            raise ValueError(f"chunks must start with the first frame's own chunk of 1, got {list(self.chunks)}")
        Window(self.window, self.sink)
        StepPlan(self.first_levels or self.levels, self.levels)
        if self.window < self.sink + max(self.chunks):
            raise ValueError(f"window must hold the sink and a chunk, {self.sink + max(self.chunks)} frames, got {self.window}")
        if self.teacher == "exact" and self.recipe != "digits":
            raise ValueError("teacher can be exact only for digits; a folder of videos has no known law")
        if any(layer >= self.network.layers for layer in self.adversarial.layers):
            raise ValueError(f"adversarial.layers must be blocks below {self.network.layers}, got {list(self.adversarial.layers)}")
        for name in ("pretrain", "ode", "dmd", "adversarial"):
            stage = getattr(self, name)
            if stage.batch % stage.accumulate:
                raise ValueError(f"{name}.accumulate must divide {name}.batch {stage.batch}, got {stage.accumulate}")
        return self

    @property
    def frames(self) -> int:
        """Latent frames of a training clip."""
        return sum(self.chunks)


def digits() -> Recipe:
    """Moving digits on a torus."""
    return Recipe()


def clips() -> Recipe:
    """A folder of videos: ``data.path=FOLDER``."""
    network = NetworkSettings(patch=2, torus_rope=False)
    return Recipe(recipe="clips", data=ClipsData(), network=network)


RECIPES = {"digits": digits, "clips": clips}

# The two sizes of the demo, as settings of the digits recipe. "full" is the recipe and the control, "quick" about a third of it.
PROFILES: dict[str, list[str]] = {
    "quick": [
        "pretrain.steps=900",
        "ode={steps: 250, pairs: 384}",
        "dmd.steps=90",
        "dmd_continued=70",
        "adversarial={steps: 60, discriminator_first: 15}",
        "evaluate={every: 30, clips: 64, final_clips: 128}",
    ],
    "full": ["dmd_continued=290"],
}
