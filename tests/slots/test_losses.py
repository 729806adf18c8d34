"""The two slot losses, against arithmetic done by hand and against finite differences."""

import math

import pytest
import torch

from slotmemory.slots import contrast, pair_weight, reconstruction
from slotmemory.slots.losses import feature_error
from slotmemory.slots.measure import coverage, dead_share, mass, present, sharpness, usage_entropy


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_two_slots_by_hand():
    # u = (1, 0), (0, 1); w = (1, 0), (3/5, 4/5): M = [[1, 0.6], [0, 0.8]] at tau 1.
    earlier, later = torch.tensor([[2.0, 0.0], [0.0, 7.0]]), torch.tensor([[1.0, 0.0], [3.0, 4.0]])

    def chosen(right, wrong):
        return -math.log(math.exp(right) / (math.exp(right) + math.exp(wrong)))

    row = (chosen(1.0, 0.6) + chosen(0.8, 0.0)) / 2
    col = (chosen(1.0, 0.0) + chosen(0.8, 0.6)) / 2
    assert contrast(earlier, later, tau=1.0, direction="row").item() == pytest.approx(row, rel=1e-6)
    assert contrast(earlier, later, tau=1.0, direction="col").item() == pytest.approx(col, rel=1e-6)
    assert contrast(earlier, later, tau=1.0, direction="sym").item() == pytest.approx((row + col) / 2, rel=1e-6)
    assert contrast(earlier, later, tau=1.0).item() == pytest.approx(row, rel=1e-6)


@pytest.mark.parametrize("direction", ["row", "col", "sym"])
def test_permuting_the_slots_of_both_chunks_leaves_the_contrast_unchanged(direction):
    earlier, later, order = torch.randn(6, 8), torch.randn(6, 8), torch.randperm(6)
    plain = contrast(earlier, later, direction=direction)
    torch.testing.assert_close(contrast(earlier[order], later[order], direction=direction), plain)
    assert abs(contrast(earlier, later[order], direction=direction) - plain) > 1e-3


@pytest.mark.parametrize("direction", ["row", "col", "sym"])
def test_equal_slots_give_the_logarithm_of_their_number(direction):
    same = torch.ones(2, 7, 8)
    torch.testing.assert_close(contrast(same, 3 * same, direction=direction), torch.tensor(math.log(7)))
    extra = contrast(same, same, direction=direction, negatives=torch.ones(5, 8))
    torch.testing.assert_close(extra, torch.tensor(math.log(12)))


def test_leading_axes_are_contrasted_apart_and_averaged():
    earlier, later = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    each = torch.stack([contrast(u, w) for u, w in zip(earlier, later)])
    torch.testing.assert_close(contrast(earlier, later), each.mean())


@pytest.mark.parametrize("direction", ["row", "col"])
def test_a_pair_of_weight_zero_is_neither_anchor_nor_negative(direction):
    earlier, later = torch.randn(5, 8).requires_grad_(), torch.randn(5, 8).requires_grad_()
    loss = contrast(earlier, later, weight=torch.tensor([1.0, 1, 0, 1, 1]), direction=direction)
    kept = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(loss, contrast(earlier[kept], later[kept], direction=direction))
    loss.backward()
    for x in (earlier, later):
        assert bool((x.grad[2] == 0).all()) and bool((x.grad[kept] != 0).any(dim=-1).all())


def test_weighting_all_pairs_down_weighs_the_loss_down():
    earlier, later = torch.randn(5, 8), torch.randn(5, 8)
    quarter = contrast(earlier, later, weight=torch.full((5,), 0.25))
    torch.testing.assert_close(quarter, contrast(earlier, later) / 4)


def test_without_any_pair_the_contrast_is_zero_with_finite_gradients():
    earlier, later = torch.randn(5, 8).requires_grad_(), torch.zeros(5, 8).requires_grad_()
    loss = contrast(earlier, later, weight=torch.zeros(5))
    loss.backward()
    assert loss == 0 and bool(earlier.grad.isfinite().all()) and bool(later.grad.isfinite().all())


