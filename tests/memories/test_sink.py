"""Sink and window keep the frames they say, where they say, within what they are given."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.memory import build
from tests.memories.seen import LAYOUT, now, stream

PER_FRAME = LAYOUT.tokens_per_frame


def last(states):
    return list(states)[-1]


def read_frames(memory, state, chunk):
    return [frame for bank in memory.read(state, 0, now(chunk)) for frame in bank.born[0].tolist()]


def test_the_window_keeps_the_newest_frames_and_counts_the_chunk_itself():
    memory = build("window", LAYOUT, window=9)
    assert read_frames(memory, last(stream(memory, 5)), 5) == [9, 10, 11, 12, 13, 14]


def test_the_sink_keeps_the_first_frames_beside_the_window():
    memory = build("sink", LAYOUT, sink=2, window=9)
    assert read_frames(memory, last(stream(memory, 5)), 5) == [0, 1, 11, 12, 13, 14]


@pytest.mark.parametrize("frames, read", [(0, []), (1, [0]), (3, [0, 1, 2]), (5, [0, 1, 2, 13, 14]), (99, None)])
def test_a_budget_buys_the_sink_first_and_then_the_window(frames, read):
    memory = build("sink", LAYOUT, frames * PER_FRAME + PER_FRAME - 1, sink=3, window=12)
    state = last(stream(memory, 5))
    assert read_frames(memory, state, 5) == ([0, 1, 2, *range(9, 15)] if read is None else read)


def test_relative_places_stand_directly_before_the_chunk_without_gaps():
    memory = build("sink", LAYOUT, sink=3, window=9, placing="relative")
    found = memory.read(last(stream(memory, 8)), 0, now(8))
    assert torch.cat([bank.positions[0, :, 0, 0] for bank in found]).tolist() == list(range(18, 24))


def test_capped_places_keep_the_order_within_a_chunk_and_bring_far_chunks_within_reach():
    memory = build("everything", LAYOUT, placing="capped", reach=9)
    (found,) = memory.read(last(stream(memory, 6)), 0, now(6))
    assert found.positions[0, :, 0, 0].tolist() == [9, 10, 11] * 4 + [12, 13, 14] + [15, 16, 17]


def test_rows_and_columns_stay_wherever_a_frame_is_placed():
    memory = build("sink", LAYOUT, placing="relative")
    for bank in memory.read(last(stream(memory, 6)), 0, now(6)):
        assert torch.equal(bank.positions[..., 1:], now_grid().expand_as(bank.positions[..., 1:]))


def now_grid():
    rows, columns = LAYOUT.grid
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(sink=12, window=12), "window=12 cannot hold sink=12 and a chunk of 3 latent frames; use window >= 15"),
        (dict(sink=-1), "cannot hold sink=-1"),
        (dict(placing="realtive"), "unknown placing 'realtive'; did you mean 'relative'?"),
        (dict(compat="memflow"), "compat='memflow' is not known"),
        (dict(windw=3), "unknown argument of memory 'sink' 'windw'; did you mean 'window'?"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("sink", LAYOUT, **options)
    assert message in str(refusal.value)


def test_a_negative_budget_is_refused():
    with pytest.raises(InputError, match="budget=-1 is negative"):
        build("everything", LAYOUT, -1)
    with pytest.raises(InputError, match="budget=-1 is negative"):
        build("sink", LAYOUT, -1)
