"""A tiny decoder's random weights in TAEHV's names, and what they make of latents by plain loops over frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# taew2_1's names and shapes, written out by hand from TAEHV's code: (place, outputs, inputs, side of the kernel, bias).
CONVOLUTIONS = [("1", 256, 16, 3, True), ("22", 3, 64, 3, True)]
CONVOLUTIONS += [("7.conv", 256, 256, 1, False), ("8", 128, 256, 3, False), ("13.conv", 256, 128, 1, False)]
CONVOLUTIONS += [("14", 64, 128, 3, False), ("19.conv", 128, 64, 1, False), ("20", 64, 64, 3, False)]
for start, width in ((3, 256), (9, 128), (15, 64)):
    for block in range(start, start + 3):
        CONVOLUTIONS += [(f"{block}.conv.{layer}", width, 2 * width if layer == 0 else width, 3, True) for layer in (0, 2, 4)]


def random_state(seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for place, outputs, inputs, side, bias in CONVOLUTIONS:
        spread = (inputs * side * side) ** -0.5
        state[f"decoder.{place}.weight"] = spread * torch.randn(outputs, inputs, side, side, generator=generator)
        if bias:
            state[f"decoder.{place}.bias"] = 0.3 * torch.randn(outputs, generator=generator)
    state["decoder.22.weight"] *= 0.4  # few pixels are clamped
    state["decoder.22.bias"] = 0.5 + 0.4 * state["decoder.22.bias"]
    state["encoder.0.weight"] = torch.randn(64, 3, 3, 3, generator=generator)  # is there in the public file, and not used
    return state


def frame_by_frame(state, latents):
    """The clip [B, 3, 4f - 3, 8h, 8w] in [0, 1]: each layer as a list of frames, each frame alone."""

    def conv(x, place):
        weight = state[f"decoder.{place}.weight"]
        return F.conv2d(x, weight, state.get(f"decoder.{place}.bias"), padding=weight.shape[-1] // 2)

    def blocks(frames, start):
        for block in range(start, start + 3):
            made, before = [], torch.zeros_like(frames[0])
            for frame in frames:
                x = torch.cat([frame, before], 1)
                x = conv(conv(conv(x, f"{block}.conv.0").relu(), f"{block}.conv.2").relu(), f"{block}.conv.4")
                made.append((x + frame).relu())
                before = frame
            frames = made
        return frames

    frames = [conv(3 * torch.tanh(frame / 3), "1").relu() for frame in latents.unbind(2)]
    for start in (3, 9, 15):
        frames = [frame.repeat_interleave(2, 2).repeat_interleave(2, 3) for frame in blocks(frames, start)]
        grown = [conv(frame, f"{start + 4}.conv").chunk(1 if start == 3 else 2, dim=1) for frame in frames]
        frames = [conv(frame, str(start + 5)) for several in grown for frame in several]
    return torch.stack([conv(frame.relu(), "22").clamp(0, 1) for frame in frames], dim=2)[:, :, 3:]
