"""Relaxed memory reads, of a few candidates, the frame that is like the sink and unlike the tail."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slotmemory import contract
from slotmemory.errors import InputError
from slotmemory.memory import build, find
from tests.memories.seen import LAYOUT, now, stream, tell, written

PER_FRAME = LAYOUT.tokens_per_frame


def last(states):
    return list(states)[-1]


def pointing(*directions):
    """A change of `written`: frame i's keys are the basis vector directions[i] in every token and head."""

    def change(seen, layer):
        keys = torch.zeros_like(seen.keys).unflatten(1, (3, -1))
        for frame, direction in enumerate(directions):
            keys[:, frame, ..., direction] = 1 + frame  # lengths must not matter
        return seen._replace(keys=keys.flatten(1, 2))

    return change


def test_likeness_to_the_sink_less_likeness_to_the_tail_decides():
    memory = build("relaxed", LAYOUT, sink=1, candidates=3, tail=1, redundancy=0.5)
    state = memory.start(1)
    # frame 0 is the sink (direction 0); 1 is like neither, 2 like the sink; 3 like the tail, 4 like neither, 5 the tail
    for chunk, directions in enumerate(((0, 1, 0), (2, 3, 2))):
        state = tell(memory, state, written(now(chunk), change=pointing(*directions)))
    candidates = state["candidates"][0]
    assert candidates.born.tolist() == [[2, 3, 4]]
    torch.testing.assert_close(candidates.score, torch.tensor([[1.0, -0.5, 0.0]]))
    assert [bank.born.tolist() for bank in memory.read(state, 0, now(2))] == [[[0]], [[2]], [[5]]]


def test_scores_follow_the_formula_on_random_keys():
    memory = build("relaxed", LAYOUT, redundancy=0.3)
    state = last(stream(memory, 4))
    for layer in range(LAYOUT.layers):
        sink, found, tail = (state[name][layer].keys for name in ("sink", "candidates", "tail"))
        near, far = (F.normalize(x.mean((1, 2)).flatten(1), dim=1) for x in (sink, tail))
        each = F.normalize(found.mean(2).flatten(2), dim=2)
        expected = (each * near).sum(-1) - 0.3 * (each * far).sum(-1)
        torch.testing.assert_close(state["candidates"][layer].score, expected)


def test_candidates_are_the_last_frames_that_the_tail_has_passed():
    state = last(stream(build("relaxed", LAYOUT), 5))
    assert [state[name][0].born[0].tolist() for name in ("sink", "candidates", "tail")] == [
        [0, 1],
        [10, 11, 12, 13],
        [14],
    ]


def test_every_row_of_a_batch_chooses_for_itself():
    memory = build("relaxed", LAYOUT)
    state = last(stream(memory, 6, seeds=(1, 2, 3, 4, 5, 6)))
    chosen = memory.read(state, 0, now(6, batch=6))[1].born[:, 0].tolist()
    assert len(set(chosen)) > 1


def test_reading_all_of_enough_candidates_is_dense_attention():
    engine = replace(contract.toy(), context_noise=0.0)
    trial = contract.Trial(find("relaxed"), engine)
    found = trial.run(trial.memory(candidates=15, history=15), prompts=contract.ONE_PROMPT)
    expected = contract.dense(engine, contract.ONE_PROMPT[0], trial.chunks, (7,), past=True)
    torch.testing.assert_close(found, expected, atol=contract.CLOSE, rtol=0)


@pytest.mark.parametrize(
    "frames, held", [(0, (0, 0, 0)), (1, (1, 0, 0)), (3, (2, 0, 1)), (5, (2, 2, 1)), (9, (2, 4, 1))]
)
def test_a_budget_buys_the_sink_then_the_tail_then_candidates(frames, held):
    state = last(stream(build("relaxed", LAYOUT, frames * PER_FRAME + 3), 5))
    assert tuple(state[name][0].items for name in ("sink", "candidates", "tail")) == held


@pytest.mark.parametrize(
    "options, message",
    [(dict(tail=-1), "tail=-1 is too small"), (dict(history=5), "history=5 frames cannot be chosen from candidates=4")],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        build("relaxed", LAYOUT, **options)
