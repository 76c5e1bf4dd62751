"""``aad pairs``: a teacher's ODE trajectories from noise, for stage I, made once and kept in shards like other prepared data.

Pair i has noise of its own, a function of (seed, i), and the caption of prompt i mod n; so any job makes the same pair. The clip is
sampled whole, from noise, by its text: a text-to-video teacher never saw a clean first frame in a noisy clip.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern.plans import VideoLayout, bidirectional
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import ode_trajectory, solver_grid
from aadkern_train.diffusion.steps import are_falling
from aadkern_train.engine.processes import device_of
from aadkern_train.engine.run_folder import Progress
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.folders import inspect, load
from aadkern_train.networks.hub import hub_folder
from aadkern_train.networks.teacher import Teacher
from aadkern_train.networks.wan_parts import PIXELS
from aadkern_train.prepared.format import Item, Prepared, Writer, padded
from aadkern_train.prepared.layout import MADE_WITH
from aadkern_train.prepared.settings import digest

PER_SHARD = 8  # pairs: an hour of a GPU at 14B is what a kill can cost


@dataclass(frozen=True)
class PairSettings:
    """What pairs are made with. ``levels`` are the student's, of all chunks and 0 left out; ``frames`` and ``size`` those of the
    video: 4 f - 3 frames and pixels (rows, columns) for f latent frames of 8 x 8."""

    count: int = 3000
    levels: tuple[float, ...] = (1.0,)
    steps: int = 48
    shift: float = 5.0
    guidance: float = 5.0
    null: str = "negative"
    seed: int = 0
    frames: int = 81
    size: tuple[int, int] = (480, 832)

    def __post_init__(self) -> None:
        for name in ("count", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not are_falling(self.levels) or self.levels[0] != 1:
            raise ValueError(f"levels must fall from 1 and stay above 0, say 1,0.8333, got {list(self.levels)}")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be above 0 and finite, got {self.shift}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"frames must be 4k + 1, say 81, got {self.frames}")
        if min(self.size) < PIXELS or any(side % PIXELS for side in self.size):
            raise ValueError(f"size must be rows x columns of pixels, multiples of {PIXELS}, got {self.size[0]}x{self.size[1]}")


def make_pairs(
    wan: Path,
    prompts: Path,
    out: Path,
    settings: PairSettings,
    *,
    part: tuple[int, int] = (1, 1),
    device: str | None = None,
) -> Prepared | None:
    """Makes job ``part`` (i of n) of the pairs in ``out``: shards i - 1, i - 1 + n, ... that are not there yet. ``wan`` is the
    teacher, a Wan folder or a transformer's; ``prompts`` a folder of ``aad prepare``. Returns the finished set, None while other
    jobs' shards are missing. The teacher computes in bf16 on a GPU, in fp32 on a CPU; ``device`` None is the GPU if there is one.

    Raises ValueError for what does not fit, before any weights are loaded, and FloatingPointError for latents that are not finite.
    """
    place, (i, n) = device_of(device), part
    if not 1 <= i <= n:
        raise ValueError(f"part must be i/n with 1 <= i <= n, say 2/8, got {i}/{n}")
    source = Prepared(prompts)
    items = [item for item in source.items if item.split == "train"]
    if source.kind == "pairs" or not items:
        raise ValueError(f"prompts must be a folder of `aad prepare` with items to train on, {prompts} holds {source.kind}")
    wan = hub_folder(wan, "wan")
    transformer = wan / "transformer" if (wan / "transformer" / "config.json").is_file() else wan
    _check_teacher(transformer, source, settings)
    header = {
        "kind": "pairs",
        "shards": -(-settings.count // PER_SHARD),
        "count": settings.count,
        "levels": [*settings.levels, 0.0],
        "sigmas": solver_grid(settings.steps, settings.shift, settings.levels),
        **{name: getattr(settings, name) for name in ("steps", "shift", "guidance", "null", "seed", "frames")},
        "size": list(settings.size),
        "prompts": source.fingerprint,
        "teacher": digest(transformer),
        **{name: source.header[name] for name in MADE_WITH if name in source.header},
    }
    writer = Writer(out, header)
    mine = [shard for shard in range(i - 1, header["shards"], n) if not writer.done(shard)]
    if mine:
        _make(load(transformer), source, items, writer, mine, settings, place)
    return Prepared(out) if all(writer.done(shard) for shard in range(header["shards"])) else None


def _check_teacher(transformer: Path, source: Prepared, settings: PairSettings) -> None:
    """That a teacher can be read and takes these texts and frames, by its configuration."""
    try:
        config = inspect(transformer).config
    except ValueError as error:
        raise ValueError(f"wan must be a Wan folder or a transformer's: {error}") from None
    width = source.header.get("text_dim", config["text_dim"])
    if width != config["text_dim"]:
        raise ValueError(f"prompts must have the teacher's text_dim, {config['text_dim']}, they have {width}")
    _, rows, columns = config["patch_size"]
    height, across = settings.size
    if height % (PIXELS * rows) or across % (PIXELS * columns):
        wanted = f"multiples of {PIXELS * rows} and {PIXELS * columns}"
        raise ValueError(f"size must be rows x columns of pixels, {wanted}, got {height}x{across}")


@torch.no_grad()
def _make(
    network: Denoiser,
    source: Prepared,
    items: list[Item],
    writer: Writer,
    shards: list[int],
    settings: PairSettings,
    device: torch.device,
) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = network.eval().requires_grad_(False).to(device, dtype)
    channels = network.net.config.in_channels
    frames, (height, width) = (settings.frames + 3) // 4, (side // PIXELS for side in settings.size)
    plan = bidirectional(VideoLayout((frames,), network.tokens_per_frame(height, width)))
    null = padded(source.null(settings.null))[None].float().to(device)
    teacher = Teacher(lambda x, sigma, text: network(x, sigma, text, plan), settings.guidance, null)
    draws, grid = Draws(settings.seed, "pairs"), solver_grid(settings.steps, settings.shift, settings.levels)
    total = sum(len(_places(shard, settings.count)) for shard in shards)
    done = 0
    with Progress("pairs", total) as progress:
        for shard in shards:
            texts: dict[str, Tensor] = {}
            latents: dict[str, Tensor] = {}
            records: list[dict[str, Any]] = []
            for i in _places(shard, settings.count):
                item, name = items[i % len(items)], f"{i:06d}"
                text = source.text(item)
                condition = Condition(None, padded(text)[None].float().to(device))
                noise = draws.normal("noise", [i], (frames, channels, height, width), device=device)
                states = ode_trajectory(teacher.of(condition), noise, [*settings.levels, 0.0], grid)[0].cpu()
                if not states.isfinite().all():
                    raise FloatingPointError(f"pair {i} ({item.caption[:60]!r}) is not finite; the shards before it are whole")
                texts[name], latents[name] = text, states.half()
                records.append({"id": name, "ok": True, "split": "train", "caption": item.caption, "source": item.id})
                done += 1
                progress.update(done)
            writer.write(shard, texts, latents, records)


def _places(shard: int, count: int) -> range:
    return range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, count))
