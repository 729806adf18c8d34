"""Codecs are told apart by their tensors: TAEHV's files as they are published, ours, the Wan autoencoder."""

import pytest
import torch
from safetensors.torch import save_file

from slotmemory.checkpoints.parts import load_codec
from slotmemory.codecs.preview import PreviewCodec, PreviewConfig
from slotmemory.errors import InputError
from tests import checkpoints_for_tests as tiny


@pytest.fixture(scope="module")
def taew():
    """A random network of taew2_1's sizes, and its tensors as the published file holds them: 128, in fp16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = PreviewCodec(PreviewConfig.wan()).half().float().eval().requires_grad_(False)
    tensors = {k: v.half().contiguous() for k, v in codec.state_dict().items() if not k.startswith("latent_")}
    return codec, tensors


@pytest.mark.parametrize("name", ["taew2_1.pth", "taew2_1.safetensors"])
def test_taew2_1_is_a_preview_codec(taew, tmp_path, name):
    codec, tensors = taew
    assert len(tensors) == 128 and round(sum(t.numel() for t in tensors.values()) / 1e6, 1) == 11.3
    torch.save(tensors, tmp_path / name) if name.endswith(".pth") else save_file(tensors, tmp_path / name)
    loaded = load_codec(tmp_path / name)
    latents = torch.randn(1, 2, 16, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(loaded.decode(latents), codec.decode(latents))


def test_a_layer_that_could_split_time_keeps_its_last_frame_as_taehv_does(taew, tmp_path):
    codec, tensors = taew
    doubled = torch.cat((torch.zeros(256, 256, 1, 1).half(), tensors["decoder.7.conv.weight"]))
    torch.save(tensors | {"decoder.7.conv.weight": doubled}, tmp_path / "taew2_1.pth")
    assert torch.equal(load_codec(tmp_path / "taew2_1.pth").decoder[7].conv.weight, codec.decoder[7].conv.weight)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda t: t.pop("decoder.22.bias"), "lacks the tensor 'decoder.22.bias'"),
        (
            lambda t: t.update({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}),
            r"\(256, 48, 3, 3\), expected \(256, 16",
        ),
    ],
)
def test_a_damaged_or_other_taehv_is_refused(taew, tmp_path, change, expected):
    tensors = dict(taew[1])
    change(tensors)
    torch.save(tensors, tmp_path / "taew2_2.pth")
    with pytest.raises(InputError, match=expected):
        load_codec(tmp_path / "taew2_2.pth")


def test_our_own_file_is_told_by_its_header(tmp_path):
    codec = PreviewCodec(PreviewConfig.tiny())
    codec.save(tmp_path / "codec.safetensors")
    assert load_codec(tmp_path / "codec.safetensors").config == codec.config


def test_what_is_no_codec_says_what_it_is(tmp_path):
    pytest.importorskip("diffusers", reason="whatever is no codec of ours is asked of diffusers")
    torch.save(tiny.transformer(), tmp_path / "x.pt")
    with pytest.raises(
        InputError, match="is a Wan 128-wide, 2-layer transformer, expected the Wan 2.1 video autoencoder"
    ):
        load_codec(tmp_path / "x.pt")
