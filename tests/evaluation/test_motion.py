"""Motion: another telling of the same prompts moves as much; frozen, trembling and jolting videos are told apart."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.evaluation.motion import measure, moving, steps
from slotmemory.world.clock import chunk_frames, chunk_of
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize

PROMPTS = [
    "A red cat walks in the meadow.",
    "The meadow is empty.",
    "A blue robot jumps on the beach.",
    "A red cat walks and a blue robot waits on the beach.",
]
SMALL, LENGTH = WorldSize(80, 48), 4
SWITCHES = [LENGTH * shot for shot in range(len(PROMPTS))]


def told(seed: int) -> torch.Tensor:
    return torch.from_numpy(Narrative.from_prompts(PROMPTS, seed, LENGTH, SMALL).render())


@pytest.fixture(scope="module")
def world():
    return [told(1), told(2)]


@pytest.fixture(scope="module")
def video():
    return told(3)


def test_another_telling_moves_as_much_and_stands_still_when_the_world_does(video, world):
    found = measure(video, world, SWITCHES)
    assert 0.7 < found.amount < 1.4
    assert found.static == 0
    assert found.unrest < 0.001
    assert 0.8 < found.flicker < 1.25


def test_a_video_that_freezes_in_every_shot_has_no_motion_for_cuts_do_not_count(video, world):
    held = torch.cat([video[chunk_frames(chunk_of(t) // LENGTH * LENGTH).start][None] for t in range(len(video))])
    assert measure(held, world, SWITCHES) == (0, 1, 0, None)
    assert measure(held, world, []).amount > 0  # so it would have been the cuts


def test_a_video_that_freezes_half_way_is_static_for_half_the_time(video, world):
    half = len(video) // 2
    found = measure(torch.cat([video[:half], video[half:][:1].expand(len(video) - half, -1, -1, -1)]), world, SWITCHES)
    assert 0.3 < found.static < 0.8
    assert found.amount < 0.7 * measure(video, world, SWITCHES).amount


def test_a_video_that_trembles_moves_while_the_world_stands_still(video, world):
    shaken = torch.stack([frame.roll(t % 2, -1) for t, frame in enumerate(video)])
    found = measure(shaken, world, SWITCHES)
    assert found.unrest > 0.05
    assert found.amount > 1.5


def test_faint_noise_is_no_motion(video, world):
    noise = 2 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    found = measure((video + noise).round().clamp(0, 255).to(torch.uint8), world, SWITCHES)
    assert found.unrest < 0.001
    assert found.amount == pytest.approx(measure(video, world, SWITCHES).amount, rel=0.1)


def test_a_jolt_at_every_chunk_is_flicker_and_one_at_every_latent_is_not(video, world):
    plain = measure(video, world, SWITCHES).flicker

    def shifted(every):
        return torch.stack([frame // 2 + 40 * ((t + 3) // every % 2) for t, frame in enumerate(video)]).to(torch.uint8)

    assert measure(shifted(12), world, SWITCHES).flicker > 3 * plain
    assert measure(shifted(4), world, SWITCHES).flicker < 1.25


def test_where_nothing_could_move_there_is_nothing_to_tell(video):
    still = video[:1].expand(45, -1, -1, -1)
    found = measure(video[:45], [still], [0])
    assert (found.amount, found.static, found.flicker) == (None, None, None)
    assert found.unrest > 0


def test_steps_and_moving_blocks_are_counted():
    video = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    video[1, :, :2, :4] = 255  # two of 24 x 24 blocks
    assert float(moving(video)[0]) == pytest.approx(2 / 576)
    assert float(steps(video)[0]) == pytest.approx(8 / 48**2)


def test_videos_of_other_lengths_are_named(video, world):
    with pytest.raises(InputError, match="as long and as large"):
        measure(video[:45], world, SWITCHES)
    with pytest.raises(InputError, match="as long and as large"):
        measure(video, [], SWITCHES)
