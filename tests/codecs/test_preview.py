"""Behaviour of the preview codec on small random weights: streaming, causality, files, and TAEHV's tensor names."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from slotmemory.codecs.base import Codec, num_frames, num_latents, to_float, to_uint8
from slotmemory.codecs.preview import PreviewCodec, PreviewConfig

SMALL = PreviewConfig(
    latent_channels=4,
    patch=4,
    encoder_channels=(8, 8, 8),
    decoder_channels=(8, 8, 8, 8),
    blocks=(2, 1, 1),
    space=(True, False, False),
)
CONFIGS = {
    "patch4": SMALL,
    "patch1": replace(SMALL, patch=1, space=(True, True, True)),
    "plain": replace(SMALL, plain=True),
    "grown-early": replace(SMALL, time=(True, True, False)),
    "grouped": replace(SMALL, plain=True, time=(False,) * 3, group=4),
}
TOLERANCE = 1e-5  # another batch size may pick another convolution algorithm


@pytest.fixture(params=CONFIGS, scope="module")
def codec(request):
    return make(CONFIGS[request.param])


def make(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        codec = PreviewCodec(config).eval().requires_grad_(False)
        for name, parameter in codec.named_parameters():  # fresh layers are silent or nearly so
            if name.endswith(("conv2.weight", "past.weight")) or parameter is codec.decoder[-1].weight:
                torch.nn.init.normal_(parameter, std=0.1)
        codec.latent_mean.normal_()
        codec.latent_std.uniform_(0.5, 2)
    return codec


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def close(a, b):
    return a.shape == b.shape and (a - b).abs().max() <= TOLERANCE


@pytest.mark.parametrize("split", [[1] * 5, [5], [2, 3], [1, 4], [0, 3, 0, 2]])
def test_any_split_of_latents_decodes_to_the_whole(codec, split):
    latents = rand(2, 5, 4, 2, 3)
    state, frames = codec.start(), []
    for part in latents.split(split, 1):
        video, state = codec.push(part, state)
        frames.append(video)
    assert close(torch.cat(frames, 1), codec.decode(latents))


@pytest.mark.parametrize("split", [[1] * 13, [13], [2, 3, 7, 1], [0, 6, 0, 7], [3, 10]])
def test_any_split_of_frames_encodes_to_the_whole(codec, split):
    video = rand(2, 13, 3, 16, 24)
    state, latents = codec.start(), []
    for part in video.split(split, 1):
        latent, state = codec.feed(part, state)
        latents.append(latent)
    assert close(torch.cat(latents, 1), codec.encode(video))


def test_sizes_and_dtype_are_as_documented(codec):
    video = rand(1, 9, 3, 16, 24)
    latents = codec.encode(video)
    assert latents.shape == (1, 3, 4, 2, 3) and latents.dtype == torch.float32
    assert codec.decode(latents).shape == video.shape
    assert codec.decode(latents * 100).abs().max() <= 1
    assert isinstance(codec, Codec)


def test_the_state_is_not_mutated(codec):
    _, state = codec.push(rand(1, 2, 4, 2, 3), codec.start())
    _, state = codec.feed(rand(1, 7, 3, 16, 24), state)
    before = copy.deepcopy(state)
    first, _ = codec.push(rand(1, 2, 4, 2, 3, seed=1), state)
    codec.feed(rand(1, 7, 3, 16, 24, seed=1), state)
    again, _ = codec.push(rand(1, 2, 4, 2, 3, seed=1), state)
    assert torch.equal(first, again)
    assert state.keys() == before.keys()
    for key, tensors in state.items():
        assert len(tensors) == len(before[key]) and all(map(torch.equal, tensors, before[key]))


def test_the_state_holds_no_more_than_one_frame_per_block(codec):
    _, state = codec.push(rand(1, 5, 4, 2, 3), codec.start())
    for tensor in state["decoder"]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_later_frames_do_not_change_earlier_latents(codec):
    video = rand(1, 13, 3, 16, 24)
    changed = torch.cat([video[:, :5], rand(1, 8, 3, 16, 24, seed=1)], 1)
    before, after = codec.encode(video), codec.encode(changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_later_latents_do_not_change_earlier_frames(codec):
    latents = rand(1, 4, 4, 2, 3)
    changed = torch.cat([latents[:, :2], rand(1, 2, 4, 2, 3, seed=1)], 1)
    before, after = codec.decode(latents), codec.decode(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


def test_the_past_matters_unless_the_codec_is_linear(codec):
    latents = rand(1, 2, 4, 2, 3)
    changed = torch.cat([rand(1, 1, 4, 2, 3, seed=1), latents[:, 1:]], 1)
    same = torch.equal(codec.decode(latents)[:, 1:], codec.decode(changed)[:, 1:])
    assert same == (not len(codec.decoder))


def test_the_first_latent_is_the_first_frame_alone(codec):
    video = rand(1, 9, 3, 16, 24)
    assert close(codec.encode(video[:, :1]), codec.encode(video)[:, :1])
    assert codec.decode(codec.encode(video[:, :1])).shape[1] == 1


def test_rows_of_a_batch_do_not_leak(codec):
    video = rand(2, 5, 3, 16, 24)
    latents = codec.encode(video)
    assert close(latents[1:], codec.encode(video[1:]))
    assert close(codec.decode(latents)[1:], codec.decode(latents[1:]))


def test_latents_are_normalised_per_channel(codec):
    video = rand(1, 9, 3, 16, 24)
    raw, _ = codec.feed_raw(video, codec.start())
    expected = (raw - codec.latent_mean[:, None, None]) / codec.latent_std[:, None, None]
    assert torch.allclose(codec.encode(video), expected, atol=1e-6)
    assert torch.allclose(codec.denormalise(codec.normalise(raw)), raw, atol=1e-5)


@pytest.mark.parametrize("name", ["patch4", "grouped"])
def test_calibration_gives_latents_of_unit_scale(name):
    codec = PreviewCodec(CONFIGS[name])
    video = rand(4, 9, 3, 48, 80)
    codec.calibrate(video)
    std, mean = torch.std_mean(codec.feed_raw(video, codec.start())[0], dim=(0, 1, 3, 4))
    assert torch.allclose(std, torch.ones(4), atol=0.05) and mean.abs().max() < 0.05


def test_the_codec_streams_in_bf16(codec):
    half = copy.deepcopy(codec).to(torch.bfloat16)
    video, state = half.push(rand(1, 2, 4, 2, 3), half.start())
    video, _ = half.push(rand(1, 2, 4, 2, 3), state)
    assert video.dtype == torch.float32 and video.isfinite().all()
    assert half.encode(rand(1, 5, 3, 16, 24)).isfinite().all()


def test_save_and_load_round_trip(codec, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    loaded = PreviewCodec.load(tmp_path / "codec.safetensors").requires_grad_(False)
    assert loaded.config == codec.config
    latents = rand(1, 3, 4, 2, 3)
    assert torch.equal(loaded.decode(latents), codec.decode(latents))
    assert [file.name for file in tmp_path.iterdir()] == ["codec.safetensors"]


def test_files_that_cannot_be_loaded_say_why_in_one_line(tmp_path):
    codec, path = make(SMALL), tmp_path / "codec.safetensors"

    def complaint():
        with pytest.raises(ValueError) as caught:
            PreviewCodec.load(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    assert "no weights at" in complaint()
    codec.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in complaint()
    path.write_bytes(b"")
    assert "truncated" in complaint()

    wider = {"latent_channels": 4, "patch": 4, "space": [True, False, False], "blocks": [2, 1, 1]}
    codec.metadata = lambda: {"config": json.dumps(wider)}
    codec.save(path)
    assert all(part in complaint() for part in ("encoder.0.weight", "(8, 48, 3, 3)", "(64, 48, 3, 3)"))
    codec.metadata = lambda: {"config": '{"pach": 4}'}
    codec.save(path)
    assert "pach" in complaint()
    codec.metadata = lambda: {"config": '{"latent_channels": "many"}'}
    codec.save(path)
    complaint()
    codec.metadata = lambda: {}
    codec.save(path)
    assert "no 'config' in its metadata" in complaint()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": 2}, "stride of 4 pixels"),
        ({"space": (True, True, False)}, "stride of 16 pixels"),
        ({"time": (True, True, True)}, "stride of 8 frames"),
        ({"decoder_channels": (8, 8, 8)}, "3 entries, expected 4"),
        ({"blocks": 0}, "1 or more"),
    ],
)
def test_contradictory_sizes_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        replace(SMALL, **change)


def test_short_forms_of_sizes_are_spelt_out():
    config = PreviewConfig(blocks=3, time=(True, True))
    assert config == PreviewConfig.wan() and config.blocks == (3, 3, 3) and config.time == (False, True, True)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.zeros(1, 5, 3, 16, 24, dtype=torch.uint8), "float in"),
        (torch.zeros(5, 3, 16, 24), "expected \\[B, T, 3, H, W\\]"),
        (torch.zeros(1, 5, 3, 16, 20), "20x16 pixels"),
        (torch.zeros(1, 6, 3, 16, 24), "use 5 or 9"),
    ],
)
def test_videos_of_the_wrong_kind_are_refused(video, words):
    with pytest.raises(ValueError, match=words):
        make(SMALL).encode(video)


def test_pixels_survive_the_way_to_float_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_uint8(to_float(pixels)), pixels)
    assert to_float(pixels).min() == -1 and to_float(pixels).max() == 1
    assert to_uint8(torch.tensor([-2.0, 2.0])).tolist() == [0, 255]
    assert [num_frames(num_latents(n)) for n in (1, 5, 957)] == [1, 5, 957]


def test_the_embedded_sizes_are_small():
    codec = PreviewCodec(PreviewConfig.tiny())
    assert codec.encode(torch.zeros(1, 5, 3, 96, 160)).shape == (1, 2, 32, 12, 20)
    assert 5e6 < sum(parameter.numel() for parameter in codec.parameters()) < 7e6


def test_the_wan_sizes_have_the_names_and_shapes_of_taew2_1():
    def block(index, width):
        return {f"{index}.conv.0.weight": (width, 2 * width, 3, 3)} | {
            f"{index}.conv.{layer}.{part}": shape
            for layer in (0, 2, 4)
            for part, shape in (("weight", (width, width, 3, 3)), ("bias", (width,)))
            if (layer, part) != (0, "weight")
        }

    expected = {"latent_mean": (16,), "latent_std": (16,)}
    encoder = {"0.weight": (64, 3, 3, 3), "0.bias": (64,), "17.weight": (16, 64, 3, 3), "17.bias": (16,)}
    for pool, stride in ((2, 2), (7, 2), (12, 1)):
        encoder |= {f"{pool}.conv.weight": (64, 64 * stride, 1, 1), f"{pool + 1}.weight": (64, 64, 3, 3)}
        for index in range(pool + 2, pool + 5):
            encoder |= block(index, 64)
    decoder = {"1.weight": (256, 16, 3, 3), "1.bias": (256,), "22.weight": (3, 64, 3, 3), "22.bias": (3,)}
    for first, width, after, stride in ((3, 256, 128, 1), (9, 128, 64, 2), (15, 64, 64, 2)):
        for index in range(first, first + 3):
            decoder |= block(index, width)
        decoder |= {f"{first + 4}.conv.weight": (width * stride, width, 1, 1)}
        decoder |= {f"{first + 5}.weight": (after, width, 3, 3)}
    expected |= {f"encoder.{name}": shape for name, shape in encoder.items()}
    expected |= {f"decoder.{name}": shape for name, shape in decoder.items()}
    found = {name: tuple(tensor.shape) for name, tensor in PreviewCodec(PreviewConfig.wan()).state_dict().items()}
    assert found == expected
