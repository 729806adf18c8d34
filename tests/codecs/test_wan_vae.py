"""The Wan autoencoder: the published numbers, streamed in any split to the same bits as whole, in both layouts of names."""

import json

import pytest
import torch
from safetensors.torch import save_file

from slotmemory.checkpoints import names
from slotmemory.codecs.base import Codec
from slotmemory.errors import InputError
from tests import checkpoints_for_tests as tiny
from tests.recorded import tensors

pytest.importorskip("diffusers", reason="the Wan VAE needs diffusers: pip install 'slotmemory[wan]'")

from slotmemory.codecs.wan_vae import WanVAE  # noqa: E402

CLOSE = dict(atol=2e-4, rtol=1e-3)  # golden README


def rows(x):
    """[B, C, T, H, W] as recorded -> [B, T, C, H, W]."""
    return x.transpose(1, 2)


@pytest.fixture(scope="module")
def recorded():
    return tensors("wan_vae")


@pytest.fixture(scope="module")
def vae(recorded, tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    torch.save({k.removeprefix("weights."): v for k, v in recorded.items() if k.startswith("weights.")}, path)
    return WanVAE.load(path)


def pushed(vae, latents, split):
    state, frames = vae.start(), []
    for part in latents.split(split, 1):
        video, state = vae.push(part, state)
        frames.append(video)
    return torch.cat(frames, 1)


def fed(vae, video, split):
    state, latents = vae.start(), []
    for part in video.split(split, 1):
        latent, state = vae.feed(part, state)
        latents.append(latent)
    return torch.cat(latents, 1)


def test_it_is_a_codec_of_the_published_strides(vae):
    assert isinstance(vae, Codec)
    assert (vae.space_stride, vae.time_stride, vae.latent_channels) == (8, 4, 16)


def test_encoding_gives_the_published_latents(vae, recorded):
    torch.testing.assert_close(vae.encode(rows(recorded["video"])), rows(recorded["latent"]), **CLOSE)
    first = vae.encode(rows(recorded["video"])[:, :1])
    torch.testing.assert_close(first, rows(recorded["latent_single_frame"]), **CLOSE)


def test_decoding_gives_the_published_frames_clamped(vae, recorded):
    for latents, frames in (("z_random", "decode"), ("latent", "reconstruction")):
        expected = rows(recorded[frames]).clamp(-1, 1)
        torch.testing.assert_close(vae.decode(rows(recorded[latents])), expected, **CLOSE)


def test_streaming_gives_the_published_parts(vae, recorded):
    state, latents = vae.start(), rows(recorded["z_random"])
    for a, b in ((0, 1), (1, 4), (4, 6)):
        video, state = vae.push(latents[:, a:b], state)
        torch.testing.assert_close(video, rows(recorded[f"stream.chunk_{a}_{b}"]).clamp(-1, 1), **CLOSE)
    for index in (0, 1, 2, 23):
        torch.testing.assert_close(state["decoder"][index], recorded[f"stream.feat_cache.{index}"], **CLOSE)


def test_a_new_stream_starts_with_one_frame_as_published(vae, recorded):
    video = vae.decode(rows(recorded["z_random"])[:, 3:])
    torch.testing.assert_close(video, rows(recorded["restart.chunk_3_6"]).clamp(-1, 1), **CLOSE)


@pytest.mark.parametrize("split", [[1] * 6, [3, 3], [2, 0, 4], [1, 5]])
def test_any_split_of_latents_decodes_to_the_bits_of_the_whole(vae, recorded, split):
    latents = rows(recorded["z_random"])
    assert torch.equal(pushed(vae, latents, split), vae.decode(latents))


@pytest.mark.parametrize("split", [[1] * 13, [13], [2, 3, 7, 1], [0, 6, 0, 7]])
def test_any_split_of_frames_encodes_to_the_bits_of_the_whole(vae, recorded, split):
    video = rows(recorded["video"])
    assert torch.equal(fed(vae, video, split), vae.encode(video))


def test_a_whole_decode_is_that_of_diffusers(vae, recorded):
    mean, std = (torch.tensor(vae.model.config[f"latents_{k}"]).view(1, -1, 1, 1, 1) for k in ("mean", "std"))
    theirs = vae.model.decode(recorded["z_random"] * std + mean).sample
    torch.testing.assert_close(vae.decode(rows(recorded["z_random"])), rows(theirs), atol=1e-5, rtol=1e-5)


def test_two_streams_do_not_mix_and_a_state_is_not_changed(vae, recorded):
    latents = rows(recorded["z_random"])
    _, state = vae.push(latents[:, :2], vae.start())
    kept = {part: [t.clone() for t in state[part]] for part in state}
    once, _ = vae.push(latents[:, 2:], state)
    vae.push(latents.flip(1), vae.start())
    again, _ = vae.push(latents[:, 2:], state)
    assert torch.equal(once, again)
    assert all(torch.equal(a, b) for part in state for a, b in zip(state[part], kept[part]))


def test_a_state_is_nothing_but_tensors_and_goes_on_exactly_from_disk(vae, recorded, tmp_path):
    from slotmemory.tree import tree_from_file, tree_to_file

    latents = rows(recorded["z_random"])
    for first in (1, 3):  # after one latent the cache holds marks in place of frames
        _, state = vae.push(latents[:, :first], vae.start())
        _, state = vae.feed(rows(recorded["video"])[:, :3], state)
        assert all(isinstance(t, torch.Tensor) for part in state.values() for t in part)
        tree_to_file(state, tmp_path / "state")
        after, _ = vae.push(latents[:, first:], tree_from_file(tmp_path / "state"))
        assert torch.equal(after, vae.decode(latents)[:, 4 * first - 3 :])


def test_rows_of_a_batch_do_not_leak(vae, recorded):
    latents = rows(recorded["z_random"])[:, :3]
    both = vae.decode(torch.cat((latents, latents.flip(1))))
    torch.testing.assert_close(both[:1], vae.decode(latents), atol=1e-5, rtol=1e-5)


def test_it_streams_in_bf16(recorded, tmp_path):
    vae = WanVAE.load(tiny.write_vae(tmp_path / "vae.pth")).to(torch.bfloat16)
    latents = rows(recorded["z_random"])
    video = pushed(vae, latents, [1, 5])
    assert video.dtype == torch.float32 and video.shape == (1, 21, 3, 24, 16) and bool(video.isfinite().all())


def test_diffusers_layout_gives_the_same_codec(vae, recorded, tmp_path):
    weights = {k: v.contiguous() for k, v in vae.model.state_dict().items()}
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0", **vae.model.config}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "_use_default_values"}))
    again = WanVAE.load(tmp_path / "diffusion_pytorch_model.safetensors")
    latents = rows(recorded["z_random"])[:, :2]
    assert torch.equal(again.decode(latents), vae.decode(latents))
    (tmp_path / "config.json").unlink()  # sizes are then read off the tensors
    assert torch.equal(
        WanVAE.load(tmp_path / "diffusion_pytorch_model.safetensors").decode(latents), vae.decode(latents)
    )


def test_the_published_names_and_number_of_weights_are_those_of_the_release():
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"):
        full = AutoencoderKLWan().state_dict()
    assert set(names.autoencoder(tiny.original_autoencoder_names(2)).values()) == set(full)
    assert (len(full), sum(t.numel() for t in full.values())) == (194, 126_892_531)


def test_files_that_are_no_wan_vae_say_what_they_are(vae, tmp_path):
    weights = dict(vae.model.state_dict())
    cases = {
        "a text encoder": (tiny.umt5_weights(), "is the UMT5 text encoder, expected the Wan 2.1 video autoencoder"),
        "Wan 2.2": (
            weights
            | {
                "encoder.conv_in.weight": torch.zeros(160, 12, 3, 3, 3),
                "post_quant_conv.weight": torch.zeros(48, 48, 1, 1, 1),
            },
            "is the Wan 2.2 autoencoder",
        ),
        "a missing tensor": (
            {k: v for k, v in weights.items() if k != "decoder.norm_out.gamma"},
            "lacks the tensor 'decoder.norm_out.gamma'",
        ),
    }
    for content, expected in cases.values():
        torch.save(content, tmp_path / "vae.pth")
        with pytest.raises(InputError, match=expected):
            WanVAE.load(tmp_path / "vae.pth")


@pytest.mark.parametrize(
    "call, expected",
    [
        (
            lambda vae: vae.decode(torch.zeros(1, 2, 4, 3, 2)),
            r"latents are \(1, 2, 4, 3, 2\), expected \[B, L, 16, h, w\]",
        ),
        (lambda vae: vae.encode(torch.zeros(1, 4, 3, 16, 16)), "frames=4 is not 4"),
        (lambda vae: vae.encode(torch.zeros(1, 1, 3, 15, 16)), "16x15 pixels: use multiples of 8"),
        (lambda vae: vae.encode(torch.zeros(1, 1, 3, 16, 16, dtype=torch.uint8)), "torch.uint8, expected"),
    ],
)
def test_inputs_of_the_wrong_shape_are_refused(vae, call, expected):
    with pytest.raises(InputError, match=expected):
        call(vae)
