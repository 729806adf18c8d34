"""Merged means are what the formula says, are read where they should stand, and cost what the budget grants."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.memory import build
from tests.memories.seen import LAYOUT, now, stream, tell, written

PER_FRAME = LAYOUT.tokens_per_frame


def last(states):
    return list(states)[-1]


def frame_keys(frame, layer=0, what="keys"):
    """The random keys that `written` gives to one latent frame, [1, n, H, D]."""
    seen = written(now(frame // 3)).layers[layer]
    return getattr(seen, what).unflatten(1, (3, -1))[:, frame % 3]


def mean_of(*frames, what="keys"):
    return torch.stack([frame_keys(frame, what=what) for frame in frames]).mean(0)


def test_a_mean_starts_as_the_first_frames_that_leave_and_moves_by_its_rate_per_chunk():
    memory = build("merged", LAYOUT, sink=3, window=9, long=0.01, short=0.25)  # 3 past frames beside sink and chunk
    state = last(stream(memory, 5))  # frames 3 to 5, 6 to 8 and 9 to 11 have left the window
    for what in ("keys", "values"):
        first, second, third = (mean_of(*frames, what=what) for frames in ((3, 4, 5), (6, 7, 8), (9, 10, 11)))
        for name, rate in (("long", 0.01), ("short", 0.25)):
            expected = (1 - rate) * ((1 - rate) * first + rate * second) + rate * third
            torch.testing.assert_close(getattr(state[name][0], what)[:, 0], expected)


def test_no_mean_exists_before_a_frame_has_left_the_window():
    memory = build("merged", LAYOUT, sink=3, window=9)
    assert last(stream(memory, 2))["long"] == [] and last(stream(memory, 3))["long"][0].items == 1


def test_a_mean_over_the_frame_gives_every_token_the_same_vector():
    memory = build("merged", LAYOUT, sink=3, window=9, pool="frame")
    state = last(stream(memory, 3))
    expected = mean_of(3, 4, 5).mean(1, keepdim=True).expand(-1, PER_FRAME, -1, -1)
    torch.testing.assert_close(state["long"][0].keys[:, 0], expected)


def test_sink_means_and_window_stand_side_by_side_before_the_chunk():
    memory = build("merged", LAYOUT, sink=3, window=10)
    found = memory.read(last(stream(memory, 6)), 0, now(6))
    assert [bank.items for bank in found] == [3, 1, 1, 4]
    assert torch.cat([bank.positions[0, :, 0, 0] for bank in found]).tolist() == list(range(18 - 9, 18))
    assert found[1].born.tolist() == [[3]]  # the first frame that is part of it


def test_one_slow_mean_without_a_sink_is_the_ema_sink():
    memory = build("merged", LAYOUT, sink=0, window=9, short=0)
    state = last(stream(memory, 4))  # frames 0 to 2, then 3 to 5 have left
    assert set(state) == {"sink", "long", "window"}
    torch.testing.assert_close(state["long"][0].keys[:, 0], 0.99 * mean_of(0, 1, 2) + 0.01 * mean_of(3, 4, 5))


def test_means_keep_small_steps_that_the_models_precision_would_lose():
    memory = build("merged", LAYOUT, sink=0, window=6, long=0.01)

    def constant(value):
        return lambda seen, layer: seen._replace(
            keys=torch.full_like(seen.keys, value, dtype=torch.bfloat16), values=seen.values.bfloat16()
        )

    state = memory.start(1)
    for chunk, value in enumerate((1.0, 1.1, 1.1, 1.1, 0.0)):
        state = tell(memory, state, written(now(chunk), change=constant(value)))
    kept = torch.tensor(1.1).bfloat16().float()
    expected = kept + (1 - kept) * 0.99**3  # 1.1 after 1.1, each a hundredth of the way
    torch.testing.assert_close(state["long"][0].keys.mean(), expected)
    assert {bank.keys.dtype for bank in memory.read(state, 0, now(5))} == {torch.bfloat16}


@pytest.mark.parametrize(
    "frames, held", [(0, (0, 0, 0)), (2, (2, 0, 0)), (4, (3, 1, 0)), (5, (3, 2, 0)), (7, (3, 2, 2)), (99, (3, 2, 4))]
)
def test_a_budget_buys_the_sink_then_the_means_then_the_window(frames, held):
    memory = build("merged", LAYOUT, frames * PER_FRAME + PER_FRAME - 1)
    state = last(stream(memory, 6))
    means = sum(state[name][0].items for name in ("long", "short") if name in state)
    assert (state["sink"][0].items, means, state["window"][0].items) == held


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(long=1.5), "long=1.5 is no share of a mean"),
        (dict(pool="frmae"), "unknown pool 'frmae'; did you mean 'frame'?"),
        (dict(window=5), "window=5 cannot hold sink=3"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        build("merged", LAYOUT, **options)
    assert message in str(refusal.value)