def test_a_pair_counts_if_the_slot_is_present_in_both_chunks():
    before, after = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.9, 1 / 16 - 1e-4, 0.09, 0.0])
    assert pair_weight(before, after).tolist() == [1, 0, 0, 0]


def test_stopping_the_gradient_at_the_earlier_chunk_leaves_the_value():
    earlier, later = torch.randn(5, 8).requires_grad_(), torch.randn(5, 8).requires_grad_()
    loss = contrast(earlier, later, detach_earlier=True)
    loss.backward()
    assert earlier.grad is None and later.grad.abs().max() > 0
    torch.testing.assert_close(loss, contrast(earlier, later))


def test_extra_negatives_raise_the_contrast_and_are_pushed_away():
    earlier, later = torch.randn(5, 8), torch.randn(5, 8)
    negatives = earlier.clone().requires_grad_()
    loss = contrast(earlier, later, negatives=negatives)
    assert loss > contrast(earlier, later)
    loss.backward()
    assert contrast(earlier, later, negatives=negatives.detach() - negatives.grad) < loss


def test_wrong_arguments_of_the_contrast_are_named():
    slots = torch.randn(5, 8)
    for wrong, words in [(dict(direction="both"), "direction='both'"), (dict(tau=0), "tau=0")]:
        with pytest.raises(ValueError, match=words):
            contrast(slots, slots, **wrong)
    with pytest.raises(ValueError, match="same shape"):
        contrast(slots, slots[:4])


def grouped(num_slots=3, num_tokens=12, dim=5, sharpness=4.0, dtype=torch.float64):
    slots = torch.randn(num_slots, dim, dtype=dtype)
    logits = sharpness * torch.randn(num_slots, num_tokens, dtype=dtype)
    return slots, logits, torch.randn(num_tokens, dim, dtype=dtype)


def test_a_slot_that_points_where_its_tokens_point_reconstructs_them():
    slots = torch.eye(3)
    winner = torch.tensor([0, 2, 1, 1])
    assignment = torch.full((3, 4), 0.1).scatter(0, winner[None], 0.8)
    torch.testing.assert_close(reconstruction(slots, assignment, 5 * slots[winner]), torch.tensor(0.0))
    torch.testing.assert_close(reconstruction(slots, assignment, -slots[winner]), torch.tensor(2.0), atol=1e-5, rtol=0)


def test_only_confident_tokens_count():
    slots, tokens = torch.eye(2), torch.tensor([[1.0, 0], [0, 1.0]])
    assignment = torch.tensor([[0.9, 0.55], [0.1, 0.45]])  # the second token is wrong, its winner has 0.55
    assert reconstruction(slots, assignment, tokens).item() == pytest.approx(0.5, abs=1e-5)
    assert reconstruction(slots, assignment, tokens, threshold=0.6).item() == pytest.approx(0, abs=1e-5)


def test_without_a_confident_token_the_reconstruction_is_exactly_zero_with_finite_gradients():
    slots, tokens = torch.zeros(2, 3, 5).requires_grad_(), torch.zeros(2, 12, 5)
    logits = torch.zeros(2, 3, 12, requires_grad=True)
    loss = reconstruction(slots, logits.softmax(dim=-2), tokens)
    loss.backward()
    assert loss.item() == 0.0
    assert bool((slots.grad == 0).all()) and bool((logits.grad == 0).all())


def test_the_straight_through_gradient_is_that_of_the_soft_surrogate():
    slots, logits, tokens = (x.requires_grad_() for x in grouped())
    mix = torch.randn(5, 5, dtype=torch.float64)
    settled = logits.detach().softmax(dim=-2)
    confidence, winner = settled.max(dim=-2)
    hard = torch.eye(3, dtype=torch.float64)[:, winner]
    counted = (confidence > 0.5).double()
    assert 0 < counted.mean() < 1

    def surrogate(slots, logits):
        """Around the settled point: the hard choice, moved by how far the soft assignment moves."""
        routed = hard + logits.softmax(dim=-2) - settled
        predicted = routed.T @ (slots @ mix)
        cosine = torch.cosine_similarity(predicted, tokens.detach(), dim=-1, eps=1e-12)
        return ((counted * (1 - cosine)).sum() / (counted.sum() + 1e-6)).item()

    loss = reconstruction(slots, logits.softmax(dim=-2), tokens, decode=lambda u: u @ mix)
    loss.backward()
    assert loss.item() == pytest.approx(surrogate(slots, logits), rel=1e-9)
    assert tokens.grad is None
    step = 1e-6
    for point, arguments in ((slots, lambda x: (x, logits)), (logits, lambda x: (slots, x))):
        for index in range(point.numel()):
            move = torch.zeros(point.numel(), dtype=torch.float64)
            move[index] = step
            move = move.view_as(point)
            slope = (surrogate(*arguments(point + move)) - surrogate(*arguments(point - move))) / (2 * step)
            assert point.grad.flatten()[index].item() == pytest.approx(slope, abs=1e-8, rel=1e-6)


