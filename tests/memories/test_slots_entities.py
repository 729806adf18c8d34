"""Dynamic slots: duplicates merge, entities come, go and return under their own identity, and none is pushed out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from slotmemory.backbones.attention import Buffered
from slotmemory.contract import CHECKS, Trial, difference
from slotmemory.memories._ragged import hiding_padding, packed, real
from slotmemory.memory import build, find
from slotmemory.trace import record
from tests.memories.scenes import ONE, THREE, TWO, memory_of, scene, told
from tests.memories.seen import LAYOUT, now, stream, tell

LENGTH = LAYOUT.frames_per_chunk
# clusters of hand-made tokens need no training: what is told apart is known
CLUSTERS = dict(grouping="kmeans", merge=0.8, identify=0.8)
OTHER = [0] * 8 + [5] * 8


def items(bank, row=0):
    """Chunk and owner of each item of a row that is no padding."""
    return [(b // LENGTH, o) for b, o in zip(bank.born[row].tolist(), bank.owner[row].tolist()) if o >= 0]


def active(state, layer=0, row=0):
    return sorted(owner for owner in state["owners"][layer, row].tolist() if owner >= 0)


# merging


def test_duplicates_are_merged_and_merged_slots_store_nothing():
    plain, merging = (told(memory_of(grouping="kmeans", **o), TWO)[0] for o in ({}, dict(merge=0.8)))
    assert plain["slots"][0].items == 4
    for bank in merging["slots"]:
        assert bank.items == 2
        torch.testing.assert_close(bank.notes["mass"], torch.full((1, 2), 0.5), atol=0.02, rtol=0)


def alike_slots(**options):
    """A learned grouper of which two slots start from the same vector, so that they share whatever they bind."""
    memory = memory_of(slots=3, **options)
    table = memory.grouper.initializer.slots
    table[0, 2] = table[0, 0]
    return memory


def test_two_slots_that_bound_the_same_become_one_and_the_tokens_are_bound_once_more():
    plain, merged = (told(alike_slots(**o), TWO)[0] for o in ({}, dict(merge=0.9999)))
    assert torch.equal(plain["running"][:, :, 0], plain["running"][:, :, 2])
    for layer in range(LAYOUT.layers):
        assert active(merged, layer) in ([0, 1], [0])
        assert float(merged["mass"][layer, 0, 2]) == 0
        assert float(merged["mass"][layer, 0].sum()) == pytest.approx(1)
        # the slot that was given up starts anew with the next chunk
        assert torch.equal(merged["running"][layer, 0, 2], alike_slots().grouper.initializer.slots[0, 2])


def test_slots_without_duplicates_are_what_they_are_without_merging():
    options = dict(slots=3, slot_dim=8, tokens_per_slot=4, bank=9, record_every=1, window=9)
    merging, plain = (
        list(stream(build("slots", LAYOUT, **options, merge=o).requires_grad_(False), 4)) for o in (1.0, 0.0)
    )
    for a, b in zip(merging, plain):
        assert difference(a["running"], b["running"], "running") is None
        for mine, theirs in zip(a["slots"], b["slots"]):
            kept = real(theirs) & theirs.score.isfinite()
            assert torch.equal(mine.keys, packed(theirs, kept).keys)  # slots that held something


# births, deaths, returns


def test_the_number_of_active_slots_follows_the_number_of_entities():
    states = told(memory_of(**CLUSTERS), ONE, THREE, TWO, ONE)
    assert [len(active(state)) for state in states] == [1, 3, 2, 1]
    stored = [born for born, _ in items(states[-1]["slots"][0])]
    assert [stored.count(chunk) for chunk in range(4)] == [1, 3, 2, 1]


def test_what_inactive_slots_do_not_store_leaves_room_for_more_records():
    states = told(memory_of(**CLUSTERS, bank=1), *[TWO] * 4)
    assert [born for born, _ in items(states[1]["slots"][0])] == [0, 0, 1, 1]  # two records in the room of one


def test_an_entity_that_returns_gets_its_identity_back():
    states = told(memory_of(**CLUSTERS), TWO, ONE, OTHER, TWO)
    first, alone, other, back = (active(state) for state in states)
    assert first == [0, 1] and len(alone) == 1
    ground, hero = alone[0], ({0, 1} - {alone[0]}).pop()
    assert other == sorted([ground, 2])  # somebody new has a new number
    assert back == sorted([ground, hero])


def test_an_entity_out_of_sight_is_not_active_but_stays_in_the_bank():
    states = told(memory_of(**CLUSTERS), TWO, ONE)
    hero = (set(active(states[0])) - set(active(states[1]))).pop()
    assert (0, hero) in items(states[1]["slots"][0])


def test_an_entity_that_left_the_bank_is_born_again():
    memory = memory_of(**CLUSTERS, bank=1)
    states = told(memory, TWO, ONE)
    forgotten = [packed(bank, bank.born > 0) for bank in states[-1]["slots"]]
    state = tell(memory, {**states[-1], "slots": forgotten}, scene(2, TWO))
    assert active(state)[-1] == 2


def test_only_active_slots_are_expected_in_the_coming_chunk():
    memory = memory_of(**CLUSTERS, retrieval="visual")
    state = told(memory, TWO)[0]
    for gone in (0, 1):
        without = {**state, "owners": state["owners"].masked_fill(state["owners"] == gone, -1)}
        bank = memory.update(without, scene(1, TWO))["slots"][0]
        score = dict(zip(items(bank), bank.score[0].tolist()))
        assert score[0, 1 - gone] > 0.95 and score[0, gone] < 0.5


@pytest.mark.parametrize("options", [dict(merge=1.0), dict(identify=1.0)], ids=str)
def test_a_group_with_less_than_a_quarter_of_an_even_share_is_not_active(tmp_path, options):
    shown = (
        np.array([0] * 8 + [1] * 8).reshape(LAYOUT.grid).repeat(LENGTH).reshape(*LAYOUT.grid, LENGTH).transpose(2, 0, 1)
    )
    shown[0, 0, 0] = 2  # one token of 48; an even share is 12, and nobody has the fourth group
    np.savez(tmp_path / "masks.npz", masks=shown)
    state = told(memory_of(grouping="oracle", masks=str(tmp_path / "masks.npz"), **options), TWO)[0]
    assert len(active(state)) == state["slots"][0].items == 2


def test_identities_and_active_slots_are_told_by_look_and_by_the_trace():
    memory = memory_of(**CLUSTERS)
    before, after = told(memory, TWO, OTHER)
    assert torch.equal(memory.look(after)["owners"], after["owners"])
    trace = record(before, before, after, memory.read(before, 0, now(1)), 0)
    written = {item["owner"] for item in trace["items"] if item["kind"] == "slots" and item["born"] == LENGTH}
    assert written == set(active(after)) and 2 in written and len(written) == 2
    state = told(memory_of(), TWO)[0]
    shown = memory_of().look(state)
    assert torch.equal(shown["labels"], state["labels"]) and shown["labels"].shape[-1] == LAYOUT.tokens_per_chunk


# the floor


def one_against(floor, **options):
    """Entity 1 is seen once; then another fills the bank with items that score higher."""
    words = torch.randn(LAYOUT.heads, LAYOUT.head_dim, generator=torch.Generator().manual_seed(9))
    text = [(words.expand(1, 6, -1, -1), words.expand(1, 6, -1, -1))] * LAYOUT.layers
    memory = memory_of(**CLUSTERS, bank=1, floor=floor, retrieval="text", **options)
    state = memory.start(1)
    for chunk, shown in enumerate([TWO, *[ONE] * 8]):
        sign = -1 if chunk == 0 else 1

        def change(seen, layer, sign=sign):
            looks = seen.hidden.unflatten(-1, (LAYOUT.heads, LAYOUT.head_dim))
            return seen._replace(text_query=(sign * words).expand_as(seen.text_query), values=looks)

        state = tell(memory, state, scene(chunk, shown, text=text, change=change))
    return items(state["slots"][0]), active(state)


def test_the_floor_keeps_the_last_item_of_an_entity_that_others_would_push_out():
    pushed, present = one_against(0)
    assert {owner for _, owner in pushed} == set(present)
    kept, present = one_against(1)
    assert {owner for _, owner in kept} == {0, 1} and len(kept) == 4
    assert [item for item in kept if item[1] not in present] == [(0, 1 - present[0])]


def test_the_floor_counts_the_newest_items_of_every_owner():
    kept, present = one_against(2)
    own = [born for born, owner in kept if owner == present[0]]
    assert own[-2:] == [7, 8] and len(kept) == 4


def test_an_item_that_held_almost_nothing_is_nobodys_floor():
    memory = memory_of(floor=2, bank=2)
    state = told(memory, THREE, THREE)[-1]
    empty = torch.tensor([4])  # of slot 0, the newer of two
    banks = [replace(b, notes={**b.notes, "mass": b.notes["mass"].index_fill(1, empty, 0.0)}) for b in state["slots"]]
    kept = items(tell(memory, {**state, "slots": banks}, scene(2, THREE))["slots"][0])
    assert (0, 0) in kept and (1, 0) not in kept and len(kept) == 8


def test_a_floor_larger_than_the_bank_still_fits_into_it():
    memory = memory_of(floor=50, bank=2)
    assert [state["slots"][0].items for state in told(memory, *[THREE] * 5)] == [4, 8, 8, 8, 8]


# covering


def test_who_is_away_outlives_the_relevance_of_those_who_are_seen_again_and_again():
    kept, present = one_against(0, evict="redundancy")
    assert {owner for _, owner in kept} == {0, 1} and len(kept) == 4
    assert [item for item in kept if item[1] not in present] == [(0, 1 - present[0])]
    assert (8, present[0]) in kept  # what was just written stays as it does by relevance


# rows of a batch


@pytest.mark.parametrize(
    "options", [dict(standardise=True), dict(retrieval="random"), dict(evict="redundancy")], ids=str
)
def test_rows_with_different_numbers_of_entities_hold_what_each_holds_alone(options):
    options = {**CLUSTERS, **options, "bank": 2, "floor": 1}
    scenes = [(ONE, THREE), (TWO, THREE), (THREE, ONE), (ONE, ONE), (TWO, OTHER)]
    both = told(memory_of(**options), *scenes, rows=2)
    for row in range(2):
        alone = told(memory_of(**options), *[shown[row] for shown in scenes], seed=row)
        for a, b in zip(both, alone):
            assert torch.equal(a["owners"][:, row], b["owners"][:, 0])
            for mine, theirs in zip(a["slots"], b["slots"]):
                assert mine.items <= 8 and items(mine, row) == items(theirs)
                held = mine.map(lambda x, row=row: x[row : row + 1])
                held = packed(held, real(held))
                assert torch.equal(held.positions, theirs.positions)
                torch.testing.assert_close(held.score, theirs.score, atol=0.02, rtol=0)  # near ties, standardised


@pytest.mark.parametrize("grad", [False, True])
def test_padding_is_read_and_not_attended_to(grad):
    memory = memory_of(**CLUSTERS)
    state, moment = told(memory, (ONE, THREE), rows=2)[-1], now(1, batch=2)
    read = [memory.read(state, layer, moment) for layer in range(LAYOUT.layers)]
    assert [real(read[0][0]).sum(1).tolist(), read[0][0].items] == [[1, 3], 3]
    context = [
        tuple(torch.cat([getattr(b, name).flatten(1, 2) for b in found], 1) for name in ("keys", "values"))
        for found in read
    ]
    pattern = memory.attend(state, moment, read, context)
    own = torch.randn(3, 2, 5, LAYOUT.heads, LAYOUT.head_dim).requires_grad_(grad).unbind(0)
    attended = pattern(0, *own, None)
    for row, kept in enumerate((1, 3)):
        found = [replace_items(bank, row, kept if i == 0 else bank.items) for i, bank in enumerate(read[0])]
        alone = [tuple(torch.cat([getattr(b, n).flatten(1, 2) for b in found], 1) for n in ("keys", "values"))]
        expected = Buffered(alone)(0, *(x[row : row + 1] for x in own))
        torch.testing.assert_close(attended[row : row + 1], expected)


def replace_items(bank, row, count):
    return bank.map(lambda x: x[row : row + 1, :count])


def test_one_stream_and_rows_alike_need_no_padding():
    memory = memory_of(**CLUSTERS)
    for state, moment in (
        (told(memory, THREE)[-1], now(1)),
        (told(memory, (TWO, TWO), rows=2)[-1], now(1, batch=2)),
    ):
        read = [memory.read(state, layer, moment) for layer in range(LAYOUT.layers)]
        assert hiding_padding(read, [(bank.keys, bank.values) for (bank, *_) in read]) is None
        assert all(bool(real(found[0]).all()) for found in read)


def test_rows_hide_items_in_view_for_themselves():
    memory = memory_of(overlap=False, bank=1, retrieval="random", window=15)
    state = told(memory, *[(ONE, THREE)] * 4, rows=2)[-1]
    held = [
        replace(bank, born=torch.tensor([[0, 30, 30, 33], [30, 30, 33, 33]])[:, : bank.items])
        for bank in state["slots"]
    ]
    read = memory.read({**state, "slots": held}, 0, now(20, batch=2))[0]
    assert real(read).sum(1).tolist() == [3, 4]  # frame 0 is in the sink


# the contract

VARIANTS = {
    "merging": dict(merge=0.5),
    "entities": dict(merge=0.5, identify=0.5, floor=1, top_k=2, overlap=False),
    "entities of clusters": dict(grouping="kmeans", identify=0.9, floor=2, standardise=True, retrieval="random"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_dynamic_slots_keep_the_contract(name, check):
    CHECKS[check](Trial(find("slots"), options=VARIANTS[name]))
