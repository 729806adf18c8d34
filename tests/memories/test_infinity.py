"""The `infinity` memory repeats Infinity-RoPE's recorded rollouts: relative places, flushes and cuts."""

from dataclasses import replace

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.memory import build
from tests.memories.rollouts import CLOSE, FOUR, TWO, stepped
from tests.memories.seen import LAYOUT, now, stream
from tests.recorded import tensors

SCENARIOS = {
    "scenes": (TWO, {0: "p0", 3: "p1", 5: "p2"}, dict(cuts=2)),
    "single": (FOUR, {0: "p0"}, dict(window=9)),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_rollouts_equal_the_published_ones(name):
    g = tensors("infinity_rope_rollout")
    steps, prompts, options = SCENARIOS[name]
    expected = g[f"{name}.latents"]
    latents, states, _ = stepped("infinity", steps, expected.shape[1], prompts, **options)
    torch.testing.assert_close(latents, expected, **CLOSE)
    # after the last chunk the published cache holds sink and window, keys un-rotated; the sink's stands at frame 0
    for part, wanted in (("keys", g[f"{name}.cache_k"]), ("values", g[f"{name}.cache_v"])):
        held = torch.stack([getattr(bank, part).flatten(1, 2) for bank in states[-1]["window"]])
        torch.testing.assert_close(held, wanted[:, :, -held.shape[2] :], **CLOSE)
    sink = torch.stack([bank.values.flatten(1, 2) for bank in states[-1]["sink"]])
    torch.testing.assert_close(sink, g[f"{name}.cache_v"][:, :, : sink.shape[2]], **CLOSE)


def places(memory, state, moment):
    return torch.cat([bank.positions[0, :, 0, 0] for bank in memory.read(state, 0, moment)]).tolist()


def late(**options):
    memory = build("infinity", LAYOUT, **options)
    return memory, list(stream(memory, 8))[-1]


def test_keys_stand_directly_before_the_chunk_however_old_they_are():
    memory, state = late(window=9)
    assert places(memory, state, now(8)) == list(range(18, 24))


def test_a_prompt_switch_keeps_the_sink_and_the_last_two_frames_and_replays_nothing():
    memory, state = late(window=9)
    flushed, replay = memory.switch(state, now(8))
    assert replay == 0 and memory.replays == 0
    assert [bank.born[0].tolist() for name in ("sink", "window") for bank in flushed[name][:1]] == [[0], [22, 23]]
    assert places(memory, flushed, now(8)) == [21, 22, 23]


@pytest.mark.parametrize(
    "cuts, shots", [(None, []), ("all", [1, 2, 3]), (2, [2]), ("1 3", [1, 3]), ("1,2", [1, 2]), ("", [])]
)
def test_a_cut_pushes_the_past_away_for_one_chunk_of_the_shots_it_is_asked_for(cuts, shots):
    memory, state = late(cuts=cuts)
    for shot in (1, 2, 3):
        moment = now(8)
        switched, after = replace(moment, switched=True, shot=shot), replace(moment, shot=shot)
        near, far = list(range(21, 24)), [24 - 45, 24 - 44, 24 - 43]
        assert places(memory, state, switched) == (far if shot in shots else near)
        assert places(memory, state, after) == near


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(flush=-1), "flush=-1 is negative; use a number of latent frames, 0 or more"),
        (dict(cut=3), "cut=3 is nearer than a window of 6 latent frames"),
        (dict(cuts="first"), "cuts='first' is neither 'all' nor shot numbers such as 2 or '1 3'"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("infinity", LAYOUT, **options)
    assert message in str(refusal.value)


def test_a_cut_is_never_nearer_than_a_long_window():
    short, long = build("infinity", LAYOUT), build("infinity", LAYOUT, window=60)
    assert short.cut == 45 and long.cut == long.window == 60
