"""Anchored memory keeps the first chunk under a prompt, reads it once it is old enough, and keeps within three regions."""

from dataclasses import replace

import pytest

from slotmemory.errors import InputError
from slotmemory.memory import build
from tests.memories.seen import LAYOUT, now, tell, written

PER_FRAME = LAYOUT.tokens_per_frame


def moment(chunk, switched, replay=False):
    return replace(now(chunk), switched=switched, replay=replay)


def after(memory, chunks, switches):
    """The state once `chunks` chunks were written, with new prompts at the chunks of `switches`."""
    state = memory.start(1)
    for chunk in range(chunks):
        state = tell(memory, state, written(moment(chunk, chunk in switches)))
    return state


def shown(memory, chunks, switches):
    """Frames read for the next chunk and where they stand, counted from it, by region."""
    found = memory.read(after(memory, chunks, switches), 0, now(chunks))
    return [(bank.born[0].tolist(), (bank.positions[0, :, 0, 0] - 3 * chunks).tolist()) for bank in found if bank.items]


def test_the_regions_are_the_published_ones_of_21_latent_frames():
    # the chunk is the last 3 of 21, so place -18 is 0, -12 is 6 and -6 is 12
    sink, junction, window = shown(build("anchored", LAYOUT), 20, {8})
    assert sink == ([0, 1, 2], [-18, -17, -16])
    assert junction == ([24, 25, 26], [-12, -11, -10])
    assert window == (list(range(54, 60)), [-6, -5, -4, -3, -2, -1])


def test_a_young_stream_stands_at_its_own_frames():
    sink, window = shown(build("anchored", LAYOUT), 3, set())
    assert sink == ([0, 1, 2], [-9, -8, -7]) and window == (list(range(3, 9)), list(range(-6, 0)))


@pytest.mark.parametrize("chunk, junction", [(9, None), (10, None), (11, None), (12, [24, 25, 26]), (13, [24, 25, 26])])
def test_a_junction_is_read_once_it_is_older_than_the_window(chunk, junction):
    regions = [frames for frames, _ in shown(build("anchored", LAYOUT), chunk, {8})]
    assert (regions[1] if len(regions) == 3 else None) == junction


@pytest.mark.parametrize("chunk, junction", [(9, [6, 7, 8]), (11, [6, 7, 8]), (12, [24, 25, 26])])
def test_until_then_the_junction_of_the_prompt_before_is_read(chunk, junction):
    assert shown(build("anchored", LAYOUT), chunk, {2, 8})[1][0] == junction


def test_a_junction_before_that_is_still_in_the_window_is_not_read_twice():
    assert [frames for frames, _ in shown(build("anchored", LAYOUT), 8, {5, 7})] == [[0, 1, 2], list(range(18, 24))]


def test_only_the_last_two_junctions_are_held():
    state = after(build("anchored", LAYOUT), 12, {2, 5, 8})
    assert state["junction"][0].born.tolist() == [[24, 25, 26]] and state["prior"][0].born.tolist() == [[15, 16, 17]]
    assert state["switches"] == [15, 24]


def test_a_replay_neither_makes_a_junction_nor_shows_one_of_the_frames_it_computes_again():
    memory = build("anchored", LAYOUT)
    state, replay = memory.switch(after(memory, 10, {8}), moment(10, True))
    assert replay == 9 and not state["window"]
    past = moment(7, True, replay=True)  # frames 21 to 23 and on, the junction 24 to 26 among them
    assert [bank.born.tolist() for bank in memory.read(state, 0, past)] == [[[0, 1, 2]]]
    assert memory.write(state, written(past))["switches"] == [24]


@pytest.mark.parametrize("frames, sizes", [(4, (3, 1, 0)), (7, (3, 2, 1)), (15, (3, 6, 3)), (99, (3, 6, 3))])
def test_a_budget_pays_for_both_junctions_in_proportion(frames, sizes):
    memory = build("anchored", LAYOUT, frames * PER_FRAME)
    state = after(memory, 12, {2, 5})
    held = [state[name][0].items if state[name] else 0 for name in ("sink", "window", "junction")]
    assert tuple(held) == sizes


def test_a_junction_larger_than_a_chunk_is_refused():
    with pytest.raises(InputError, match="junction=4 is not part of a chunk; use 0 to 3 latent frames"):
        build("anchored", LAYOUT, junction=4)


def test_a_shorter_trained_range_moves_the_regions_together():
    regions = shown(build("anchored", LAYOUT, trained=15), 20, {8})
    assert [places[0] for _, places in regions] == [-12, -9, -6]
