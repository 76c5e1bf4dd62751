"""The settings of a whole run: ``Recipe``, and what every stage has. Those of one kind of stage or world stand in its own file.

The recipes themselves, with their figures and reasons, are in ``recipes/``.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from aadkern.plans import Window
from aadkern_train.diffusion.steps import Spacing, StepPlan, fewer
from aadkern_train.engine.config import Choice, Config, one_of
from aadkern_train.engine.work import Member, Sizes, Work

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


RESERVED = ("real", "static", "web", "teacher", "random")
"""What a run's folder calls other clips and weights beside those of its stages."""


MAY_CHANGE = ("parallel", "trackers", "checkpoint_async")
"""Settings that a resumed run may have otherwise: none changes what is learned."""


class NetworkSettings(Config):
    """The shape of the networks that a run makes for itself."""

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


class LoraSettings(Config):
    """Small adapters on one frozen network, in place of whole networks that learn: y = W x + alpha / rank B A x."""

    rank: Count = 64
    alpha: Rate = 64.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class ModelsSettings(Config):
    """Where a role's network comes from: the name of an earlier stage, or a folder in diffusers' format."""

    generator: str | None = None  # what a stage without a start begins with; None: a random network of the shape ``network``
    teacher: str = "pretrain"  # whom stages I and II distil; "exact" is the world's own denoiser
    given: Literal["clean", "noised"] = "clean"  # how the teacher was trained to see a given first frame (Wan's T2V: noised)
    fake: str | None = None  # what the fake score starts from; None: the teacher, or the generator where that is exact
    discriminator: str | None = None  # the discriminator's backbone; None: the teacher, or "pretrain" where that is exact
    teacher_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # what the teacher is kept in; auto: bf16 on CUDA, fp32 on a CPU
    offload_teacher: bool = False  # keep the teacher in host memory, block by block over to the GPU: CUDA only
    keep_gathered: bool = False  # gather a generator once a step, not block by block in each pass: its whole for less traffic
    lora: LoraSettings | None = None  # generator and fake score learn as adapters on the teacher; not the paper's way

    @property
    def backbone(self) -> str:
        """The source of a bidirectional discriminator."""
        return self.discriminator or ("pretrain" if self.teacher == "exact" else self.teacher)

    def score(self, start: str | None) -> str | None:
        """The source of a fake score for a generator that started from ``start``."""
        return self.fake or (start if self.teacher == "exact" else self.teacher)

    @property
    def distilled(self) -> tuple[Member, ...]:
        """The teacher as a network of a stage; none where it is exact."""
        fp32 = self.teacher_dtype == "fp32"
        return (
            ()
            if self.teacher == "exact"
            else (Member("teacher", self.teacher, learns=False, fp32=fp32, offloaded=self.offload_teacher),)
        )


