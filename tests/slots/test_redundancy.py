"""A bank that covers what was seen: who leaves where items repeat each other."""

import pytest
import torch

from slotmemory.slots.redundancy import covering

THINGS = torch.eye(4)


def stays(looks, scores=None, count=2, present=None, free=None):
    """Numbers of the items of one row that stay."""
    looks = torch.as_tensor(looks, dtype=torch.float32)[None]
    every = torch.ones(looks.shape[:2], dtype=torch.bool)
    score = torch.zeros(every.shape) if scores is None else torch.tensor([scores])
    present = every if present is None else torch.tensor([present])
    free = every if free is None else torch.tensor([free])
    return covering(looks, score, present, free, count)[0].nonzero().flatten().tolist()


def test_of_the_two_most_alike_the_less_relevant_leaves():
    looks = [THINGS[0], THINGS[1], THINGS[1] + 0.01, THINGS[2]]
    assert stays(torch.stack(looks), [0.1, 0.9, 0.8, 0.1], 3) == [0, 1, 3]
    assert stays(torch.stack(looks), [0.1, 0.7, 0.8, 0.1], 3) == [0, 2, 3]


def test_what_was_seen_once_outlives_what_is_relevant_and_seen_again_and_again():
    scenery = [THINGS[0] + 0.02 * THINGS[1] * k for k in range(6)]
    kept = stays(torch.stack([THINGS[2], *scenery]), [-0.9, *[0.9] * 6], 2)
    assert 0 in kept and len(kept) == 2


def test_items_that_may_not_leave_stay_and_their_doubles_go():
    looks = torch.stack([THINGS[0], THINGS[0], THINGS[1], THINGS[2]])
    assert stays(looks, [0.9, 0.1, 0.0, 0.0], 3, free=[True, False, True, True]) == [1, 2, 3]
    assert stays(looks, count=3, free=[False] * 4) == [0, 1, 2, 3]


def test_items_that_stand_for_nothing_leave_first():
    looks = torch.stack([THINGS[0], THINGS[0], THINGS[1]])
    assert stays(looks, [0.5, 0.4, float("-inf")], 2) == [0, 1]


def test_padding_is_nobodys_double_and_takes_no_place():
    looks = torch.stack([THINGS[0], THINGS[1], THINGS[0], THINGS[0]])
    assert stays(looks, count=2, present=[True, True, False, False]) == [0, 1]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_of_a_batch_choose_as_they_would_alone(count):
    draw = torch.Generator().manual_seed(0)
    looks, score = torch.randn(3, 7, 5, generator=draw), torch.randn(3, 7, generator=draw)
    present = torch.rand(3, 7, generator=draw) < 0.8
    together = covering(looks, score, present, present, count)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(together[one], covering(looks[one], score[one], present[one], present[one], count))
    assert (together.sum(1) <= max(count, 1)).all()
