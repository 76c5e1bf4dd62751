"""The folder of prepared data: what is written is what is read, by position, and nothing broken is read as whole."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aadkern_train.prepared import shards
from aadkern_train.prepared.format import Prepared, Writer, padded
from aadkern_train.prepared.layout import NEGATIVE, split_of

C, D = 5, 7
NAMES = [["b", "ünï/a b", "c"], ["z0", "z1"]]


def make(folder: Path, kind: str = "clips", again: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Two shards of random items, one of them bad; returns what was written, by what and id. ``again``: what is done is kept."""
    writer = Writer(folder, {"kind": kind, "shards": len(NAMES), "size": (32, 48)})
    wrote: dict[str, dict[str, torch.Tensor]] = {"text": {}, "latents": {}}
    for shard, names in enumerate(NAMES):
        texts = {name: torch.randn(2 + i, D).bfloat16() for i, name in enumerate(names)}
        lead = (3,) if kind == "pairs" else ()
        latents = {name: torch.randn(*lead, 4 + i, C, 3, 2).half() for i, name in enumerate(names)}
        records = [{"id": name, "ok": True, "split": split_of(name), "caption": f"{name} \u2028 雪"} for name in names]
        bad = {"id": "b", "ok": False, "reason": "no caption \udc80"}  # of a file's name that is no Unicode
        assert again or not writer.done(shard)
        if not writer.done(shard):
            writer.write(shard, texts, {} if kind == "prompts" else latents, [bad, *records])
        assert writer.done(shard)
        wrote["text"] |= texts
        wrote["latents"] |= latents
    writer.write_null({"negative": torch.randn(3, D).bfloat16(), "empty": torch.randn(1, D).bfloat16()})
    return wrote


@pytest.mark.parametrize("kind", ["clips", "prompts", "pairs"])
def test_round_trip(tmp_path, kind):
    wrote = make(tmp_path, kind)
    data = Prepared(tmp_path)
    assert data.kind == kind and data.header["size"] == [32, 48]
    assert [item.id for item in data.items] == NAMES[0] + NAMES[1]
    assert [item.shard for item in data.items] == [0, 0, 0, 1, 1]
    assert [record["reason"] for record in data.skipped] == ["no caption \udc80"] * 2
    for item in data.items:
        place = NAMES[item.shard].index(item.id)
        assert item.caption == f"{item.id} \u2028 雪" and item.split == split_of(item.id) and item.tokens == 2 + place
        assert torch.equal(data.text(item), wrote["text"][item.id]) and data.text(item).dtype is torch.bfloat16
        if kind == "prompts":
            assert item.bucket is None
            with pytest.raises(ValueError, match=r"latents must be of clips or pairs, .* holds prompts; item '.+' has none"):
                data.latents(item)
            continue
        assert item.bucket == (4 + place, 3, 2)
        for frames in (None, 1, 3, 4 + place):
            for _ in range(2):
                expected = wrote["latents"][item.id]
                expected = expected[:, :frames] if kind == "pairs" else expected[:frames]
                assert torch.equal(data.latents(item, frames), expected) and expected.dtype is torch.float16
        for frames in (0, 5 + place):
            with pytest.raises(ValueError, match=rf"frames must lie in \[1, {4 + place}\] for item '.+', got {frames}"):
                data.latents(item, frames)
    assert data.null("").shape == (1, D) and data.null(NEGATIVE).shape == (3, D) and torch.equal(data.null("empty"), data.null(""))
    with pytest.raises(ValueError, match=r"null must be one of empty, negative, as .* got 'a cat'"):
        data.null("a cat")
    assert hash(data.items[0])


def test_files_are_plain_safetensors_and_lines(tmp_path):
    wrote = make(tmp_path)
    for shard, names in enumerate(NAMES):
        for what, tensors in wrote.items():
            held = load_file(tmp_path / f"shard-{shard:05d}.{what}.safetensors")
            assert held.keys() == set(names) and all(torch.equal(held[name], tensors[name]) for name in names)
        lines = [json.loads(line) for line in (tmp_path / f"shard-{shard:05d}.jsonl").read_text().split("\n")[:-1]]
        for line in lines[1:]:
            for what, told in line["crc32"].items():
                assert int(told, 16) == zlib.crc32(wrote[what][line["id"]].view(torch.int16).numpy().tobytes())
    assert not list(tmp_path.glob("*.tmp"))
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "dataset.json").stat().st_mode}


