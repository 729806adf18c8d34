"""How well groups are things, on labels whose answer is known by hand."""

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.evaluation.grouping import adjusted_rand_index, measure

TRUTH = torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2]])


def test_the_truth_under_other_names_is_perfect():
    quality = measure((TRUTH + 2) % 3, TRUTH, 3)
    assert quality == pytest.approx((1, 1, 1, 1, 1))


def test_one_group_for_everything_tells_nothing_apart():
    quality = measure(torch.zeros_like(TRUTH), TRUTH, 3)
    assert quality.fg_ari == pytest.approx(0) and quality.usage == 0
    assert quality.mbo == quality.mbo_chunk == pytest.approx(1 / 3)
    assert quality.bound == 1


def test_groups_that_swap_things_between_chunks_are_right_in_each_and_wrong_over_the_clip():
    found = torch.stack((TRUTH[0], torch.tensor([0, 0, 2, 2, 1, 1])))
    quality = measure(found, TRUTH, 3)
    assert quality.mbo_chunk == 1 and quality.bound == 0
    assert quality.mbo == pytest.approx(1 / 3)  # 2 of the 4 tokens of a thing, in a union of 6
    assert quality.fg_ari < 0


def test_a_group_that_spills_over_the_background_is_seen_by_overlap_alone():
    found = torch.tensor([[1, 1, 1, 1, 2, 2]] * 2)
    quality = measure(found, TRUTH, 3)
    assert quality.fg_ari == 1 and quality.mbo == pytest.approx((0.5 + 1) / 2)


def test_the_rand_index_equals_the_count_by_hand():
    # of 6 pairs, first puts 2 together, second 3, both 1: (1 - 2 * 3 / 6) / ((2 + 3) / 2 - 2 * 3 / 6)
    assert adjusted_rand_index(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])) == pytest.approx(0)
    # of 10 pairs, first 4, second 4, both 2
    a, b = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 1])
    assert adjusted_rand_index(a, b) == pytest.approx((2 - 1.6) / (4 - 1.6))


def test_what_a_clip_does_not_show_is_not_scored():
    empty = measure(torch.zeros(2, 4), torch.zeros(2, 4), 3)
    assert empty[:4] == (None,) * 4
    alone = measure(torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0, 1], [0, 0]]), 2)
    assert alone.fg_ari is None and alone.bound is None and alone.mbo == 1


def test_labels_of_different_clips_are_refused():
    with pytest.raises(InputError, match="expected two"):
        measure(torch.zeros(2, 4), torch.zeros(2, 5), 3)
