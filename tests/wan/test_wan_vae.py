"""Streaming decode and first-frame encode, beside diffusers' own whole-clip code on small random VAEs of both generations."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor

from aadkern.wan.vae import StreamingDecoder, StreamingEncoder, denormalised, encode_image, encode_video, pixels_per_latent

WAN21 = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 2, 2], num_res_blocks=1)
# Wan 2.2's: residual blocks, 2 x 2 pixels as channels.
WAN22 = dict(
    base_dim=4,
    decoder_base_dim=8,
    z_dim=6,
    dim_mult=[1, 1, 2, 2],
    num_res_blocks=1,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
    temperal_downsample=[False, True, True],
    latents_mean=[0.3, -0.2, 0.5, 1.0, -1.0, 0.1],
    latents_std=[1.5, 0.5, 2.0, 1.0, 0.7, 1.1],
)


def random_vae(config=WAN21, seed=0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**config).eval()
    for module in vae.modules():  # norms start at ones, which would hide a wrong channel
        if hasattr(module, "gamma"):
            torch.nn.init.normal_(module.gamma, 1.0, 0.3)
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(0.3)  # few values reach 1, where they are clamped
    return vae


def random_latents(vae, frames, height=4, width=6, batch=1):
    return torch.randn(batch, vae.config.z_dim, frames, height, width)


@torch.no_grad()
def whole(vae, latents):
    """The clip as diffusers' pipeline decodes it at once."""
    mean = torch.tensor(vae.config.latents_mean, dtype=latents.dtype).view(1, -1, 1, 1, 1)
    inverse = 1.0 / torch.tensor(vae.config.latents_std, dtype=latents.dtype).view(1, -1, 1, 1, 1)
    return vae.decode((latents / inverse + mean).to(vae.dtype), return_dict=False)[0]


@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("lengths", [(1, 3, 3), (3, 3, 1), (1, 1, 4, 2), (8,)])
def test_chunks_give_the_whole_clip(config, lengths):
    vae = random_vae(config).double()
    latents = random_latents(vae, sum(lengths), 2, 3, batch=2).double()
    decoder = StreamingDecoder(vae)
    parts = [decoder.decode(part) for part in latents.split(lengths, dim=2)]
    side = 8 if config is WAN21 else 16
    assert pixels_per_latent(vae) == side
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(lengths)]
    expected = whole(vae, latents)
    assert expected.shape == (2, 3, 1 + 4 * (sum(lengths) - 1), 2 * side, 3 * side)
    assert (expected.abs() < 1).float().mean() > 0.9 and expected.std() > 0.1
    got = torch.cat(parts, dim=2)
    assert (got - expected).abs().max() < 1e-11 * expected.abs().max()
    again = StreamingDecoder(vae).decode(latents)
    assert (got - again).abs().max() < 1e-11 * expected.abs().max()


def test_memory_does_not_grow_and_reset_begins_anew():
    vae = random_vae()
    decoder, latents = StreamingDecoder(vae), random_latents(vae, 2)
    first = decoder.decode(latents)
    sizes = set()
    for _ in range(12):
        decoder.decode(random_latents(vae, 2))
        sizes.add(decoder.nbytes)
    assert len(sizes) == 1 and sizes.pop() > 0
    assert not torch.equal(decoder.decode(latents)[:, :, -1], first[:, :, -1])  # the past is seen
    decoder.reset()
    assert decoder.nbytes == 0 and torch.equal(decoder.decode(latents), first)


def test_streams_and_other_uses_of_the_vae_do_not_meet():
    vae = random_vae().double()
    latents = [random_latents(vae, 4).double() for _ in range(2)]
    decoders = [StreamingDecoder(vae) for _ in range(2)]
    made = [[], []]
    for i in range(0, 4, 2):
        for decoder, clip, parts in zip(decoders, latents, made, strict=True):
            parts.append(decoder.decode(clip[:, :, i : i + 2]))
            encode_image(vae, torch.rand(1, 3, 32, 48))
            vae.decode(random_latents(vae, 2).double())
    for clip, parts in zip(latents, made, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), whole(vae, clip), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
