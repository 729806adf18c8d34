"""Other ways to deal tokens to groups, on tokens whose right grouping is known."""

import pytest
import torch

from slotmemory.slots.groupings import cells, dice, kmeans, labelled, ranked, shuffled

TRUTH = torch.tensor([0, 1, 1, 2, 0, 2, 1, 2, 2, 0])  # 3, 3 and 4 tokens


def blobs(truth=TRUTH, spread=0.05, seed=0, dim=6):
    """Tokens [1, N, C] around one direction per blob."""
    noise = torch.randn(len(truth), dim, generator=torch.Generator().manual_seed(seed))
    return (torch.eye(dim)[truth] + spread * noise)[None]


def together(labels):
    """Which tokens share a group: [N, N]."""
    return labels[:, None] == labels


def test_k_means_finds_blobs_and_gives_the_same_labels_every_time():
    labels = kmeans(blobs(), 3)[0]
    assert torch.equal(together(labels), together(TRUTH))
    assert torch.equal(labels, kmeans(blobs(), 3)[0])


def test_clusters_started_from_earlier_centres_keep_their_numbers_wherever_their_tokens_went():
    tokens = blobs()
    labels = kmeans(tokens, 3)
    centres = labelled(tokens, labels, 3).slots
    order = torch.randperm(len(TRUTH), generator=torch.Generator().manual_seed(3))
    later = blobs(TRUTH[order], seed=1)
    assert torch.equal(kmeans(later, 3, centres)[0], labels[0, order])
    assert torch.equal(kmeans(later, 3, centres.flip(-2))[0], 2 - labels[0, order])


def test_a_centre_without_tokens_moves_to_where_tokens_are_far_from_theirs():
    centres = torch.stack((torch.eye(6)[0], torch.full((6,), 50.0), torch.full((6,), -50.0)))[None]
    assert torch.equal(together(kmeans(blobs(), 3, centres)[0]), together(TRUTH))


def test_more_clusters_than_different_tokens_leave_some_empty():
    labels = kmeans(blobs(spread=0.0), 5)[0]
    assert torch.equal(together(labels), together(TRUTH))


def test_a_batch_is_clustered_row_by_row_as_each_row_alone():
    rows = torch.cat([blobs(TRUTH.roll(i), seed=i, spread=0.4) for i in range(4)])
    assert torch.equal(kmeans(rows, 4), torch.cat([kmeans(row[None], 4) for row in rows]))


def test_a_group_is_the_mean_of_its_tokens_and_its_columns_sum_to_1():
    tokens = blobs()
    found = labelled(tokens, TRUTH, 4)
    torch.testing.assert_close(found.slots[0, 1], tokens[0, TRUTH == 1].mean(0))
    torch.testing.assert_close(found.assignment.sum(-2), torch.ones(1, 10))
    assert torch.equal(found.assignment[0].argmax(0), TRUTH)
    assert not found.slots[0, 3].any() and float(found.assignment[0, 3].mean()) < 0.01


def test_in_a_group_tokens_that_lean_towards_another_come_last():
    tokens = blobs(spread=0.0)
    tokens[0, 5] = 0.7 * torch.eye(6)[2] + 0.3 * torch.eye(6)[0]
    found = labelled(tokens, TRUTH, 3)
    assert found.assignment[0, 2, TRUTH == 2].argmin() == 1  # token 5 is the second of blob 2


def test_shuffling_keeps_every_slots_share_of_every_frame_and_moves_its_tokens():
    assignment = torch.randn(2, 3, 4, 30, generator=torch.Generator().manual_seed(0)).softmax(-2)
    found = shuffled(assignment, 3, dice(0, 5))
    for before, after in zip(assignment.split(10, -1), found.split(10, -1)):
        torch.testing.assert_close(before.sum(-1), after.sum(-1))
        assert not torch.equal(before, after)
        assert torch.equal(before.sort(-1).values, after.sort(-1).values)
    assert torch.equal(found, shuffled(assignment, 3, dice(0, 5)))
    assert not torch.equal(found, shuffled(assignment, 3, dice(0, 6)))
    assert not torch.equal(found, shuffled(assignment, 3, dice(1, 5)))


def test_shuffled_rows_of_a_batch_are_shuffled_alike_and_layers_apart():
    assignment = torch.eye(30).expand(2, 3, 30, 30)
    found = shuffled(assignment, 1, dice(0, 0))
    assert torch.equal(found[:, 0], found[:, 1]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    "grid, count", [((4, 4), 4), ((4, 4), 3), ((30, 52), 7), ((3, 5), 4), ((1, 9), 4), ((9, 1), 4), ((30, 30), 11)]
)
def test_cells_are_rectangles_that_cover_the_frame_and_are_about_as_large(grid, count):
    labels = cells(grid, count).view(grid)
    assert set(labels.flatten().tolist()) == set(range(count))
    sizes = []
    for cell in range(count):
        rows, columns = (labels == cell).nonzero().unbind(1)
        size = len(rows)
        assert size == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        sizes.append(size)
    per_row = [len(row.unique()) for row in labels]
    assert max(per_row) - min(per_row) <= 1
    assert max(sizes) <= 3 * min(sizes)  # whole tokens of a coarse grid


def test_seven_cells_of_a_wide_frame_are_rows_of_three_and_four_not_strips():
    labels = cells((30, 52), 7).view(30, 52)
    assert sorted(len(row.unique()) for row in (labels[0], labels[-1])) == [3, 4]


def test_ids_get_groups_in_ascending_order_and_rare_ones_join_the_most_frequent():
    ids = torch.tensor([[7, 7, 7, 0, 0, 2, 2, 5], [4, 4, 4, 4, 4, 4, 4, 4]])
    labels, names = ranked(ids, 3, unused=9)
    assert names.tolist() == [[0, 2, 7], [4, 10, 11]]
    assert labels.tolist() == [[2, 2, 2, 0, 0, 1, 1, 2], [0] * 8]
