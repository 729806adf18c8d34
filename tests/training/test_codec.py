"""The codec objective on small networks: its parts, and one short training."""

import json

import pytest
import torch

from slotmemory.codecs.preview import PreviewCodec
from slotmemory.errors import InputError
from slotmemory.training import loop
from slotmemory.training.codec import (
    NarrativeClips,
    Objective,
    Options,
    in_boxes,
    pixel_weights,
    psnr,
    reconstruction_terms,
    statistics,
)
from slotmemory.training.loop import train
from slotmemory.training.recipe import parse_recipe

SIZES = {
    "latent_channels": 4,
    "encoder_channels": [8, 8, 8],
    "decoder_channels": [8, 8, 8, 8],
    "blocks": [1, 1, 1],
    "time": [False, True, True],
    "group": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = {"data": "toy", "frames": 5, "sizes": SIZES, "held_out": 2, "statistics_clips": 64}
    values = {"objective": "codec", "steps": 30, "batch": 2, "ema": 0.5, "optimizer": {"warmup": 2}, "options": options}
    train(parse_recipe(values), folder)
    return folder


def test_a_short_training_writes_a_codec_that_loads(run):
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert records[-1]["validate"].keys() == {"psnr", "psnr_entities", "latent_std"}
    assert (run / "samples" / "0000030" / "codec.png").stat().st_size > 0
    codec = PreviewCodec.load(run / "weights" / "codec.ema.safetensors")
    assert codec.config.latent_channels == 4


def test_exported_latents_have_about_unit_variance(run):
    from slotmemory.codecs.base import to_float
    from slotmemory.training.codec import ToyClips

    codec = PreviewCodec.load(run / "weights" / "codec.ema.safetensors")
    pixels, _ = ToyClips(Options(frames=5)).batch(7, 64)
    with torch.no_grad():
        mean, std = statistics(codec.encode(to_float(pixels)))
    assert mean.abs().max() < 0.7 and 0.5 < float(std.mean()) < 1.6


def test_clips_follow_from_their_seed_alone():
    clips = NarrativeClips(Options(frames=5, seconds=4))
    pixels, masks = clips.batch(3, 3)
    again, _ = clips.batch(3, 3)
    other, _ = clips.batch(4, 3)
    assert pixels.shape == (3, 5, 3, *masks.shape[2:]) and pixels.dtype == torch.uint8 and masks.dtype == torch.bool
    assert torch.equal(pixels, again) and not torch.equal(pixels, other)
    assert 0 < masks.float().mean() < 1


def test_some_clips_stand_still_and_some_hold_a_change_of_shot():
    still, _ = NarrativeClips(Options(frames=5, seconds=4, still=1.0, at_cuts=0.0)).batch(0, 2)
    assert torch.equal(still, still[:, :1].expand_as(still))


def test_entity_pixels_and_their_rim_weigh_more():
    masks = torch.zeros(1, 1, 9, 9, dtype=torch.bool)
    masks[0, 0, 4, 4] = True
    weights = pixel_weights(masks, 8.0, 2)
    assert weights.shape == (1, 1, 1, 9, 9) and weights.mean() == pytest.approx(1)
    assert weights[0, 0, 0, 2, 2] == pytest.approx(8 * float(weights[0, 0, 0, 0, 0]))
    assert weights[0, 0, 0, 1, 4] == weights[0, 0, 0, 0, 0]


def test_the_edge_term_sees_what_a_constant_shift_does_not():
    target, flat = torch.rand(1, 1, 3, 8, 8), torch.ones(1, 1, 1, 8, 8)
    shifted = reconstruction_terms(target + 0.1, target, flat)
    blurred = reconstruction_terms(target * 0.5, target, flat)
    assert shifted["edge"] < 1e-6 < blurred["edge"] and shifted["l1"] == pytest.approx(0.1, abs=1e-5)


def test_boxes_enclose_each_frames_entities():
    masks = torch.zeros(2, 6, 6, dtype=torch.bool)
    masks[0, 1, 2] = masks[0, 3, 4] = True
    expected = torch.zeros_like(masks)
    expected[0, 1:4, 2:5] = True
    assert torch.equal(in_boxes(masks), expected)
    assert psnr(torch.tensor(0.04)) == pytest.approx(20)


def test_a_new_decoder_takes_over_the_latents_of_another_codec(tmp_path):
    fixed = {**SIZES, "encoder_channels": [], "time": [False] * 3, "group": 4}
    first = Objective(Options(data="toy", frames=5, sizes=fixed), loop.Context(batch=1, seed=1))
    first.codec.save(tmp_path / "codec.safetensors")
    same = Options(data="toy", frames=5, sizes=fixed, latents=str(tmp_path / "codec.safetensors"))
    second = Objective(same, loop.Context(batch=1, seed=2))
    video = torch.rand(1, 5, 3, 16, 16) * 2 - 1
    assert torch.equal(first.codec.encode(video), second.codec.encode(video))
    learned = Options(data="toy", frames=5, sizes=SIZES, latents=same.latents)
    with pytest.raises(InputError, match="only fixed, direct latents"):
        Objective(learned, loop.Context(batch=1))
