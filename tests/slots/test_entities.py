"""Duplicate slots become one, and identities are kept, given back and born."""

import pytest
import torch

from slotmemory.slots import Grouper
from slotmemory.slots.entities import identify, merge

A, B, C, D = torch.eye(4)


def slots(*vectors):
    return torch.stack(vectors)[None]


def near(vector, by=0.1, seed=0):
    return vector + by * torch.randn(4, generator=torch.Generator().manual_seed(seed)) / 2


def names(*numbers):
    return torch.tensor([numbers])


def dealt(*shares):
    """An assignment whose slots hold these shares of ten tokens each: [1, S, 10]."""
    return torch.tensor(shares)[None, :, None].expand(1, -1, 10)


# duplicates


def test_slots_more_alike_than_the_threshold_pool_their_tokens_in_the_heavier_one():
    found = merge(slots(A, B, near(A)), dealt(0.2, 0.5, 0.3), 0.9)
    assert found.alive.tolist() == [[False, True, True]]
    torch.testing.assert_close(found.assignment, dealt(0.0, 0.5, 0.5))
    torch.testing.assert_close(found.slots[0, 2], 0.4 * A + 0.6 * near(A))
    assert torch.equal(found.slots[0, 1], B)


def test_nothing_is_merged_below_the_threshold_and_nothing_changes_to_the_bit():
    given, assignment = slots(near(A), near(B), near(C)), dealt(0.2, 0.3, 0.5)
    found = merge(given, assignment, 0.9)
    assert bool(found.alive.all()) and torch.equal(found.slots, given) and torch.equal(found.assignment, assignment)


def test_a_chain_of_likenesses_does_not_join_its_unlike_ends():
    def angle(degrees):
        turn = torch.tensor(degrees).deg2rad()
        return turn.cos() * A + turn.sin() * B

    found = merge(slots(angle(0.0), angle(30.0), angle(60.0)), dealt(0.5, 0.3, 0.2), 0.8)  # 30 degrees: 0.87
    assert found.alive.tolist() == [[True, False, True]]


def test_merging_does_not_depend_on_the_order_of_the_slots():
    given, assignment = slots(A, near(A), B, near(B, seed=1)), dealt(0.4, 0.1, 0.2, 0.3)
    order = torch.tensor([2, 0, 3, 1])
    one, other = merge(given, assignment, 0.9), merge(given[:, order], assignment[:, order], 0.9)
    assert torch.equal(one.alive[:, order], other.alive)
    torch.testing.assert_close(one.slots[:, order][other.alive], other.slots[other.alive])


def test_slots_that_are_not_alive_win_no_token_and_start_anew():
    grouper = Grouper.fresh(3, 4).requires_grad_(False)
    tokens, alive = torch.randn(2, 9, 4), torch.tensor([[True, False, True], [True, True, False]])
    found = grouper.again(torch.randn(2, 3, 4), tokens, alive)
    torch.testing.assert_close(found.assignment.sum(1), torch.ones(2, 9))
    assert not found.assignment[~alive].any() and bool((found.assignment[alive] > 0).all())
    assert torch.equal(found.slots[0, 1], grouper.initializer.slots[0, 1])


# identities


def told(given, active, births, **known):
    found, births = identify(given, torch.tensor([active]), 0.8, torch.tensor([births]), **known)
    return found.tolist()[0], births.tolist()[0]


def test_entities_of_a_new_stream_are_numbered_in_order_and_inactive_slots_have_none():
    assert told(slots(A, B, C), [True, False, True], 0) == ([0, -1, 1], 2)


def test_a_slot_like_itself_keeps_its_identity():
    earlier = (slots(A, B), names(4, 2))
    assert told(slots(near(A), near(B)), [True, True], 5, earlier=earlier) == ([4, 2], 5)


def test_an_entity_that_was_away_gets_its_identity_back_from_the_bank():
    earlier, bank = (slots(A, C), names(0, -1)), (slots(B, A, D), names(3, 0, -1))
    assert told(slots(A, near(B)), [True, True], 4, earlier=earlier, bank=bank) == ([0, 3], 4)


def test_an_entity_like_nobody_is_born_with_the_next_number():
    earlier, bank = (slots(A, C), names(0, -1)), (slots(B, A), names(3, 0))
    assert told(slots(A, D), [True, True], 4, earlier=earlier, bank=bank) == ([0, 4], 5)


def test_padding_of_a_bank_is_nobody():
    bank = (slots(A, B), names(-2, -3))
    assert told(slots(A, B), [True, True], 7, bank=bank) == ([7, 8], 9)


def test_slots_that_swap_their_entities_swap_their_identities():
    earlier = (slots(A, B), names(0, 1))
    assert told(slots(B, A), [True, True], 2, earlier=earlier) == ([1, 0], 2)


def test_an_identity_is_given_once_to_the_most_similar_slot():
    bank = (slots(A), names(0))
    assert told(slots(near(A, 0.5), A), [True, True], 1, bank=bank) == ([1, 0], 2)


def test_twins_keep_their_own_identities():
    earlier = (slots(A, A), names(6, 3))
    assert told(slots(A, A), [True, True], 7, earlier=earlier, bank=(slots(A, A), names(3, 6))) == ([6, 3], 7)


def test_rows_are_identified_for_themselves():
    given, active = torch.cat((slots(A, B), slots(C, A))), torch.tensor([[True, True], [True, False]])
    bank = torch.cat((slots(B), slots(C))), torch.tensor([[0], [5]])
    found, births = identify(given, active, 0.8, torch.tensor([1, 6]), None, bank)
    assert found.tolist() == [[1, 0], [5, -1]] and births.tolist() == [2, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_likeness_is_measured_in_fp32(dtype):
    found = merge(slots(A, near(A)).to(dtype), dealt(0.5, 0.5).to(dtype), 0.9)
    assert found.slots.dtype == torch.float32 and found.alive.tolist() == [[True, False]]
