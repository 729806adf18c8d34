"""SlotMemory keeps, scores, evicts and reads as its module says (reference.md 11.5, 11.6, 11.9, 11.11)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from slotmemory import contract
from slotmemory.backbones.attention import Buffered
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.contract import Trial, Watched, difference, latents_of, toy
from slotmemory.errors import InputError
from slotmemory.memory import Bank, Written, build, find
from tests.memories.seen import LAYOUT, now, prompt, stream, tell, written

SMALL = dict(slots=3, slot_dim=8, tokens_per_slot=4, bank=2, record_every=1, window=9)
LENGTH = LAYOUT.frames_per_chunk


def slots(budget=None, **options):
    return build("slots", LAYOUT, budget, **{**SMALL, **options}).requires_grad_(False)


def trial(name="slots", **options):
    return Trial(find(name), toy(), options)


def last(states):
    return list(states)[-1]


def bank_read(memory, state, moment, layer=0):
    """The slot bank among what is read: it comes before sink and window."""
    return memory.read(state, layer, moment)[0]


def items(bank, row=0):
    return set(zip(bank.born[row].tolist(), bank.owner[row].tolist()))


# what is kept


@pytest.mark.parametrize("options", [dict(bank=0), dict(record_every=100)], ids=["no capacity", "nothing recorded yet"])
def test_with_an_empty_bank_the_video_is_that_of_the_sink_to_the_bit(options):
    assert torch.equal(trial(**options).run(), trial("sink").run())


def test_a_budget_too_small_for_one_record_is_the_sink_at_that_budget():
    budget = 5 * LAYOUT.tokens_per_frame
    few = trial().memory(budget, slots=3, tokens_per_slot=5, bank=100)
    assert few.capacity == 15 and few.budget == budget
    none, sink = trial().memory(11), trial("sink").memory(11)
    assert none.capacity == 0
    assert torch.equal(trial().run(none), trial("sink").run(sink))


def test_eighty_chunks_offer_a_record_every_third_and_hold_seven_slots_of_six_at_most():
    memory = slots(slots=7, tokens_per_slot=2, bank=6, record_every=3)
    held = [state["slots"][0].items if state["slots"] else 0 for state in stream(memory, 80)]
    expected = [min(chunk // 3, 6) * 7 for chunk in range(80)]  # the first chunk is the sink's
    assert held == expected


def test_the_first_chunk_is_recorded_when_asked_or_when_no_sink_holds_it():
    assert not last(stream(slots(), 1))["slots"]
    assert last(stream(slots(record_first=True), 1))["slots"][0].items == 3
    assert last(stream(slots(sink=0), 1))["slots"][0].items == 3


@pytest.mark.parametrize("store", ["first", "balanced", "all"])
def test_no_token_is_held_twice_in_a_layer(store):
    memory = slots(slots=4, bank=5, store=store)
    for state in stream(memory, 12):
        for bank in state["slots"]:
            places = bank.positions[0].flatten(0, 1)
            assert len(places.unique(dim=0)) == len(places)


def test_slots_may_share_tokens_when_not_exclusive():
    bank = last(stream(slots(slots=4, exclusive=False, tokens_per_slot=8), 2))["slots"][0]
    places = bank.positions[0].flatten(0, 1)
    assert len(places.unique(dim=0)) < len(places)


def test_an_item_holds_its_tokens_own_keys_values_and_places():
    memory, shown = slots(), written(now(1))
    bank = tell(memory, last(stream(memory, 1)), shown)["slots"][1]
    places = shown.positions[0].tolist()
    for item in range(bank.items):
        for token in range(4):
            index = places.index(bank.positions[0, item, token].tolist())
            assert torch.equal(bank.keys[0, item, token], shown.layers[1].keys[0, index])
            assert torch.equal(bank.values[0, item, token], shown.layers[1].values[0, index])


def test_one_slot_of_all_tokens_is_the_frame_itself():
    tokens = LAYOUT.tokens_per_frame
    memory = slots(slots=1, tokens_per_slot=tokens, bank=1, sink=0, window=3)
    shown = written(now(0))
    item, frame = tell(memory, memory.start(1), shown)["slots"][0], shown.bank(0).first(1)
    for part in ("keys", "values", "positions", "born"):
        assert torch.equal(getattr(item, part), getattr(frame, part)), part


@pytest.mark.parametrize(
    "store, frames", [("first", {(4, 0, 0)}), ("balanced", {(2, 1, 1), (1, 2, 1), (1, 1, 2)}), ("all", None)]
)
def test_tokens_come_from_the_frames_that_store_names(store, frames):
    bank = last(stream(slots(store=store), 2))["slots"][0]
    counts = [tuple(int((item == LENGTH + i).sum()) for i in range(LENGTH)) for item in bank.positions[0, :, :, 0]]
    assert all(sum(count) == 4 for count in counts)
    if frames:
        assert set(counts) <= frames
    else:
        assert len(set(counts)) > 1 and any(count[1] + count[2] for count in counts)


def test_slots_run_on_every_chunk_and_start_from_those_predicted():
    memory = slots(record_every=3)
    before, after = list(stream(memory, 3))[1:]
    assert before["slots"] == after["slots"] == []
    shown = written(now(2))
    tokens = torch.stack([memory.adapters.one(i, seen.hidden) for i, seen in enumerate(shown.layers)]).flatten(0, 1)
    expected = memory.grouper.next(before["running"].flatten(0, 1), tokens).slots
    assert torch.equal(after["running"].flatten(0, 1), expected)


def test_slot_mathematics_stays_in_fp32_when_the_model_is_bf16():
    session = Trial(find("slots"), toy(torch.bfloat16)).session(trial().memory().to(torch.bfloat16))
    for _ in range(3):
        session.step()
    bank = session.state["slots"][0]
    assert bank.keys.dtype == torch.bfloat16
    kept = (session.state["running"], bank.score, bank.notes["slot"], bank.notes["query"], bank.notes["mass"])
    assert {x.dtype for x in kept} == {torch.float32}


# scores


def pointing(along, keys_along=None):
    """Make every token's text query (and key, if told) point along a direction per slot-free token: [H, D]."""

    def change(seen, layer):
        query = along.expand_as(seen.text_query)
        keys = seen.keys if keys_along is None else keys_along.expand_as(seen.keys)
        return seen._replace(text_query=query, keys=keys)

    return change