class WorldSettings(Choice):
    """Base of the settings of a kind of world; each stands beside its world, with how that is opened."""

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError, naming the setting, where the recipe asks for what the world does not have."""

    def fits(self, world: Any, recipe: Recipe) -> None:
        """Raises ValueError, naming the setting, where the opened world cannot give what the recipe asks for."""

    @property
    def words(self) -> bool:
        """Whether its clips have captions."""
        return False

    def sizes(self, recipe: Recipe) -> Sizes | None:
        """The shapes of frames and texts, where the settings tell them before the world is opened."""
        return None

    @abstractmethod
    def open(self, *, frames: int, seed: int, folder: Path, clips: bool = True) -> Any:
        """The world of these settings (``worlds.base.World``), for training clips of ``frames``; what it must keep lies in
        ``folder``. Without ``clips`` it need not be able to give any: for streaming into a world whose data are elsewhere."""


class StageSettings(Choice):
    """What every stage has. ``kind`` says which stage it is, ``start`` the earlier stage whose weights its network takes."""

    adapts: ClassVar[bool] = False  # whether its networks are made by roles, and so may be adapters on one base (models.lora)
    start: str | None = None  # None: a network of its own
    title: str | None = None  # how reports call it; None: as its kind does
    versus: str | None = None  # a stage beside which reports set it: its control
    steps: Whole = 100  # optimiser steps of the stage's main network; 0 leaves the stage out
    batch: Count = 16  # clips per step over all processes
    accumulate: Count = 1  # parts that a batch is computed in, one after another
    ema: Decay = 0.98
    clip: Rate = 1.0  # total norm of a gradient
    replay: bool = False  # take a rollout's gradient chunk by chunk: the memory of one chunk for one more forward
    checkpointing: Literal["none", "blocks"] = "none"  # "blocks": backwards recompute each block, and keep its input alone

    def check(self, name: str, recipe: Recipe) -> None:
        """Raises ValueError, naming the setting, where stage ``name`` does not fit the recipe."""
        if self.batch % self.accumulate:
            raise ValueError(f"{name}.accumulate must divide {name}.batch {self.batch}, got {self.accumulate}")
        guidance = getattr(self, "guidance", 1.0)  # of the stages that have a teacher
        if guidance != 1 and not recipe.data.words:
            raise ValueError(f"{name}.guidance must be 1 in a world without captions, which has no null text, got {guidance}")

    def work(self, recipe: Recipe) -> Work | None:
        """What a step computes and keeps, by which ``aad plan`` counts. None: the stage does not tell."""
        return None


class EvaluationSettings(Config):
    """How stages are measured: streams under conditions held out of training."""

    every: Whole = 50  # steps between measurements of a stage; 0 is only at its end
    clips: Count = 128  # clips in such a measurement
    final_clips: Whole = 512  # clips in a stage's last one; 0 leaves measuring out
    batch: Count = 128
    long: Count = 3  # the long measurement is this many times the trained length
    lengths: tuple[Count, ...] = ()  # shorter ones, in the same unit, at which the long clips are measured on the way
    show: Count = 8  # clips kept for the report
    teacher_steps: Count = 16  # network passes of the teacher's own samples, beside which the stages are shown
    steps: tuple[Count, ...] = ()  # passes a chunk, fewer than the levels, in which a stage is measured at its end as well

    @property
    def wanted(self) -> int:
        """The most held-out clips that a measurement takes."""
        return max(self.clips if self.every else 0, self.final_clips)


class ValidationSettings(Config):
    """Videos at fixed prompts while a stage trains; for runs on prepared data."""

    path: str | None = None  # a folder of `aad prepare`: prompts, or images with prompts for image to video
    every: Whole = 50  # steps between them; 0 is only at a stage's end
    seeds: Count = 1  # videos a prompt
    chunks: Count | None = None  # how many chunks are streamed; None: a training clip's


class ParallelSettings(Config):
    """How processes share a run; what is trained does not depend on it, to rounding, and a resumed run may have others."""

    sequence: Count = 1  # neighbouring processes that share each clip's tokens (Ulysses); they divide the batch no further
    replicate: Count = 1  # groups of processes that each hold whole networks, sharded within (HSDP)
    timeout_minutes: Rate = 30.0  # how long a process waits for another before it ends; stages' longest measuring included


class Recipe(Config):
    """A whole run."""

    opened: ClassVar[str] = "stages"

    recipe: str = "digits"  # the recipe that this one was made from
    plugins: tuple[str, ...] = ()  # Python files that register stages or worlds of one's own
    seed: Whole = 0
    task: Literal["i2v", "t2v"] = "i2v"  # image to video: a first frame is given; text to video: none is
    data: one_of(WorldSettings)  # type: ignore[valid-type]
    chunks: tuple[Count, ...] = (1, 4, 4, 4)
    window: Count = 9  # frames in view, the sink and the chunk itself counted
    sink: Whole = 1
    levels: tuple[Share, ...] = (1.0,)  # noise levels of the student's passes per chunk: (1,) is one step, (1, 0.8333) two
    first_levels: tuple[Share, ...] | None = None  # those of the first generated chunk, if others
    spacing: Spacing = "prefix"  # which of them fewer steps run: the first ones, or evenly spaced ones
    network: NetworkSettings = NetworkSettings()
    models: ModelsSettings = ModelsSettings()
    stages: dict[str, one_of(StageSettings)] = {}  # type: ignore[valid-type]  # noqa: RUF012
    evaluate: EvaluationSettings = EvaluationSettings()
    validation: ValidationSettings = ValidationSettings()
    parallel: ParallelSettings = ParallelSettings()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()  # mirrors of log.jsonl
    checkpoint_every: Count = 100
    checkpoint_async: bool = False  # write checkpoints while training goes on, from a copy in host memory
    keep_checkpoints: Count = 2

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        if self.task == "i2v" and (self.chunks[:1] != (1,) or len(self.chunks) < 2):
            raise ValueError(f"chunks must start with the first frame's own chunk of 1 and have another, got {list(self.chunks)}")
        if not self.chunks:
            raise ValueError("chunks must have at least one chunk, got none")
        _ = self.view, self.steps  # each says what it does not accept; no assert, which python -O leaves out
        for name, levels in (("levels", self.levels), ("first_levels", self.first_levels)):
            if levels is not None and levels[:1] != (1.0,):
                raise ValueError(f"{name} must start at 1, as rollouts start from noise alone, got {list(levels)}")
        if self.window < self.sink + max(self.chunks):
            raise ValueError(f"window must hold the sink and a chunk, {self.sink + max(self.chunks)} frames, got {self.window}")
        self.data.check(self)
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not name.isidentifier() or name in RESERVED or name.endswith("_long"):
                other = f"other names than {', '.join(RESERVED)}, none that ends in _long"
                raise ValueError(f"stages must have plain names (letters, digits, _), {other}, got {name!r}")
            if stage.start == name or (stage.start in self.stages and stage.start not in earlier):
                where = "itself" if stage.start == name else "a later stage"
                raise ValueError(f"{name}.start must be an earlier stage ({_listed(earlier)}), got {stage.start!r}, {where}")
            if stage.start is not None and stage.start not in self.stages and "/" not in stage.start:
                raise ValueError(f"{name}.start must be an earlier stage ({_listed(earlier)}) or a folder, got {stage.start!r}")
            if stage.versus is not None and stage.versus not in self.stages:
                raise ValueError(f"{name}.versus must be a stage ({_listed(list(self.stages))}), got {stage.versus!r}")
            stage.check(name, self)
            earlier.append(name)
        for count in self.evaluate.steps:
            if count >= len(self.levels) or self.evaluate.steps.count(count) > 1:
                most = f"different counts below {len(self.levels)}, the levels that a stage is measured at anyway"
                raise ValueError(f"evaluate.steps must be {most}, got {list(self.evaluate.steps)}")
        lengths, long = self.evaluate.lengths, self.evaluate.long
        if len(set(lengths)) < len(lengths) or not all(1 < times < long for times in lengths):
            raise ValueError(f"evaluate.lengths must be different counts between 1 and evaluate.long, {long}, got {list(lengths)}")
        self._check_lora()
        return self

    def _check_lora(self) -> None:
        """Adapters stand on one network: every role's, from the first stage on."""
        models = self.models
        if models.lora is None:
            return
        if models.generator in (None, *self.stages) or models.generator != models.teacher:
            came = f"models.generator {models.generator!r}, models.teacher {models.teacher!r}"
            raise ValueError(f"models.lora must have models.generator and models.teacher name one folder, its base, got {came}")
        if models.fake is not None:
            raise ValueError(f"models.fake must be null with models.lora, whose base the fake score stands on, got {models.fake!r}")
        if models.offload_teacher:
            raise ValueError("models.offload_teacher must be false with models.lora, whose base all roles compute with, got true")
        for name, stage in self.stages.items():
            if not stage.steps:
                continue
            if not stage.adapts:
                raise ValueError(f"{name}.steps must be 0 with models.lora, as {name} trains a whole network, got {stage.steps}")
            origin = self.trained(stage.start) if stage.start else None
            if origin not in (None, models.generator, *self.stages):
                raise ValueError(f"{name}.start must be an earlier stage or models.generator with models.lora, got {stage.start!r}")

    @property
    def frames(self) -> int:
        """Latent frames of a training clip."""
        return sum(self.chunks)

    @property
    def given_frames(self) -> int:
        """Frames that are given and not generated: 1 for image to video, 0 for text to video."""
        return 1 if self.task == "i2v" else 0

    @property
    def generated_chunks(self) -> tuple[int, ...]:
        """Sizes of the chunks that are generated."""
        return self.chunks[1:] if self.task == "i2v" else self.chunks

    @property
    def view(self) -> Window:
        """What a chunk sees."""
        return Window(self.window, self.sink)

    @property
    def steps(self) -> StepPlan:
        """The student's noise levels."""
        return StepPlan(self.first_levels or self.levels, self.levels)

    def steps_of(self, count: int, first: int | None = None) -> StepPlan:
        """The same in ``count`` passes a chunk: some of the levels, by ``spacing``. The first generated chunk has ``first`` passes;
        None: all of its own levels, where it has some (first-frame enhancement), else ``count``.

        Raises ValueError for more passes than levels.
        """
        rest, own = fewer(self.levels, count, self.spacing), self.first_levels or self.levels
        if first is None:
            first = count if self.first_levels is None else len(own)
        return StepPlan(fewer(own, first, self.spacing, "first_steps"), rest)

    def trained(self, source: str) -> str | None:
        """The stage that really gives a start's weights: a stage of 0 steps is left out, so what starts from it starts where it
        would have. None: a network of its own."""
        stage: Any = self.stages.get(source)
        if stage is None or stage.steps > 0:
            return source
        return None if stage.start is None else self.trained(stage.start)

    def origin(self, source: str | None) -> str | None:
        """The folder in which a source's first weights lie, whose shape it has; ``<stage>.<learner>`` as it is. None: the run's own
        random network."""
        for _ in self.stages:  # not recursion: a stage that starts from itself is told of later
            stage: Any = self.stages.get(source)
            source = source if stage is None else stage.start
        return self.models.generator if source is None else source


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "there is none"
