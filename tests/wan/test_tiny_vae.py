"""The tiny decoder with random weights in TAEHV's names, beside plain loops over frames, and as ``aad generate`` takes it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from aadkern.wan.tiny_vae import StreamingTinyDecoder, TinyDecoder, load_tiny_decoder
from tests.wan.tiny_decoder import frame_by_frame, random_state


def tiny(seed=0) -> TinyDecoder:
    decoder = TinyDecoder().double()
    decoder.load_state_dict({name: value.double() for name, value in random_state(seed).items() if name.startswith("decoder.")})
    return decoder


@pytest.mark.parametrize("lengths", [(3, 1, 2), (1, 1), (4,)], ids=str)
def test_chunks_give_the_whole_clip(lengths):
    decoder = tiny()
    latents = 2 * torch.randn(2, 16, sum(lengths), 2, 3, dtype=torch.float64)
    state = {name: value.double() for name, value in random_state().items()}
    expected = 2 * frame_by_frame(state, latents) - 1
    assert expected.std() > 0.1 and (expected.abs() < 1).float().mean() > 0.7
    stream = StreamingTinyDecoder(decoder)
    parts = [stream.decode(part) for part in latents.split(lengths, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(lengths)]
    made = torch.cat(parts, dim=2)
    assert made.shape == (2, 3, 4 * sum(lengths) - 3, 16, 24)
    torch.testing.assert_close(made, expected, atol=1e-11, rtol=0)
    assert torch.equal(StreamingTinyDecoder(decoder).decode(latents), made)
    with torch.no_grad():
        at_once = decoder(latents)[0][:, :, 3:]
    torch.testing.assert_close(2 * at_once - 1, expected, atol=1e-11, rtol=0)


def test_memory_streams_and_reset():
    decoder = tiny().float()
    latents = torch.randn(1, 16, 2, 2, 3)
    stream, other = StreamingTinyDecoder(decoder), StreamingTinyDecoder(decoder)
    first = stream.decode(latents)
    kept = stream.nbytes
    # Three blocks at each of three sides keep a frame of their features each.
    assert kept == 4 * 3 * 2 * 3 * (256 + 4 * 128 + 16 * 64) and other.nbytes == 0
    assert sum(features.untyped_storage().nbytes() for features in stream._memory) == kept  # and nothing behind them
    other.decode(torch.randn(1, 16, 1, 2, 3))
    again = stream.decode(latents)
    assert stream.nbytes == kept and again.shape[2] == 8
    assert not torch.equal(again[:, :, 3:], first)  # the past is seen
    stream.reset()
    assert stream.nbytes == 0 and torch.equal(stream.decode(latents), first)
    half = StreamingTinyDecoder(tiny().bfloat16()).decode(latents)
    assert half.dtype == torch.bfloat16 and (half.float() - first).abs().mean() < 0.02


def test_bad_latents():
    with pytest.raises(TypeError, match="decoder must be a TinyDecoder, got Linear"):
        StreamingTinyDecoder(torch.nn.Linear(2, 2))
    stream = StreamingTinyDecoder(tiny())
    for wrong in (torch.randn(1, 15, 2, 4, 6), torch.randn(1, 16, 0, 4, 6), torch.randn(16, 2, 4, 6)):
        with pytest.raises(ValueError, match=r"latents must be \[B, 16, f, h, w\] with f at least 1"):
            stream.decode(wrong)
    stream.decode(torch.randn(1, 16, 1, 2, 3))
    with pytest.raises(ValueError, match=r"latents must be \[1, 16, f, 2, 3\] as before, got \[1, 16, 1, 2, 4\]"):
        stream.decode(torch.randn(1, 16, 1, 2, 4))


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "taew2_1.pth"])
def test_files(name, tmp_path):
    """Both kinds, in fp16 as the public ones may be, and with a first growth of two frames of which the later counts."""
    state = {name: value.half() for name, value in random_state().items()}
    growth = "decoder.7.conv.weight"
    wanted = {name: value.float() for name, value in state.items() if name.startswith("decoder.")}
    for stored in (state, state | {growth: torch.cat([torch.randn_like(state[growth]), state[growth]])}):
        save = save_file if name.endswith("safetensors") else torch.save
        save(stored, tmp_path / name)
        read = load_tiny_decoder(tmp_path / name)
        held = read.state_dict()
        assert held.keys() == wanted.keys() and all(torch.equal(held[name], value) for name, value in wanted.items())
        assert not any(parameter.requires_grad for parameter in read.parameters())


def without(state, name):
    return {other: value for other, value in state.items() if other != name}


class NotTensors:
    pass


SPOILT = [
    (lambda s: without(s, "decoder.9.conv.2.bias"), r"must hold decoder\.9\.conv\.2\.bias \[128\], .* found nothing in"),
    (
        lambda s: s | {"decoder.1.weight": torch.randn(256, 48, 3, 3)},
        r"\[256, 16, 3, 3\], as taew2_1 does, found \[256, 48, 3, 3\]",
    ),
    (lambda s: s | {"decoder.7.conv.weight": torch.randn(768, 256, 1, 1)}, r"\[256, 256, 1, 1\], .* found \[768, 256, 1, 1\]"),
    (lambda s: s | {"decoder.7.conv.weight": torch.tensor(1.0)}, r"\[256, 256, 1, 1\], .* found a scalar"),
    (lambda s: s | {"decoder.22.bias": "a word"}, r"must hold decoder\.22\.bias \[3\]"),
    (lambda s: s | {"decoder.8.weight": s["decoder.8.weight"] / 0}, r"must hold finite weights, decoder\.8\.weight"),
    (lambda s: s | {"decoder.23.weight": torch.randn(3)}, r"must have taew2_1's layers alone, found decoder\.23\.weight"),
    (lambda s: {f"vae.{name}": value for name, value in s.items()}, r"must hold decoder\.1\.weight .* found nothing"),
    (lambda s: list(s.values()), "must be a state dict, got list"),
    (lambda s: s | {"more": NotTensors()}, "must be tensors that safetensors or torch.save wrote"),
]


@pytest.mark.parametrize("spoil, says", SPOILT, ids=[says for _, says in SPOILT])
def test_files_of_other_kinds(spoil, says, tmp_path):
    torch.save(spoil(random_state()), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"^tiny_decoder .*{says}") as caught:
        load_tiny_decoder(tmp_path / "a.pth")
    assert "\n" not in str(caught.value) and str(tmp_path / "a.pth") in str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    "content", [b"", b"no weights", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"\x80\x02.", None]
)
def test_files_that_cannot_be_read(name, content, tmp_path):
    file = tmp_path / name
    with pytest.raises(FileNotFoundError, match="tiny_decoder must be a file, found none at"):
        load_tiny_decoder(file)
    with pytest.raises(TypeError, match="tiny_decoder must be a file's path, got int"):
        load_tiny_decoder(3)
    if content is None:  # cut off
        (save_file if name.endswith("safetensors") else torch.save)(random_state(), file)
        content = file.read_bytes()[:-1000]
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^tiny_decoder must be tensors that safetensors or torch.save wrote, .* is not: ."
    ) as caught:
        load_tiny_decoder(file)
    assert "\n" not in str(caught.value)
