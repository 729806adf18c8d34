"""The rolling sink shows the first frames forwards and backwards, at the places an endless past would have."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.memories.rolling_sink import mirror
from slotmemory.memory import build
from tests.memories.seen import LAYOUT, now, stream

PER_FRAME = LAYOUT.tokens_per_frame


def shown(memory, chunk):
    """Latent frames read for a chunk and where they stand, counted from the chunk: [(frame, place), ...]."""
    state = list(stream(memory, chunk))[-1]
    found = memory.read(state, 0, now(chunk))
    born = [frame for bank in found for frame in bank.born[0].tolist()]
    place = [int(p) - 3 * chunk for bank in found for p in bank.positions[0, :, 0, 0]]
    return list(zip(born, place))


def by_blocks(chunk, blocks=6, sinks=5):
    """The paper's formula for blocks of 3 frames: block number and whether it is reversed, per cache slot."""
    frames = []
    for slot in range(sinks):
        index = chunk - blocks + slot
        lap, at = divmod(index, blocks)
        block = range(3 * at, 3 * at + 3) if lap % 2 == 0 else reversed(range(3 * (blocks - 1 - at), 3 * (blocks - at)))
        frames += [(frame, 3 * (index - chunk) + i) for i, frame in enumerate(block)]
    return frames + [(frame, frame - 3 * chunk) for frame in range(3 * (chunk - 1), 3 * chunk)]


@pytest.mark.parametrize("chunk", [6, 7, 8, 11, 12, 13, 19])
def test_published_sizes_show_what_the_papers_block_formula_says(chunk):
    assert shown(build("rolling_sink", LAYOUT), chunk) == by_blocks(chunk)


@pytest.mark.parametrize("chunk", [1, 3, 6])
def test_a_young_stream_reads_its_whole_past(chunk):
    assert shown(build("rolling_sink", LAYOUT), chunk) == [(f, f - 3 * chunk) for f in range(3 * chunk)]


def test_without_rolling_the_first_frames_stay_and_only_their_places_slide():
    memory = build("rolling_sink", LAYOUT, window=9, roll=False)  # 6 frames of past, 3 of them real
    assert shown(memory, 7) == [(0, -6), (1, -5), (2, -4), (18, -3), (19, -2), (20, -1)]


def test_the_mirror_turns_at_both_ends():
    assert mirror(torch.arange(9), 3).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize(
    "frames, first, recent", [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 2, 1), (9, 6, 3), (12, 9, 3), (99, 18, 3)]
)
def test_a_budget_pays_for_what_is_held(frames, first, recent):
    memory = build("rolling_sink", LAYOUT, frames * PER_FRAME)
    state = list(stream(memory, 9))[-1]
    assert (state["first"][0].items, state["recent"][0].items) == (first, recent)
    assert sum(bank.items for bank in memory.read(state, 0, now(9))) == first


def test_a_window_without_room_is_refused_with_what_would_do():
    with pytest.raises(
        InputError, match="window=5 cannot hold recent=3 and a chunk of 3 latent frames; use window >= 6"
    ):
        build("rolling_sink", LAYOUT, window=5)