def test_a_confident_token_moves_the_weights_of_the_slots_that_lost_it():
    slots, logits, tokens = (x.requires_grad_() for x in grouped())
    assignment = logits.softmax(dim=-2)
    assignment.retain_grad()
    reconstruction(slots, assignment, tokens).backward()
    confident = assignment.amax(dim=-2) > 0.5
    won = assignment == assignment.amax(dim=-2)
    assert bool((assignment.grad[:, ~confident] == 0).all())
    assert bool((assignment.grad[~won & confident].abs() > 1e-6).all())
    # The winner alone is the prediction, whose length the cosine ignores: its own weight has nothing to gain.
    assert bool((assignment.grad[won].abs() < 1e-12).all())


def test_both_losses_are_fp32_from_bf16_inputs_under_autocast():
    slots, logits, tokens = grouped(dtype=torch.float32)
    slots, assignment, tokens = (x.bfloat16() for x in (slots, logits.softmax(dim=-2), tokens))
    wide = [x.float() for x in (slots, assignment, tokens)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        given = contrast(slots, slots.flip(-1)), reconstruction(slots, assignment, tokens)
    expected = contrast(wide[0], wide[0].flip(-1)), reconstruction(*wide)
    for a, b in zip(given, expected):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_an_even_assignment_is_used_fully_and_decided_nowhere():
    even = torch.full((2, 4, 10), 0.25)
    torch.testing.assert_close(usage_entropy(even), torch.ones(2))
    torch.testing.assert_close(sharpness(even), torch.full((2,), 0.25))
    assert coverage(even).tolist() == [0, 0] and dead_share(even).tolist() == [0, 0]


def test_one_slot_that_holds_everything_leaves_the_others_dead():
    single = torch.zeros(4, 10).index_fill(0, torch.tensor([2]), 1.0)
    assert mass(single).tolist() == [0, 0, 1, 0] and present(mass(single)).tolist() == [False, False, True, False]
    assert usage_entropy(single) == 0 and dead_share(single) == 0.75
    assert sharpness(single) == 1 and coverage(single) == 1
    assert usage_entropy(torch.ones(1, 10)) == 0


def test_features_told_by_slots_by_hand():
    # (3, 1) and (0, 4) are (1, -1) and (-1, 1) once they have mean 0 and deviation 1; scaling them changes nothing
    features = torch.tensor([[3.0, 1.0], [0.0, 4.0]])
    decoded = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    sure = torch.eye(2)  # token i belongs to slot i
    assert feature_error(decoded, sure, features).item() == pytest.approx((0 + 0 + 1 + 1) / 4, abs=1e-4)
    assert feature_error(decoded, sure, 10 * features).item() == pytest.approx(0.5, abs=1e-4)
    torn = torch.full((2, 2), 0.5)  # half of each: (1/2, -1/2) for both tokens
    assert feature_error(decoded, torn, features).item() == pytest.approx((0.25 * 2 + 2.25 * 2) / 4, abs=1e-4)


def test_features_are_a_fixed_target_and_teach_slots_and_assignment():
    decoded, features = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    logits = torch.randn(3, 7, requires_grad=True)
    feature_error(decoded, logits.softmax(0), features).backward()
    assert features.grad is None and decoded.grad.abs().sum() > 0 and logits.grad.abs().sum() > 0
