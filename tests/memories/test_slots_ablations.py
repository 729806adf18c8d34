"""Each ablation of `slots` changes what it says and nothing else; all keep the contract."""

import numpy as np
import pytest
import torch

from slotmemory.contract import CHECKS, Trial, difference, toy
from slotmemory.errors import InputError
from slotmemory.memory import build, find
from slotmemory.slots.groupings import cells
from tests.memories.scenes import memory_of, scene, told
from tests.memories.seen import LAYOUT, now, prompt, stream, tell, written

SMALL = dict(slots=3, slot_dim=8, tokens_per_slot=4, bank=2, record_every=1, window=9)
LENGTH, PER_FRAME = LAYOUT.frames_per_chunk, LAYOUT.tokens_per_frame
LEARNED_PARTS = ("running", "mass", "sink", "window", "chunks", "latents")


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """Masks for a stream of 10 chunks: three of the ids 0, 2 and 5, in other places in every latent frame."""
    path = tmp_path_factory.mktemp("masks") / "masks.npz"
    order = np.random.default_rng(0).integers(0, 3, (10 * LENGTH, *LAYOUT.grid))
    np.savez(path, masks=np.array([0, 2, 5])[order])
    return str(path)


def options_of(grouping, masks):
    return dict(grouping=grouping, masks=masks if grouping == "oracle" else "")


def slots(budget=None, **options):
    return build("slots", LAYOUT, budget, **{**SMALL, **options}).requires_grad_(False)


def last(states):
    return list(states)[-1]


# what stays the same


@pytest.mark.parametrize("grouping", ["shuffled", "kmeans", "grid", "oracle"])
def test_another_grouping_changes_which_tokens_are_stored_and_nothing_else(grouping, masks):
    for budget in (None, 5 * PER_FRAME):
        ours, learned = slots(budget, **options_of(grouping, masks)), slots(budget)
        assert (ours.budget, ours.capacity) == (learned.budget, learned.capacity)
        assert difference(dict(learned.state_dict()), dict(ours.state_dict()), "weights") is None
        for a, b in zip(stream(ours, 4), stream(learned, 4)):
            for part in LEARNED_PARTS:
                assert difference(a[part], b[part], part) is None
            assert len(a["slots"]) == len(b["slots"])
            for mine, theirs in zip(a["slots"], b["slots"]):
                assert mine.tokens == theirs.tokens and not torch.equal(mine.keys, theirs.keys)


@pytest.mark.parametrize("retrieval", ["text", "visual", "random"])
def test_another_retrieval_changes_scores_and_nothing_else(retrieval):
    ours, usual = slots(retrieval=retrieval, bank=9), slots(bank=9)
    for a, b in zip(stream(ours, 4), stream(usual, 4)):
        for part in LEARNED_PARTS:
            assert difference(a[part], b[part], part) is None
        for mine, theirs in zip(a["slots"], b["slots"]):
            assert torch.equal(mine.keys, theirs.keys) and not torch.equal(mine.score, theirs.score)


@pytest.mark.parametrize("options", [dict(grouping="shuffled"), dict(retrieval="random")], ids=str)
def test_what_is_drawn_depends_on_the_seed_alone(options):
    one, again, other = (last(stream(slots(**options, seed=seed), 6))["slots"] for seed in (1, 1, 2))
    assert difference(one, again, "bank") is None
    assert difference(one, other, "bank") is not None


# groupings


def test_shuffled_slots_hold_tokens_of_every_blob_and_learned_groups_of_one(masks):
    halves = [0, 1] * 8
    state = told(memory_of(slots=2, grouping="shuffled", tokens_per_slot=8), halves, halves)[-1]
    mixed = [len(set(item)) for item in whose(state["slots"][0], halves)]
    assert max(mixed) == 2


