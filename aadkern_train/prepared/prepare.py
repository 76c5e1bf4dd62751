"""Captions and videos to a prepared folder: all texts first, then all latents, so that one large model is in memory at a time.

A job makes its shards one after another and may be killed anywhere: what is finished is not made again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.processes import device_of
from aadkern_train.engine.run_folder import Progress
from aadkern_train.networks.hub import ENCODERS, hub_folder
from aadkern_train.networks.wan_parts import Encoders, find_encoders, load_part
from aadkern_train.prepared import lineage, videos
from aadkern_train.prepared.format import Writer
from aadkern_train.prepared.layout import NULLS, split_of
from aadkern_train.prepared.settings import PATCH, PrepareSettings, estimate, header
from aadkern_train.prepared.sources import Entry, Source, read_source
from aadkern_train.prepared.summary import summary

LARGEST = 100.0  # in size: normalised latents of real videos stay below 10
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare(source: Path, out: Path, wan: Path, settings: PrepareSettings | None = None) -> int:
    """Makes this job's shards of the data set ``out`` from ``source`` with the VAE, text encoder and tokenizer of a Wan folder in
    diffusers' format. A bad item is skipped, with its reason in the shard's lines; returns how many of the job's are good.

    Raises ValueError or FileNotFoundError, before weights are loaded, for settings, parts and sources that do not fit, and for a
    folder that was begun with others; with ``strict`` at the first bad item; and where no item is left.
    """
    settings = settings or PrepareSettings()
    device = device_of(settings.device)
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("preparing needs transformers: pip install 'aadkern[wan]'")
    encoders = find_encoders(hub_folder(wan, "wan", ENCODERS))
    settings.check_size(encoders)
    listing = read_source(source, settings.columns, settings.clips_per_video, settings.limit)
    rows = None if listing.lmdb is None else _rows(listing.lmdb, encoders)
    if settings.strict:
        for entry in listing.entries:
            _refuse(entry, entry.problem)
    text_dtype = settings.text_dtype or ("bf16" if device.type == "cuda" else "fp32")
    writer = Writer(out, header(settings, encoders, listing, text_dtype, rows))
    job = Job(settings, encoders, listing, rows, writer, device, TORCH_DTYPES[text_dtype])
    job.tell_size()
    job.run()
    text, good = summary(out, writer.header, job.shards)
    print(text, flush=True)
    if job.shards and not good:
        raise ValueError(f"nothing is left of {source}: see the reasons above, or the lines of {out}/shard-*.jsonl")
    return good


class Job:
    """The shards of one part, and what makes them."""

    def __init__(
        self,
        settings: PrepareSettings,
        encoders: Encoders,
        source: Source,
        rows: lineage.Rows | None,
        writer: Writer,
        device: torch.device,
        text_dtype: torch.dtype,
    ) -> None:
        from aadkern.wan.text import load_tokenizer

        self.settings, self.encoders, self.source, self.rows, self.writer = settings, encoders, source, rows, writer
        self.device, self.text_dtype = device, text_dtype
        self.tokenizer = load_tokenizer(encoders.tokenizer)
        i, n = settings.part
        self.shards = range(i - 1, writer.header["shards"], n)

    def tell_size(self) -> None:
        """How much there is to do, and what it takes on the disk."""
        needed = estimate(self.source, self.encoders, self.settings, self.rows)
        free = shutil.disk_usage(self.writer.folder).free
        share = f", a part of {self.settings.part[1]} in this job" if self.settings.part[1] > 1 else ""
        _say(
            f"{len(self.source.entries)} items in {self.writer.header['shards']} shards: about {_bytes(needed)}{share}; "
            f"{_bytes(free)} are free in {self.writer.folder}" + (", too few" if free < needed / self.settings.part[1] else "")
        )

    def run(self) -> None:
        todo = [shard for shard in self.shards if not self.writer.done(shard)]
        if len(todo) < len(self.shards):
            _say(f"{len(self.shards) - len(todo)} of {len(self.shards)} shards are finished already")
        self._make_texts(todo)
        if self.source.kind == "prompts" or self.rows is not None:
            vae = None
        elif todo:
            from diffusers import AutoencoderKLWan

            vae = load_part(AutoencoderKLWan, self.encoders.vae, torch.float32).eval().requires_grad_(False).to(self.device)
        total = sum(len(self._entries(shard)) for shard in todo)
        done = 0
        with Progress("latents" if self.source.kind == "clips" else "lines", total) as progress:
            for shard in todo:
                tokens = self._tokens(shard)
                texts = self.writer.texts(shard, {name: len(ids) for name, (ids, _) in tokens.items()})
                if texts is None:
                    raise ValueError(f"shard {shard} of {self.writer.folder} was changed by others while it was made; begin again")
                latents: dict[str, Tensor] = {}
                records = []
                for entry in self._entries(shard):
                    records.append(self._record(entry, tokens, texts, latents, vae))
                    done += 1
                    progress.update(done)
                self.writer.write(shard, texts, latents, records)

    def _entries(self, shard: int) -> Sequence[Entry]:
        return self.source.entries[shard * self.settings.per_shard :][: self.settings.per_shard]

    def _tokens(self, shard: int) -> dict[str, tuple[list[int], bool]]:
        """Of each item that is not known to be bad: its tokens, and whether some were cut off."""
        from aadkern.wan.text import tokens_of

        return {entry.id: tokens_of(self.tokenizer, entry.caption) for entry in self._entries(shard) if not entry.problem}

    def _make_texts(self, shards: Sequence[int]) -> None:
        """The texts of shards that have none yet, and the null texts."""
        from aadkern.wan.text import tokens_of

        nulls = {name: tokens_of(self.tokenizer, prompt)[0] for prompt, name in NULLS.items()}
        missing = []
        for shard in shards:
            counts = {name: len(ids) for name, (ids, _) in self._tokens(shard).items()}
            if self.writer.texts(shard, counts) is None:
                missing.append((shard, len(counts)))
        have_nulls = self.writer.has_null({name: len(ids) for name, ids in nulls.items()})
        if missing or not have_nulls:
            self._embed(missing, {} if have_nulls else nulls)
        gc.collect()  # the text encoder, before the VAE comes
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _embed(self, missing: Sequence[tuple[int, int]], nulls: dict[str, list[int]]) -> None:
        from aadkern.wan.text import embed, load_text_encoder

        encoder = load_text_encoder(self.encoders.text_encoder, self.text_dtype, self.device)

        def text(ids: list[int]) -> Tensor:
            return embed(encoder, ids)[0, : len(ids)].bfloat16().cpu()

        if nulls:
            self.writer.write_null({name: text(ids) for name, ids in nulls.items()})
        done = 0
        with Progress("texts", sum(count for _, count in missing)) as progress:
            for shard, _ in missing:
                texts: dict[str, Tensor] = {}
                same: dict[tuple[int, ...], Tensor] = {}  # the clips of a video have one caption
                for name, (ids, _) in self._tokens(shard).items():
                    key = tuple(ids)
                    same[key] = same[key] if key in same else text(ids)
                    texts[name] = same[key].clone()
                    done += 1
                    progress.update(done)
                self.writer.write_texts(shard, texts)

    def _record(
        self,
        entry: Entry,
        tokens: dict[str, tuple[list[int], bool]],
        texts: dict[str, Tensor],
        latents: dict[str, Tensor],
        vae: Any,
    ) -> dict[str, Any]:
        """An item's line; its latents go to ``latents``."""
        line: dict[str, Any] = {"id": entry.id, "caption": entry.caption, "source": entry.source}
        problem, more = entry.problem, {}
        if not problem and not texts[entry.id].isfinite().all():
            problem = "text not finite"
        if not problem and self.source.kind == "clips":
            try:
                item_latents, more = self._latents(entry, vae)
                latents[entry.id] = item_latents
            except BadItem as reason:
                problem = str(reason)
        if problem:
            _refuse(entry, problem if self.settings.strict else "")
            return {**line, "ok": False, "reason": problem}
        cut = {"cut": True} if tokens[entry.id][1] else {}
        return {**line, "ok": True, "split": split_of(entry.group), **more, **cut}

    def _latents(self, entry: Entry, vae: Any) -> tuple[Tensor, dict[str, Any]]:
        """fp16 [F, C, H, W] and what to tell of them. Raises BadItem."""
        facts: dict[str, Any] = {}
        try:
            if self.rows is not None:
                assert entry.row is not None
                latents = self.rows.latents(entry.row).float()
            else:
                frames, facts = self._frames(entry)
        except ValueError as error:
            raise BadItem(str(error)) from error
        if self.rows is None:
            from aadkern.wan.vae import encode_video

            video = frames.to(self.device).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            with exactly(self.device):
                latents = encode_video(vae, video)[0].transpose(0, 1).contiguous()
        largest = float(latents.abs().max())
        if not largest <= LARGEST:  # of a NaN too
            raise BadItem(f"latents out of range: {largest:g} in size, of at most {LARGEST:g}")
        half = latents.half().cpu()
        moments = {"mean": round(float(half.double().mean()), 4), "std": round(float(half.double().std()), 4)}
        return half, {**facts, **moments}

    def _frames(self, entry: Entry) -> tuple[Tensor, dict[str, Any]]:
        settings, file = self.settings, entry.file
        assert file is not None
        if entry.image:
            frames, facts = videos.read_picture(file, settings.size), {}
        else:
            start = entry.start
            if settings.clips_per_video > 1:
                draw = float(Draws(0, "prepare", entry.source).uniform("start", [entry.clip]))
                span = settings.frames / settings.fps
                start = videos.clip_start(file, entry.clip, settings.clips_per_video, span, start, entry.end, draw)
            frames = videos.read_frames(file, settings.size, settings.fps, settings.frames, start, entry.end)
            facts = {"start": round(start, 6), **({"still": True} if videos.still(frames) else {})}
        if videos.blank(frames):
            raise ValueError("blank: its pixels vary by less than 1 of 255")
        return frames, facts


def exactly(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Convolutions in fp32, and the same each time: by default cuDNN rounds what they multiply to TF32, of 10 bits."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


class BadItem(Exception):
    """Why an item cannot be prepared."""


def _refuse(entry: Entry, problem: str) -> None:
    if problem:
        raise ValueError(f"item {entry.id!r} must be usable with strict: {problem}")


def _rows(lmdb: Path, encoders: Encoders) -> lineage.Rows:
    rows = lineage.Rows(lmdb)
    for folder, (_, _, channels, *sides) in rows.shapes.items():
        if channels != encoders.channels or any(side % PATCH for side in sides):
            wanted = f"{encoders.channels} channels, the VAE's, and even sides"
            raise ValueError(f"source must have latents of {wanted}, {folder} has {channels} channels and sides of {sides}")
    return rows


def _bytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