WORDS = prompt()[0][0][0].mean(0)  # [H, D]
ACROSS = torch.randn(WORDS.shape, generator=torch.Generator().manual_seed(5))


def filled(memory, directions, text=None):
    """A state of one record per direction, in chunks 1, 2, ...; the chunk before them is the sink's."""
    state = tell(memory, memory.start(1), written(now(0, text)))
    for chunk, direction in enumerate(directions, 1):
        given = direction if isinstance(direction, tuple) else (direction,)
        state = tell(memory, state, written(now(chunk, text), change=pointing(*given)))
    return state


def test_relevance_is_seven_tenths_text_and_three_tenths_the_best_match_among_predicted_slots():
    memory = slots(bank=4)
    state, moment = last(stream(memory, 4)), now(4)
    bank = state["slots"][1]
    text = F.cosine_similarity(moment.words(1).flatten(1)[:, None], bank.notes["query"].flatten(2), -1)
    predicted = memory.grouper.predict(state["running"][1])
    visual = F.cosine_similarity(bank.notes["slot"][:, :, None], predicted[:, None], -1).amax(-1)
    torch.testing.assert_close(bank.score, 0.7 * text + 0.3 * visual)


def test_an_item_remembers_the_mean_cross_attention_query_of_its_own_tokens():
    memory, shown = slots(), written(now(1))
    bank = tell(memory, last(stream(memory, 1)), shown)["slots"][0]
    places = shown.positions[0].tolist()
    index = [places.index(place) for place in bank.positions[0, 2].tolist()]
    torch.testing.assert_close(bank.notes["query"][0, 2], shown.layers[0].text_query[0, index].mean(0))


@pytest.mark.parametrize("text_by, chunk", [("query", 1), ("key", 2)])
def test_text_relevance_compares_with_queries_or_with_keys_as_text_by_says(text_by, chunk):
    memory = slots(text_by=text_by, text_weight=1.0, top_k=3)
    state = filled(memory, [(WORDS, ACROSS), (ACROSS, WORDS)])
    assert set(bank_read(memory, state, now(3)).born[0].tolist()) == {chunk * LENGTH}


def test_standardised_terms_have_mean_0_and_variance_1_within_a_layer():
    for weight in (0.0, 0.7, 1.0):
        score = last(stream(slots(standardise=True, text_weight=weight, bank=4), 4))["slots"][0].score
        assert score.shape == (1, 9)
        assert abs(float(score.mean())) < 1e-5
        if weight in (0.0, 1.0):
            assert float(score.std(unbiased=False)) == pytest.approx(1, abs=1e-3)


def test_the_first_reading_after_a_switch_scores_with_the_new_prompt():
    memory = slots(text_weight=1.0, top_k=3)
    state = last(stream(memory, 3))  # six items, none evicted
    opposite = [(-keys, values) for keys, values in prompt()]
    here, there = (items(bank_read(memory, state, now(3, text))) for text in (prompt(), opposite))
    assert here | there == items(state["slots"][0]) and not here & there


