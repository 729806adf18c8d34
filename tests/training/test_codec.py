"""The codec objective on small networks: its parts, and one short training."""

import json
from pathlib import Path

import numpy as np
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
from slotmemory.training.narratives import HELD_OUT
from slotmemory.training.recipe import load_recipe, parse_recipe

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
    trained = PreviewCodec.load(run / "weights" / "codec.ema.safetensors")
    assert trained.config.latent_channels == 4


def test_exported_latents_have_about_unit_variance(run):
    from slotmemory.codecs.base import to_float
    from slotmemory.training.codec import ToyClips

    trained = PreviewCodec.load(run / "weights" / "codec.ema.safetensors")
    pixels, _ = ToyClips(Options(frames=5)).batch(0, np.random.default_rng(7), 64)
    with torch.no_grad():
        mean, std = statistics(trained.encode(to_float(pixels)))
    assert mean.abs().max() < 0.7 and 0.5 < float(std.mean()) < 1.6


def clips(**options):
    return NarrativeClips(Options(frames=5, seconds=4, pool=2, **options), seed=0, rank=0)


def test_clips_follow_from_their_step_and_generator_alone():
    source = clips(crop=40)
    pixels, masks = source.batch(3, np.random.default_rng(3), 3)
    again, _ = clips(crop=40).batch(3, np.random.default_rng(3), 3)
    other, _ = source.batch(3, np.random.default_rng(4), 3)
    assert pixels.shape == (3, 5, 3, *masks.shape[2:]) and pixels.dtype == torch.uint8 and masks.dtype == torch.bool
    assert pixels.shape[-1] == 40 and torch.equal(pixels, again) and not torch.equal(pixels, other)
    assert 0 < masks.float().mean() < 1


def test_held_out_clips_are_whole_and_no_training_clips():
    source = clips(crop=40)
    pixels, masks = source.held_out(0)
    assert pixels.shape == (5, 3, 96, 160) and masks.shape == (5, 96, 160)
    assert max(source.pool.seed_of(number) for number in range(100)) < HELD_OUT
    assert torch.equal(pixels, clips().held_out(0)[0]) and not torch.equal(pixels, source.held_out(1)[0])


def test_some_clips_stand_still():
    still, _ = clips(still=1.0, at_cuts=0.0).batch(0, np.random.default_rng(0), 2)
    assert torch.equal(still, still[:, :1].expand_as(still))


def test_loud_clips_reconstruct_worse_than_quiet_ones():
    quiet, loud = (
        Objective(Options(data="toy", frames=5, sizes=SIZES, loud=volume, loud_share=1.0), loop.Context(batch=4))
        for volume in (0.0, 30.0)
    )
    loud.codec.load_state_dict(quiet.codec.state_dict())
    for objective in (quiet, loud):
        torch.nn.init.normal_(objective.codec.decoder[-1].weight, generator=torch.Generator().manual_seed(0))
    errors = [x.loss(0, 0, torch.Generator().manual_seed(0))[1]["mse"] for x in (quiet, loud)]
    assert errors[1] > errors[0]


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


def test_a_decoder_alone_is_refused_without_the_codec_that_it_goes_on_with():
    recipe = Path(__file__).parents[2] / "recipes" / "train" / "tiny" / "codec.yaml"
    with pytest.raises(InputError, match="codec.yaml: options.part=decoder without init .*name the codec that goes on"):
        load_recipe(recipe, ["options.part=decoder"])
    assert load_recipe(recipe, ["options.part=decoder", "init=runs/tiny-codec"]).options.part == "decoder"


def test_a_decoder_learns_alone_and_the_latents_stay_what_they_are(run, tmp_path):
    options = {"data": "toy", "frames": 5, "sizes": SIZES, "held_out": 2, "part": "decoder"}
    values = {"objective": "codec", "steps": 3, "batch": 2, "init": str(run), "options": options}
    train(parse_recipe(values), tmp_path / "again")
    before, after = (PreviewCodec.load(x / "weights" / "codec.safetensors") for x in (run, tmp_path / "again"))
    start = PreviewCodec.load(run / "weights" / "codec.ema.safetensors")  # what init takes
    video = torch.rand(1, 5, 3, 16, 16) * 2 - 1
    latents = start.encode(video)
    assert torch.equal(after.encode(video), latents) and not torch.equal(before.encode(video), latents)
    assert not torch.equal(after.decode(latents), start.decode(latents))