def test_first_frame(config):
    vae = random_vae(config)
    side = pixels_per_latent(vae)
    image = 2 * torch.rand(2, 3, 2 * side, 3 * side) - 1
    latent = encode_image(vae, image)
    assert latent.shape == (2, vae.config.z_dim, 1, 2, 3) and latent.dtype == torch.float32
    with torch.no_grad():
        mean_of_posterior = vae.encode(image[:, :, None]).latent_dist.mean
    for channel in range(vae.config.z_dim):
        expected = (mean_of_posterior[:, channel] - vae.config.latents_mean[channel]) / vae.config.latents_std[channel]
        torch.testing.assert_close(latent[:, channel], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(denormalised(latent, vae), mean_of_posterior, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
def test_videos(config):
    """Whole clips, whose latents begin with those of shorter ones, and up to rounding with their first picture's."""
    vae = random_vae(config)
    side = pixels_per_latent(vae)
    video = 2 * torch.rand(2, 3, 9, 2 * side, 3 * side) - 1
    latents = encode_video(vae, video)
    assert latents.shape == (2, vae.config.z_dim, 3, 2, 3)
    with torch.no_grad():
        mean_of_posterior = vae.encode(video).latent_dist.mean
    torch.testing.assert_close(denormalised(latents, vae), mean_of_posterior, atol=1e-5, rtol=1e-5)
    assert torch.equal(encode_video(vae, video[:, :, :5]), latents[:, :, :2])
    torch.testing.assert_close(encode_image(vae, video[:, :, 0]), latents[:, :, :1], atol=1e-6, rtol=1e-5)
    for wrong, says in (
        (video[:, :, :8], r"video must have 4k \+ 1 frames, got 8"),
        (video[..., :-1], rf"video must be \[B, 3, T, H, W\] with H and W multiples of {side}, got \[2, 3, 9, "),
        (video[:, :, :0], r"video must be \[B, 3, T, H, W\]"),
    ):
        with pytest.raises(ValueError, match=says):
            encode_video(vae, wrong)
    with pytest.raises(TypeError, match="vae must be diffusers' AutoencoderKLWan, got NoneType"):
        encode_video(None, video)


@pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])
@pytest.mark.parametrize("lengths", [(1, 8, 4), (5, 8), (13,)], ids=str)
def test_encoded_chunks_give_the_whole_clip(config, lengths):
    """What diffusers makes of it at once, and whatever the chunks the same bits."""
    vae = random_vae(config)
    side = pixels_per_latent(vae)
    video = 2 * torch.rand(2, 3, 13, 2 * side, 3 * side) - 1
    encoder = StreamingEncoder(vae)
    made = torch.cat([encoder.encode(part) for part in video.split(lengths, dim=2)], dim=2)
    assert made.shape == (2, vae.config.z_dim, 4, 2, 3) and made.dtype == torch.float32
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mean
    torch.testing.assert_close(denormalised(made, vae), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(StreamingEncoder(vae).encode(video), made)
    exact, at_once = random_vae(config).double(), random_vae(config).double()
    encoder = StreamingEncoder(exact)
    made = torch.cat([encoder.encode(part.double()) for part in video.split(lengths, dim=2)], dim=2)
    torch.testing.assert_close(made, encode_video(at_once, video.double()), atol=1e-11, rtol=1e-11)


def test_an_encoder_s_memory_streams_and_reset():
    vae = random_vae()
    encoder, other = StreamingEncoder(vae), StreamingEncoder(vae)
    begins, goes_on = (2 * torch.rand(1, 3, n, 16, 24) - 1 for n in (5, 4))
    first, sizes = encoder.encode(begins), set()
    for _ in range(4):
        after = encoder.encode(goes_on)
        other.encode(begins)
        vae.encode(goes_on)
        other.reset()
        sizes.add(encoder.nbytes)
    assert len(sizes) == 1 and sizes.pop() > 0
    encoder.reset()
    assert encoder.nbytes == 0 and torch.equal(encoder.encode(begins), first)
    assert not torch.equal(encoder.encode(goes_on), after)  # the past is seen
    half = StreamingEncoder(random_vae().bfloat16()).encode(begins)
    assert half.dtype == torch.float32 and (half - first).abs().mean() < 0.05 * first.std()


def test_what_cannot_be_encoded():
    vae = random_vae()
    encoder, video = StreamingEncoder(vae), torch.rand(1, 3, 5, 16, 24)
    with pytest.raises(ValueError, match="video must have 4f - 3 frames, got 4"):
        encoder.encode(video[:, :, :4])
    encoder.encode(video)
    with pytest.raises(ValueError, match="video must have 4f frames after the first, got 5"):
        encoder.encode(video)
    with pytest.raises(ValueError, match=r"video must be \[1, 3, T, 16, 24\] as before, got \[1, 3, 4, 16, 16\]"):
        encoder.encode(video[:, :, :4, :, :16])
    for wrong in (video[..., :-1], video[:, :2], video[:, :, :0]):
        with pytest.raises(ValueError, match=r"video must be \[B, 3, T, H, W\] with H and W multiples of 8"):
            encoder.encode(wrong)
    for wrong in (video.byte(), video.numpy()):
        with pytest.raises(TypeError, match=r"video must be a floating tensor in \[-1, 1\]"):
            encoder.encode(wrong)
    vae.enable_tiling()
    with pytest.raises(ValueError, match="vae must not be tiled"):
        StreamingEncoder(vae)


def test_bf16_stays_near():
    vae = random_vae()
    latents = random_latents(vae, 3)
    expected = whole(vae, latents)
    made = StreamingDecoder(random_vae().bfloat16()).decode(latents)
    assert made.dtype == torch.bfloat16
    frames = VideoProcessor().postprocess_video(made.float(), output_type="pt")  # also what diffusers makes of it
    assert (frames - VideoProcessor().postprocess_video(expected, output_type="pt")).abs().mean() < 0.01


def test_bad_input():
    vae = random_vae()
    with pytest.raises(TypeError, match=r"vae must be diffusers' AutoencoderKLWan, got Linear"):
        StreamingDecoder(torch.nn.Linear(2, 2))
    decoder = StreamingDecoder(vae)
    for wrong in (torch.randn(1, 15, 2, 4, 6), torch.randn(1, 16, 0, 4, 6), torch.randn(16, 2, 4, 6)):
        with pytest.raises(ValueError, match=r"latents must be \[B, 16, f, h, w\]"):
            decoder.decode(wrong)
    decoder.decode(random_latents(vae, 1))
    with pytest.raises(ValueError, match=r"latents must be \[1, 16, f, 4, 6\] as before, got \[1, 16, 1, 4, 7\]"):
        decoder.decode(random_latents(vae, 1, width=7))
    with pytest.raises(ValueError, match=r"image must be \[B, 3, H, W\] with H and W multiples of 8, got \[1, 3, 12, 16\]"):
        encode_image(vae, torch.rand(1, 3, 12, 16))
    vae.enable_tiling()
    with pytest.raises(ValueError, match="vae must not be tiled"):
        StreamingDecoder(vae)


def test_images_of_another_range_or_kind_are_refused():
    vae = random_vae()
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    for wrong, says in ((image.to(torch.uint8), "got torch.uint8"), (image.numpy(), "got ndarray")):
        with pytest.raises(TypeError, match=f"image must be a floating tensor in \\[-1, 1\\], {says}"):
            encode_image(vae, wrong)
    for wrong in (255 * image, image + float("nan")):
        with pytest.raises(ValueError, match=r"image must lie in \[-1, 1\], got \["):
            encode_image(vae, wrong)
    with pytest.raises(TypeError, match="vae must be diffusers' AutoencoderKLWan, got NoneType"):
        encode_image(None, image)
    with pytest.raises(TypeError, match="latents must be a tensor, got ndarray"):
        StreamingDecoder(vae).decode(random_latents(vae, 1).numpy())