def test_the_scores_kept_after_a_chunk_are_those_of_its_prompt():
    memory = slots(text_weight=1.0)
    state = list(stream(memory, 3))[1]
    opposite = [(-keys, values) for keys, values in prompt()]
    a, b = (tell(memory, state, written(now(2, text)))["slots"][0].score for text in (prompt(), opposite))
    torch.testing.assert_close(a, -b)


# eviction


def test_the_lowest_scores_leave_and_the_newest_stay_however_low():
    memory = slots(text_weight=1.0)
    state = filled(memory, [WORDS, ACROSS, -WORDS])
    bank = state["slots"][0]
    assert items(bank) == {(chunk * LENGTH, owner) for chunk in (1, 3) for owner in range(3)}
    assert float(bank.score[0, 3:].max()) < float(bank.score[0, :3].min())
    following = tell(memory, state, written(now(4), change=pointing(ACROSS)))["slots"][0]
    assert set(following.born[0].tolist()) == {1 * LENGTH, 4 * LENGTH}  # an update later they are as mortal as others


def test_items_stay_in_the_order_they_were_written():
    for state in stream(slots(bank=3), 10):
        for bank in state["slots"]:
            assert bank.born[0].tolist() == sorted(bank.born[0].tolist())


def test_an_empty_slot_leaves_first_however_well_it_scores():
    memory = slots(text_weight=1.0)
    state = filled(memory, [WORDS, -WORDS])
    bank = state["slots"][0]
    mass = bank.notes["mass"].clone()
    mass[0, 0] = 0.99 / (4 * 3)
    emptied = [replace(b, notes={**b.notes, "mass": mass}) for b in state["slots"]]
    kept = tell(memory, {**state, "slots": emptied}, written(now(3), change=pointing(ACROSS)))["slots"][0]
    # three must go: the empty one of the well-scored chunk, and two of the badly scored
    assert (LENGTH, 0) not in items(kept) and {(LENGTH, 1), (LENGTH, 2)} < items(kept)


def test_rows_of_a_batch_evict_for_themselves():
    memory = slots(bank=3)
    both = last(stream(memory, 12, seeds=(1, 2)))
    assert items(both["slots"][0], 0) != items(both["slots"][0], 1)
    for row, seed in enumerate((1, 2)):
        alone = last(stream(memory, 12, seeds=(seed,)))
        for layer in range(LAYOUT.layers):
            mine = both["slots"][layer].map(lambda x, row=row: x[row : row + 1])
            assert items(mine) == items(alone["slots"][layer])
            torch.testing.assert_close(mine.keys, alone["slots"][layer].keys)
            torch.testing.assert_close(mine.score, alone["slots"][layer].score)


# reading


def test_top_k_reads_the_best_items_in_the_order_they_were_written():
    memory = slots(bank=4, top_k=5)
    state, moment = last(stream(memory, 5)), now(5)
    read, held = bank_read(memory, state, moment), state["slots"][0]
    assert held.items == 12 and read.items == 5
    # the chunk was the last to be scored, under the prompt that holds on: what is kept is what would be read
    best = held.score[0].topk(5).indices.sort().values
    assert read.born[0].tolist() == held.born[0, best].tolist() and torch.equal(read.keys[0], held.keys[0, best])


def test_everything_kept_is_read_beside_sink_and_window_by_default():
    memory = slots()
    state, moment = last(stream(memory, 5)), now(5)
    read = memory.read(state, 0, moment)
    assert [bank.items for bank in read] == [6, 3, 3]
    assert sum(bank.tokens for bank in read) == memory.budget


def test_items_of_frames_still_in_view_are_read_unless_overlap_is_refused():
    both, apart = slots(bank=4), slots(bank=4, overlap=False)
    state, moment = last(stream(both, 5)), now(5)
    held, seen = state["slots"][0], set(range(3)) | set(range(12, 15))
    assert items(bank_read(both, state, moment)) == items(held)
    expected = {item for item in items(held) if item[0] not in seen}
    assert expected != items(held)
    assert items(bank_read(apart, state, moment)) == expected


def test_stored_items_keep_their_native_place_when_the_window_is_placed_relatively():
    memory = slots(placing="relative")
    state = last(stream(memory, 7))
    assert torch.equal(bank_read(memory, state, now(7)).positions, state["slots"][0].positions)


