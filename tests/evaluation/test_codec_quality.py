"""What the benchmark of codecs asks for and how it tells loss in boxes from loss everywhere."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks import codec_quality

from slotmemory.engine import Engine
from slotmemory.world import ACTIONS
from slotmemory.world.grammar import parse


@pytest.mark.parametrize("action", [*ACTIONS, codec_quality.ENTERS])
def test_both_shots_say_what_is_measured(action):
    first, second = (parse(told) for told in codec_quality.prompts_of(action, np.random.default_rng(0)))
    if action == codec_quality.ENTERS:
        assert not first.roles and first.scene == second.scene and second.roles[0].action == "waits"
    else:
        assert first.scene != second.scene and first.roles == second.roles and first.roles[0].action == action


def test_noise_outside_boxes_is_no_loss_in_them():
    kept: list[torch.Tensor] = []

    class Keeping:
        dtype = torch.float32

        def encode(self, pixels):
            kept.append(pixels)
            return pixels

        def decode(self, pixels):
            damaged = pixels.clone()
            damaged[..., :4, :4] = 0.0  # the sky's corner
            return damaged

    engine = replace(Engine.from_pretrained("tiny"), codec=Keeping())
    everywhere, boxes = codec_quality.measure(engine, "waits", 0)
    assert boxes > 90 > everywhere and kept[0].shape[0] == 1
