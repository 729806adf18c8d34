"""Properties of the tokens that are chosen for each slot."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmemory.slots import select

few = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def assignments(draw, max_rows=3):
    """An assignment [B, S, N] of F latent frames, coarse enough to hold ties and often leaving slots empty; and F."""
    rows, slots, latents = draw(st.integers(1, max_rows)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    per_frame = draw(st.integers(slots, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randint(-3, 4, (rows, slots, latents * per_frame), generator=generator).float()
    logits += draw(st.sampled_from([0.0, 3.0, 30.0])) * torch.randn(rows, slots, 1, generator=generator)
    return logits.softmax(dim=-2), latents


def largest_count(assignment, latents, frames):
    slots, tokens = assignment.shape[-2:]
    return (tokens // latents if frames == "first" else tokens) // slots


@st.composite
def calls(draw):
    assignment, latents = draw(assignments())
    frames = draw(st.sampled_from([None, "balanced", "first"]))
    count = draw(st.integers(1, largest_count(assignment, latents, frames)))
    spread = draw(st.sampled_from([0.0, 0.5, 1.0]))
    keys = torch.randn(*assignment.shape[::2], 4, generator=torch.Generator().manual_seed(0))
    return assignment, dict(count=count, latents=latents, frames=frames, spread=spread, keys=keys)


@few
@given(calls())
def test_no_token_serves_two_slots_and_every_slot_gets_exactly_its_count_in_order(call):
    assignment, arguments = call
    chosen = select(assignment, **arguments)
    rows, slots, _ = assignment.shape
    assert chosen.indices.shape == chosen.owned.shape == (rows, slots, arguments["count"])
    assert bool((chosen.indices.diff(dim=-1) > 0).all())
    for row in chosen.indices.flatten(1):
        assert row.unique().numel() == row.numel()
    limit = assignment.shape[-1] // (arguments["latents"] if arguments["frames"] == "first" else 1)
    assert 0 <= chosen.indices.min() and chosen.indices.max() < limit


@few
@given(calls())
def test_a_token_is_owned_where_its_winner_is_the_slot_and_others_come_only_when_own_ones_run_out(call):
    assignment, arguments = call
    chosen = select(assignment, **arguments)
    limit = assignment.shape[-1] // (arguments["latents"] if arguments["frames"] == "first" else 1)
    winner = assignment.argmax(dim=-2)
    for b, s in ((b, s) for b in range(assignment.shape[0]) for s in range(assignment.shape[1])):
        assert chosen.owned[b, s].tolist() == (winner[b, chosen.indices[b, s]] == s).tolist()
        have = int((winner[b, :limit] == s).sum())
        assert int(chosen.owned[b, s].sum()) == min(have, arguments["count"])


@few
@given(calls())
def test_rows_are_chosen_as_if_they_were_alone(call):
    assignment, arguments = call
    arguments = arguments | dict(spread=0.0)
    together = select(assignment, **arguments)
    for b in range(assignment.shape[0]):
        alone = select(assignment[b], **(arguments | dict(keys=None)))
        assert torch.equal(alone.indices, together.indices[b]) and torch.equal(alone.owned, together.owned[b])
    stacked = select(assignment.expand(2, *assignment.shape), **arguments)
    assert torch.equal(stacked.indices[1], together.indices)


@few
@given(assignments(), st.booleans())
def test_without_frames_and_spread_the_heaviest_own_tokens_are_chosen_and_ties_go_to_the_lower_index(drawn, exclusive):
    assignment, _ = drawn
    count = largest_count(assignment, 1, None)
    chosen = select(assignment, count, exclusive=exclusive)
    winner = assignment.argmax(dim=-2)
    for b, s in ((b, s) for b in range(assignment.shape[0]) for s in range(assignment.shape[1])):
        weights = assignment[b, s].tolist()
        own = [t for t in range(len(weights)) if not exclusive or winner[b, t] == s]
        expected = sorted(own, key=lambda t: (-weights[t], t))[:count]
        assert set(expected) <= set(chosen.indices[b, s].tolist())


@few
@given(assignments())
def test_balanced_frames_give_as_evenly_as_they_can(drawn):
    assignment, latents = drawn
    count = largest_count(assignment, latents, "balanced")
    chosen = select(assignment, count, latents=latents, frames="balanced")
    per_frame = assignment.shape[-1] // latents
    winner = assignment.argmax(dim=-2)
    for b, s in ((b, s) for b in range(assignment.shape[0]) for s in range(assignment.shape[1])):
        own = chosen.indices[b, s][chosen.owned[b, s]]
        given = torch.bincount(own // per_frame, minlength=latents)
        have = torch.bincount((winner[b] == s).nonzero().flatten() // per_frame, minlength=latents)
        # A frame gives fewer than another only if it gave all it had, or by one token if it comes later.
        for f in range(latents):
            for g in range(latents):
                assert given[f] == have[f] or given[f] + (f > g) >= given[g]


def test_sixty_four_tokens_of_three_even_frames_are_22_21_and_21():
    weights = torch.rand(7, 3 * 400, generator=torch.Generator().manual_seed(0))
    chosen = select(weights / weights.sum(dim=0), 64, latents=3, frames="balanced")
    assert bool(chosen.owned.all())
    for slot in chosen.indices:
        assert torch.bincount(slot // 400).tolist() == [22, 21, 21]


@few
@given(assignments(), st.data())
def test_renaming_the_slots_renames_the_choice(drawn, data):
    assignment, _ = drawn
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    assignment = (assignment.log() + 1e-3 * torch.randn(assignment.shape, generator=generator)).softmax(dim=-2)
    order = torch.randperm(assignment.shape[1], generator=generator)
    count = largest_count(assignment, 1, None)
    plain, renamed = select(assignment, count), select(assignment[:, order], count)
    assert torch.equal(renamed.indices, plain.indices[:, order])


def test_plain_top_r_lets_slots_share_tokens():
    weights = torch.tensor([[0.6, 0.6, 0.5, 0.1], [0.4, 0.4, 0.5, 0.9]])
    assert select(weights, 2, exclusive=False).indices.tolist() == [[0, 1], [2, 3]]
    assert select(weights, 3, exclusive=False).indices.tolist() == [[0, 1, 2], [0, 2, 3]]
    assert select(weights, 3, exclusive=False).owned.tolist() == [[True, True, True], [False, False, True]]


def test_an_empty_slot_is_reported_and_takes_only_what_nobody_chose():
    weights = torch.full((4, 100), 0.01)
    weights[0, :50], weights[1, 50:], weights[3, 50:60] = 0.97, 0.98, 0.0
    weights[2] += torch.linspace(0, 1e-3, 100)
    chosen = select(weights, 20)
    assert chosen.empty.tolist() == [False, False, True, True]
    assert chosen.owned.sum(dim=-1).tolist() == [20, 20, 0, 0]
    assert chosen.indices[2].tolist() == list(range(80, 100))
    torch.testing.assert_close(chosen.mass, weights.mean(dim=-1))


def test_the_mass_is_that_of_the_whole_chunk_even_if_only_the_first_frame_is_stored():
    weights = torch.tensor([[0.9, 0.8, 0.0, 0.1], [0.1, 0.2, 1.0, 0.9]])
    chosen = select(weights, 1, latents=2, frames="first")
    assert chosen.indices.tolist() == [[0], [1]] and chosen.owned.tolist() == [[True], [False]]
    torch.testing.assert_close(chosen.mass, torch.tensor([0.45, 0.55]))
    assert chosen.empty.tolist() == [False, False]


def test_a_spread_choice_reaches_the_small_part_that_the_heaviest_tokens_leave_out():
    # One slot; 90 much alike heavy tokens, and a light hat of 5 and a light shoe of 5 with keys of their own.
    keys = 0.01 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    keys[90:95, 0] += 5
    keys[95:, 1] += 5
    weights = torch.linspace(1.0, 0.5, 100).unsqueeze(0)
    assert select(weights, 20).indices.max() < 90
    spread = select(weights, 20, spread=0.5, keys=keys).indices[0]
    assert torch.equal(spread[:10], torch.arange(10))
    assert bool(((spread >= 90) & (spread < 95)).any()) and bool((spread >= 95).any())


def test_farthest_points_follow_the_plain_algorithm():
    generator = torch.Generator().manual_seed(0)
    keys, logits = torch.randn(2, 60, 4, generator=generator), torch.randn(2, 3, 60, generator=generator)
    chosen = select(logits.softmax(dim=-2), 10, spread=0.5, keys=keys)
    for b in range(2):
        for s in range(3):
            own = (logits[b].argmax(dim=0) == s).nonzero().flatten().tolist()
            weights = logits[b].softmax(dim=0)[s]
            picked = sorted(own, key=lambda t: -weights[t])[:5]
            while len(picked) < 10:
                distance = {t: min((keys[b, t] - keys[b, p]).norm() for p in picked) for t in own if t not in picked}
                picked.append(max(distance, key=distance.get))
            assert chosen.indices[b, s].tolist() == sorted(picked)


def test_bf16_inputs_under_autocast_give_the_choice_of_the_same_numbers_in_fp32():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(7, 400, generator=generator).softmax(dim=0).bfloat16()
    keys = torch.randn(400, 16, generator=generator).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = select(weights, 40, spread=0.5, keys=keys)
    plain = select(weights.float(), 40, spread=0.5, keys=keys.float())
    assert torch.equal(lowered.indices, plain.indices) and lowered.mass.dtype == torch.float32


def test_a_choice_that_cannot_be_made_is_refused_with_the_largest_that_can():
    weights = torch.full((7, 120), 1 / 7)
    select(weights, 17)
    with pytest.raises(ValueError, match="count=18: expected 1 to 17, as there are 120 tokens for 7 slots"):
        select(weights, 18)
    with pytest.raises(ValueError, match="count=6: expected 1 to 5, as there are 40 tokens"):
        select(weights, 6, latents=3, frames="first")
    assert select(weights, 120, exclusive=False).indices.shape == (7, 120)
    for wrong, words in [
        (dict(latents=7), "120 tokens are not a multiple of latents=7"),
        (dict(frames="last"), "frames='last'"),
        (dict(spread=2.0), "spread=2.0"),
        (dict(spread=0.5), "spread=0.5 measures distances between keys.* given none"),
        (dict(spread=0.5, keys=torch.zeros(3, 120, 4)), "given \\[3, 120, 4\\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            select(weights, 5, **wrong)