def whose(bank, *scenes, row=0):
    """Which entity each item's tokens show: per item a list of entities; scenes: of the chunks in turn."""
    found = []
    for item in range(bank.items):
        shown = scenes[min(int(bank.born[row, item]) // LENGTH, len(scenes) - 1)]
        places = bank.positions[row, item]
        found.append([shown[int(h) * LAYOUT.grid[1] + int(w)] for _, h, w in places.tolist()])
    return found


def test_k_means_items_hold_the_tokens_of_one_blob_and_follow_it_when_it_moves():
    here, there = [0, 0, 1, 1] * 4, [1, 1, 0, 0] * 4
    scenes = [here, there] * 4
    bank = told(memory_of(slots=2, grouping="kmeans", tokens_per_slot=8, bank=8), *scenes)[-1]["slots"][0]
    shown = whose(bank, *scenes)
    assert all(len(set(item)) == 1 for item in shown)
    owners = {(owner, item[0]) for owner, item in zip(bank.owner[0].tolist(), shown)}
    assert len(owners) == 2  # an owner shows the same entity in all eight chunks


def test_a_cluster_is_expected_to_come_again_as_it_was():
    memory = memory_of(slots=2, grouping="kmeans", tokens_per_slot=8, retrieval="visual")
    state = told(memory, [0, 1] * 8, [0, 1] * 8, [0, 2] * 8)[-1]
    bank = state["slots"][0]
    scores = {(born // LENGTH, item[0]): score for born, item, score in zip(
        bank.born[0].tolist(), whose(bank, [0, 1] * 8, [0, 1] * 8, [0, 2] * 8), bank.score[0].tolist()
    )}  # fmt: skip
    assert scores[0, 0] > 0.95 and scores[2, 2] > 0.95 and scores[0, 1] < 0.5


def test_grid_items_hold_the_tokens_of_their_cell_in_every_chunk():
    memory = slots(slots=4, grouping="grid", bank=5)
    cell = cells(LAYOUT.grid, 4).tolist()
    for state in list(stream(memory, 5))[1:]:
        for bank in state["slots"]:
            for owner, item in zip(bank.owner[0].tolist(), whose(bank, cell)):
                assert set(item) == {owner}


def test_oracle_items_are_owned_by_the_ids_whose_tokens_they_hold(tmp_path):
    halves, quarters = [3] * 8 + [0] * 8, [0] * 8 + [3] * 4 + [7] * 4
    path = tmp_path / "masks.npz"
    np.savez(path, masks=np.array([halves] * LENGTH + [quarters] * LENGTH).reshape(-1, *LAYOUT.grid))
    bank = told(memory_of(slots=3, grouping="oracle", masks=str(path)), halves, quarters)[-1]["slots"][0]
    shown = dict(zip(zip((bank.born[0] // LENGTH).tolist(), bank.owner[0].tolist()), whose(bank, halves, quarters)))
    kept = {
        key: item for key, item in shown.items() if key[1] < 8
    }  # a group without tokens has a number beyond all ids
    assert set(kept) == {(0, 0), (0, 3), (1, 0), (1, 3), (1, 7)}
    assert all(set(item) == {owner} for (_, owner), item in kept.items())
    assert torch.isinf(bank.score[0, bank.owner[0] >= 8]).all()


def test_batch_rows_may_have_masks_of_their_own(tmp_path):
    a, b = [0] * 8 + [1] * 8, [0, 1] * 8
    for name, rows in (("both", [a, b]), ("a", [a]), ("b", [b])):
        grid = np.array(rows)[:, None].repeat(LENGTH, 1).reshape(len(rows), LENGTH, *LAYOUT.grid)
        np.savez(tmp_path / f"{name}.npz", masks=grid)

    def bank(name, *rows):
        memory = memory_of(slots=2, grouping="oracle", masks=str(tmp_path / f"{name}.npz"))
        return tell(memory, memory.start(len(rows)), scene(0, *rows))["slots"][0]

    both = bank("both", a, b)
    assert torch.equal(both.positions[:1], bank("a", a).positions)
    assert torch.equal(both.positions[1:], bank("b", b).positions)


def test_masks_count_latent_frames_of_the_stream_also_after_a_given_past(masks):
    session = Trial(find("slots"), toy(), options_of("oracle", masks)).session()
    session.prefill(torch.randn(1, 2, *latent_shape()))
    session.step()
    assert session.state["latents"] == 2 + LENGTH


def latent_shape():
    return LAYOUT.latent_channels, LAYOUT.latent_height, LAYOUT.latent_width


# retrievals


@pytest.mark.parametrize("name, weight", [("text", 1.0), ("visual", 0.0)])
def test_text_and_visual_retrieval_are_the_ends_of_the_text_weight(name, weight):
    named, weighed = (last(stream(slots(**o, bank=9), 4)) for o in (dict(retrieval=name), dict(text_weight=weight)))
    assert difference(named["slots"], weighed["slots"], "slots") is None


def test_random_retrieval_does_not_hear_the_prompt_and_draws_anew_in_every_chunk():
    memory = slots(retrieval="random", bank=9)
    one, other = (list(stream(memory, 4, text)) for text in (prompt(1), prompt(2)))
    for a, b in zip(one, other):
        assert difference(a["slots"], b["slots"], "slots") is None
    scores = [state["slots"][0].score[0, :3].tolist() for state in one[1:]]
    assert len(set(map(tuple, scores))) == 3 and all(0 <= x < 1 for row in scores for x in row)


def test_random_retrieval_reads_what_was_drawn_when_the_chunk_was_written():
    memory = slots(retrieval="random", bank=4, top_k=5)
    state = last(stream(memory, 8))  # some were evicted since the draw
    held, read = state["slots"][0], memory.read(state, 0, now(8))[0]
    best = held.score[0].topk(5).indices.sort().values
    assert torch.equal(read.keys[0], held.keys[0, best])


# arguments


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(grouping="kmaens"), "unknown grouping 'kmaens'; did you mean 'kmeans'?"),
        (dict(retrieval="txt"), "unknown retrieval 'txt'; did you mean 'text'?"),
        (dict(grouping="oracle"), "oracle groups by a file of masks, no other does"),
        (dict(masks="masks.npz"), "grouping=learned with masks='masks.npz'"),
        (dict(grouping="oracle", masks="no/such.npz"), "cannot read masks no/such.npz: no such file or folder"),
        (dict(merge=1.5), "merge=1.5 is no cosine from 0 to 1"),
        (dict(identify=-0.1), "identify=-0.1 is no cosine from 0 to 1"),
        (dict(evict="redundant"), "unknown evict 'redundant'; did you mean 'redundancy'"),
        (dict(floor=-1), "floor=-1 is too small; use 0 or more"),
    ],
)
def test_impossible_arguments_are_refused_with_what_would_do(options, message):
    with pytest.raises(InputError) as refusal:
        slots(**options)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(masks=np.zeros((3, 5, 4), int)), "have shape [3, 5, 4]; expected [latents, 4, 4]"),
        (dict(masks=np.zeros((3, 4, 4))), "hold float64 from 0.0; expected whole numbers from 0"),
        (dict(masks=np.full((3, 4, 4), -1)), "hold int64 from -1; expected whole numbers from 0"),
        (dict(other=np.zeros((3, 4, 4), int)), "is not an .npz file with an array named masks"),
        (b"", "is not an .npz file with an array named masks"),
        (b"no archive at all", "is not an .npz file with an array named masks"),
    ],
    ids=["shape", "floats", "negative", "name", "empty", "text"],
)
def test_a_file_that_holds_no_masks_for_this_grid_is_refused(tmp_path, content, message):
    path = tmp_path / "masks.npz"
    if isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        slots(grouping="oracle", masks=str(path))
    assert message in str(refusal.value)


def test_masks_that_are_too_short_or_for_other_rows_are_refused_where_that_shows(tmp_path):
    path = tmp_path / "masks.npz"
    np.savez(path, masks=np.zeros((2, 4, *LAYOUT.grid), int))
    memory = slots(grouping="oracle", masks=str(path))
    state = tell(memory, memory.start(2), written(now(0, batch=2), (0, 1)))
    with pytest.raises(InputError, match="masks end after 4 latent frames; this video needs 6"):
        tell(memory, state, written(now(1, batch=2), (0, 1)))
    with pytest.raises(InputError, match="masks are for 2 batch rows, there are 1"):
        tell(memory, memory.start(1), written(now(0)))


# the contract

VARIANTS = {
    "shuffled": dict(grouping="shuffled", retrieval="random"),
    "kmeans": dict(grouping="kmeans", retrieval="visual", store="balanced"),
    "grid": dict(grouping="grid", retrieval="random", top_k=2),
    "oracle": dict(grouping="oracle", retrieval="text"),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_ablation_keeps_the_contract(name, check, masks):
    CHECKS[check](Trial(find("slots"), options={**VARIANTS[name], **options_of(VARIANTS[name]["grouping"], masks)}))