def test_the_same_content_has_the_same_bytes_and_fingerprint(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(5)
        make(tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    first = Prepared(tmp_path / "a").fingerprint
    assert first == Prepared(tmp_path / "b").fingerprint and len(first) == 32
    line = tmp_path / "b/shard-00001.jsonl"
    line.write_text(line.read_text().replace('"caption": "z1', '"caption": "z2'))
    assert Prepared(tmp_path / "b").fingerprint != first
    header = tmp_path / "a/dataset.json"
    header.write_text(header.read_text().replace("48", "64"))
    assert Prepared(tmp_path / "a").fingerprint != first


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_only_the_bytes_that_are_asked_for_are_read(tmp_path, monkeypatch):
    make(tmp_path, "pairs")
    data = Prepared(tmp_path)
    item = data.items[1]
    data.latents(item, 1)
    read, opened = [], []
    preadv, open_file = os.preadv, os.open
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    monkeypatch.setattr(os, "open", lambda *args: opened.append(open_file(*args)) or opened[-1])
    data.latents(item, 2)
    assert sum(read) == 3 * 2 * C * 3 * 2 * 2
    for file in opened:
        with pytest.raises(OSError):
            os.fstat(file)
    sums = []
    crc32 = zlib.crc32
    monkeypatch.setattr(zlib, "crc32", lambda held: sums.append(1) or crc32(held))
    for _ in range(3):
        data.latents(item)
    assert len(sums) == 1  # a checksum is compared once


def test_short_reads_are_continued(tmp_path, monkeypatch):
    wrote = make(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, start: preadv(file, [views[0][:3]], start))
    data = Prepared(tmp_path)
    assert torch.equal(data.latents(data.items[4]), wrote["latents"]["z1"])


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 0x10
    file.write_bytes(content)


def test_damage_is_told_with_item_shard_and_command(tmp_path):
    make(tmp_path)
    for what in ("text", "latents"):
        flip(tmp_path / f"shard-00001.{what}.safetensors", -3)
    flip(tmp_path / "null.safetensors", -1)
    data = Prepared(tmp_path)
    last = data.items[-1]
    assert data.latents(last, 1).shape[0] == 1  # the damage is further on, and a part is not checked
    for read in (data.latents, data.text):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"item 'z1' of shard 1 is damaged: .*`rm .*shard-00001.jsonl`, then `aad prepare`"
            ):
                read(last)
    with pytest.raises(ValueError, match=r"null.safetensors is damaged: 'negative'"):
        data.null(NEGATIVE)


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
def test_truncated_files(tmp_path, cut):
    make(tmp_path)
    data, file = Prepared(tmp_path), tmp_path / "shard-00000.latents.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"shard-00000\.latents\.safetensors (is cut off|must be a safetensors file)"):
        data.latents(data.items[0])
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.latents\.safetensors is missing"):
        data.latents(data.items[0])


def test_a_file_cut_off_after_its_header_was_read(tmp_path):
    make(tmp_path)
    data, file = Prepared(tmp_path), tmp_path / "shard-00001.latents.safetensors"
    data.latents(data.items[-1])
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(ValueError, match="is cut off: nothing at byte"):
        data.latents(data.items[-1])


def test_foreign_tensors(tmp_path):
    wrote = make(tmp_path)
    data, file = Prepared(tmp_path), tmp_path / "shard-00001.latents.safetensors"
    z1 = wrote["latents"]["z1"]
    for held, says in (
        ({"z0": z1}, r"must hold 'z1', and does not"),
        ({"z1": z1[:-1]}, r"must hold 'z1' with frames, rows and columns \(5, 3, 2\) in fp16, it holds \[4, 5, 3, 2\]"),
        ({"z1": z1.bfloat16()}, r"in fp16, it holds \[5, 5, 3, 2\] in torch.bfloat16"),
        ({"z1": z1.float()}, "must hold fp16 and bf16 tensors, it holds z1 as"),
        ({"z1": z1[None]}, r"in fp16, it holds \[1, 5, 5, 3, 2\]"),
    ):
        save_file({name: tensor.contiguous() for name, tensor in held.items()}, file)
        with pytest.raises(ValueError, match=says):
            Prepared(tmp_path).latents(data.items[-1])
    for header in (b"[]", b"{", b'{"z1": {"dtype": "F16"}}', b'{"z1": {"dtype": "F16", "shape": [1], "data_offsets": [0, 8]}}'):
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        with pytest.raises(ValueError, match=r"must be a safetensors file|must hold fp16"):
            Prepared(tmp_path).latents(data.items[-1])


def test_folders_that_are_no_finished_data_set(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder of prepared data, it has no dataset\.json"):
        Prepared(tmp_path)
    make(tmp_path)
    header = json.loads((tmp_path / "dataset.json").read_text())
    for change, says in (
        ({"version": 2}, r"dataset\.json must be of version 1, which this aadkern reads, got 2"),
        ({"format": None}, "must describe aadkern prepared data, it has format None"),
        ({"kind": "images"}, "must have a kind of clips, prompts, pairs, got 'images'"),
        ({"shards": 0}, "must have shards, a count of at least 1, got 0"),
        ({"shards": 3}, r"1 of its 3 shards are missing \(shard-00002.jsonl\): run `aad prepare` to its end"),
        ({"shards": 1}, r"must hold 1 shards, as dataset\.json says, it holds shard-00001\.jsonl too"),
    ):
        (tmp_path / "dataset.json").write_text(json.dumps({**header, **change}))
        with pytest.raises(ValueError, match=says):
            Prepared(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps(header))
    file = tmp_path / "shard-00001.jsonl"
    whole = file.read_bytes()
    for content, says in (
        (whole[:-1], "must hold JSON lines, line|must end with a whole line"),
        (whole.replace(b"{", b"[", 1), "must hold JSON lines, line 1 is none"),
        (whole.replace(b'"ok": true', b'"ok": 1'), r"shard-00001\.jsonl, line 2, must have a right ok"),
        (whole.replace(b'"bucket": [4', b'"bucket": [0'), "line 2, must have a right bucket"),
        (whole.replace(b'"tokens"', b'"words"'), "line 2, must have a right tokens"),
        (whole.replace(b'"latents":', b'"x":'), "line 2, must have a right crc32"),
        (whole.replace(b'"z1"', b'"c"'), r"must hold new items, 'c' is in .*shard-00000\.jsonl already"),
    ):
        assert content != whole
        file.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            Prepared(tmp_path)


def test_a_second_job_must_agree(tmp_path):
    make(tmp_path)
    header = {"kind": "clips", "shards": 2, "size": [32, 48]}
    writer = Writer(tmp_path, header)
    assert writer.done(0) and writer.done(1)
    for change, says in (
        ({"size": [32, 64]}, r"size must be \[32, 48\], as .*dataset\.json says, got \[32, 64\]"),
        ({"shards": 3}, "shards must be 2, as .* got 3"),
        ({"fps": 16}, "fps must be null, as .* got 16"),
    ):
        with pytest.raises(ValueError, match=says):
            Writer(tmp_path, {**header, **change})
    with pytest.raises(ValueError, match=r"shard must lie in \[0, 2\), got 2"):
        writer.done(2)


def test_what_does_not_fit_is_not_written(tmp_path):
    writer = Writer(tmp_path, {"kind": "clips", "shards": 1})
    text, latents = {"a": torch.randn(2, D).bfloat16()}, {"a": torch.randn(2, C, 3, 2).half()}
    record = {"id": "a", "ok": True, "split": "train", "caption": "a"}
    for arguments, says in (
        (
            ({"a": torch.randn(2, D)}, latents, [record]),
            r"texts must be torch.bfloat16 of 2 axes, got 'a' \[2, 7\] in torch.float32",
        ),
        ((text, {"a": latents["a"][0]}, [record]), "latents must be torch.float16 of 4 axes"),
        ((text, {}, [record]), "records that are ok must have their tensors, 'a' has not"),
        ((text, latents, [record, record]), r"records must have each id once, got \['a'\]"),
        ((text, latents, [{**record, "caption": None}]), "records must have a right caption"),
        ((text, latents, [{"id": "a", "ok": False}]), "records must have a right reason"),
    ):
        with pytest.raises(ValueError, match=says):
            writer.write(0, *arguments)
        assert not writer.done(0) and not list(tmp_path.glob("*.tmp"))


def test_texts_ahead_are_taken_if_they_are_whole(tmp_path):
    writer = Writer(tmp_path, {"kind": "clips", "shards": 1})
    texts = {name: torch.randn(n, D).bfloat16() for n, name in enumerate("abc", start=1)}
    counts = {name: len(text) for name, text in texts.items()}
    assert writer.texts(0, counts) is None
    writer.write_texts(0, texts)
    again = writer.texts(0, counts)
    assert again is not None and all(torch.equal(again[name], texts[name]) for name in texts) and not writer.done(0)
    for other in ({**counts, "a": 2}, {**counts, "d": 1}, {"a": 1, "b": 2}):
        assert writer.texts(0, other) is None
    file = tmp_path / "shard-00000.text.safetensors"
    flip(file, -1)
    assert writer.texts(0, counts) is None
    file.write_bytes(file.read_bytes()[:-1])
    assert writer.texts(0, counts) is None


def test_a_full_disk_leaves_the_old_and_says_what_is_needed(tmp_path, monkeypatch):
    make(tmp_path)
    before = contents(tmp_path)
    writer = Writer(tmp_path, {"kind": "clips", "shards": 2, "size": [32, 48]})

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_tensors", full)
    with pytest.raises(OSError, match=r"No space left on device; it needs 4\.2 MB: .*shard-00001\.text\.safetensors") as error:
        writer.write(1, {"a": torch.randn(512, 4096).bfloat16()}, {}, [])
    assert error.value.errno == errno.ENOSPC and contents(tmp_path) == before


def test_a_job_that_dies_at_any_durable_operation_leaves_nothing_wrong(tmp_path):
    torch.manual_seed(3)
    make(tmp_path / "whole")
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    for deaths in range(100):
        child = os.fork()
        if child == 0:
            calls = 0

            def dying(operation):
                def call(*arguments, **keywords):
                    nonlocal calls
                    calls += 1
                    if calls > deaths:  # noqa: B023 (a process of its own)
                        os._exit(9)
                    return operation(*arguments, **keywords)

                return call

            for name in ("fsync", "replace", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            torch.manual_seed(3)
            try:
                make(out, again=True)
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in out.glob("shard-*.jsonl"):
            assert all((out / name).read_bytes() == whole[name] for name in whole if name.startswith(file.stem))
        if status == 0:
            break
    assert deaths > 10 and {name: held for name, held in contents(out).items() if ".tmp" not in name} == whole


def test_half_written_files_of_dead_jobs_go(tmp_path):
    make(tmp_path)
    old, new = tmp_path / "shard-00000.text.safetensors.h-1-a.tmp", tmp_path / "shard-00001.text.safetensors.h-2-b.tmp"
    inner = tmp_path / ".tmpRd1jQr"  # safetensors' own
    for file in (old, new, inner):
        file.touch()
    os.utime(old, (1, 1))
    os.utime(inner, (1, 1))
    Writer(tmp_path, {"kind": "clips", "shards": 2, "size": [32, 48]})
    assert not old.exists() and not inner.exists() and new.exists()


def test_padding_and_splits():
    text = torch.randn(3, D).bfloat16()
    made = padded(text)
    assert made.shape == (512, D) and torch.equal(made[:3], text) and not made[3:].any() and made.dtype is text.dtype
    for wrong in (torch.randn(513, D), torch.randn(1, 3, D)):
        with pytest.raises(ValueError, match=r"text must be \[T, D\] of at most 512 tokens"):
            padded(wrong)
    names = [f"video {i}" for i in range(20000)]
    share = sum(split_of(name) == "test" for name in names) / len(names)
    assert share == pytest.approx(0.02, abs=0.004)  # four standard deviations
    held_out = ["video 11", "video 77", "video 99", "video 145", "video 198"]  # recorded once: a split stays as it was
    assert [name for name in names[:200] if split_of(name) == "test"] == held_out