def test_far_items_come_within_reach_when_places_are_capped():
    memory = slots(placing="capped", reach=9, bank=4)
    state = last(stream(memory, 12))
    held, read = state["slots"][0], bank_read(memory, state, now(12))
    assert int(held.positions[..., 0].min()) < 27 <= int(read.positions[..., 0].min())
    assert torch.equal(held.keys, read.keys)


# prompt switches and gradients


@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_recache_leaves_the_bank_the_slots_and_the_schedule_alone_and_scores_anew(global_sink, overlap):
    states = []

    def around(call, method, given):
        found = method(*given)
        if call == "switch":
            states.append(given[0])
        if call == "update" and given[1].now.replay:
            states.append(found)
        return found

    run = trial(recache=True, global_sink=global_sink, overlap=overlap)
    session = run.session(Watched(run.memory(), around))
    latents_of(session)
    before, after = states
    assert difference(before["running"], after["running"], "running") is None
    for old, new in zip(before["slots"], after["slots"]):
        assert difference(replace(old, score=new.score), new, "bank") is None
        assert not torch.equal(old.score, new.score)
    assert not torch.equal(before["window"][1].keys, after["window"][1].keys)  # layer 0 has not met the text yet
    quiet = trial().session(trial().memory())
    latents_of(quiet)
    assert session.state["slots"][0].items == quiet.state["slots"][0].items


def test_no_gradient_of_a_chunk_reaches_the_noise_of_chunks_before_it():
    engine, memory = toy(), slots()
    text = engine.backbone.text_keys(engine.text.encode(["a red cat"])[0])
    generator = torch.Generator().manual_seed(0)
    shape = (1, LENGTH, LAYOUT.latent_channels, LAYOUT.latent_height, LAYOUT.latent_width)
    chunks = [torch.randn(shape, generator=generator).requires_grad_() for _ in range(4)]
    state = memory.start(1)
    for chunk, latents in enumerate(chunks):
        moment = replace(now(chunk), text=text)
        frames = torch.arange(moment.frame, moment.frame + LENGTH)
        context = []
        for layer in range(LAYOUT.layers):
            read = memory.read(state, layer, moment)
            empty = torch.zeros(1, 0, LAYOUT.heads, LAYOUT.head_dim)
            keys = torch.cat([empty, *[bank.keys.flatten(1, 2) for bank in read]], 1)
            values = torch.cat([empty, *[bank.values.flatten(1, 2) for bank in read]], 1)
            places = torch.cat([torch.zeros(1, 0, 3), *[bank.positions.flatten(1, 2) for bank in read]], 1)
            context.append((rotate(keys, *rotation(places, LAYOUT.head_dim)), values))
        flow, seen = engine.backbone(latents, torch.zeros(1, LENGTH), text, frames, Buffered(context))
        state = tell(memory, state, Written(moment, seen, written(moment).positions, latents))
    assert context[0][0].shape[1] > 0
    *earlier, own = torch.autograd.grad(flow.square().sum(), chunks, allow_unused=True)
    assert all(g is None for g in earlier) and float(own.abs().max()) > 0


# arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tokens_per_slot=6), "slots=3 of tokens_per_slot=6 are 18 tokens, but a record chooses from 16"),
        (dict(tokens_per_slot=17, exclusive=False), "use tokens_per_slot from 1 to 16"),
        (dict(store="frist"), "unknown store 'frist'; did you mean 'first'?"),
        (dict(text_by="querry"), "unknown text_by 'querry'; did you mean 'query'?"),
        (dict(bank=-1), "bank=-1 is too small; use 0 or more"),
        (dict(record_every=0), "record_every=0 is too small; use 1 or more"),
        (dict(recrod_every=3), "unknown argument of memory 'slots' 'recrod_every'; did you mean 'record_every'?"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        slots(**options)
    assert message in str(refusal.value)


def test_untrained_slots_are_the_same_however_often_they_are_built():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        a = slots().state_dict()
        torch.manual_seed(2)
        state = torch.get_rng_state()
        b = slots().state_dict()
        assert torch.equal(torch.get_rng_state(), state)
    assert difference(dict(a), dict(b), "parameters") is None


def test_the_bank_of_the_paper_holds_2688_tokens_beside_six_frames_of_sink_and_window():
    wan = replace(LAYOUT, height=480, width=832)
    memory = build("slots", wan)
    assert memory.capacity == 42
    assert memory.budget == 9 * wan.tokens_per_frame + 2688
    assert isinstance(memory.start(1), dict) and not any(isinstance(v, Bank) for v in memory.start(1).values())


def test_slots_pass_the_contract_also_at_a_budget():
    contract.reads_within_its_budget(trial(bank=1))
