"""Banks keep their items whole through every verb, states survive a file, and memories are found by name or path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmemory.contract import difference, toy
from slotmemory.errors import InputError
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Memory, arguments, banks, build, find, from_plain, held_bytes, names, to_plain
from slotmemory.tree import tree_from_file, tree_to_file
from tests.memories.seen import LAYOUT, now, written

few = settings(max_examples=40, deadline=None, derandomize=True)


def bank_of(rows: int, items: int, tokens: int = 2, first: int = 0) -> Bank:
    """A bank in which every number of an item says which row, item and token it belongs to."""
    tag = (first + torch.arange(items)).expand(rows, items) + 1000 * torch.arange(rows)[:, None]
    token = (tag[..., None] * 10 + torch.arange(tokens)).float()
    wide = token[..., None, None].expand(rows, items, tokens, 2, 4)
    places = torch.stack((tag[..., None].expand_as(token).long(), *[torch.arange(tokens).expand(token.shape)] * 2), -1)
    notes = {"slot": tag[..., None].float().expand(rows, items, 3)}
    return Bank(wide, -wide, places, tag, tag % 7, tag.float() / 2, notes)


def tags(bank: Bank) -> list[list[int]]:
    return bank.born.tolist()


def whole(bank: Bank) -> bool:
    """Do the parts of every item still belong together?"""
    tag = bank.born.float()
    token = tag[..., None] * 10 + torch.arange(bank.keys.shape[2])
    return (
        torch.equal(bank.keys, token[..., None, None].expand_as(bank.keys))
        and torch.equal(bank.values, -bank.keys)
        and torch.equal(bank.positions[..., 0], bank.born[..., None].expand(bank.positions.shape[:-1]))
        and torch.equal(bank.owner, bank.born % 7)
        and torch.equal(bank.score, tag / 2)
        and torch.equal(bank.notes["slot"], tag[..., None].expand_as(bank.notes["slot"]))
    )


sizes = st.integers(0, 6)


@few
@given(st.integers(1, 3), sizes, sizes, sizes)
def test_join_appends_items_and_forgets_no_order(rows, a, b, c):
    x, y, z = bank_of(rows, a), bank_of(rows, b, first=10), bank_of(rows, c, first=20)
    joined = x.join(y).join(z)
    assert joined.items == a + b + c and joined.tokens == 2 * joined.items and whole(joined)
    assert tags(joined) == tags(x.join(y.join(z)))
    assert tags(joined) == [p + q + r for p, q, r in zip(tags(x), tags(y), tags(z))]


@few
@given(st.integers(1, 3), sizes, st.integers(0, 8))
def test_first_and_after_part_a_bank_and_last_is_its_end(rows, items, count):
    bank = bank_of(rows, items)
    head, rest = bank.first(count), bank.after(count)
    assert head.items == min(count, items) and whole(head) and whole(rest)
    assert tags(head.join(rest)) == tags(bank)
    assert tags(bank.last(count)) == [row[len(row) - min(count, items) :] for row in tags(bank)]
    assert whole(bank.last(count))


@few
@given(st.data())
def test_take_picks_for_every_row_by_itself_in_the_order_given(data):
    rows, items, count = (data.draw(st.integers(1, n)) for n in (3, 6, 6))
    index = torch.tensor(
        [data.draw(st.lists(st.integers(0, items - 1), min_size=count, max_size=count)) for _ in range(rows)]
    )
    bank = bank_of(rows, items)
    taken = bank.take(index)
    assert whole(taken)
    assert tags(taken) == [[row[i] for i in picked] for row, picked in zip(tags(bank), index.tolist())]


def test_take_may_pick_nothing():
    taken = bank_of(2, 3).take(torch.zeros(2, 0, dtype=torch.long))
    assert taken.items == 0 and taken.keys.shape == (2, 0, 2, 2, 4)


@few
@given(st.integers(1, 3), st.integers(1, 5), st.booleans())
def test_at_moves_tokens_in_time_only(rows, items, per_token):
    bank = bank_of(rows, items)
    frames = torch.arange(100, 100 + rows * items).view(rows, items)
    moved = bank.at(frames[..., None] + torch.arange(2) if per_token else frames)
    expected = frames[..., None] + (torch.arange(2) if per_token else torch.zeros(2, dtype=torch.long))
    assert torch.equal(moved.positions[..., 0], expected)
    assert torch.equal(moved.positions[..., 1:], bank.positions[..., 1:])
    assert moved.keys is bank.keys and tags(moved) == tags(bank)


def test_no_verb_changes_the_bank_it_is_asked_of():
    bank = bank_of(2, 4)
    before = bank.map(torch.clone)
    bank.join(bank), bank.first(2), bank.last(2), bank.after(1), bank.at(bank.born + 5), bank.detach()
    bank.take(torch.tensor([[3, 1], [0, 0]]))
    assert difference(before, bank, "bank") is None


def test_frames_become_items_born_where_their_tokens_stand():
    shown = written(now(2), seeds=(1, 2))
    bank = shown.bank(1)
    assert bank.keys.shape == (2, 3, LAYOUT.tokens_per_frame, LAYOUT.heads, LAYOUT.head_dim)
    assert tags(bank) == [[6, 7, 8]] * 2 and bank.owner.eq(-1).all()
    assert torch.equal(bank.keys.flatten(1, 2), shown.layers[1].keys)
    assert torch.equal(bank.positions.flatten(1, 2), shown.positions.expand(2, -1, -1))


def test_what_is_cut_from_a_clean_pass_carries_no_gradient():
    shown = written(now(0), change=lambda seen, layer: seen._replace(keys=seen.keys.requires_grad_()))
    assert not shown.bank(0).keys.requires_grad


def test_the_words_of_a_prompt_are_averaged_without_its_padding():
    keys = torch.randn(2, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    moment = now(0, [(keys, keys)] * 2)
    moment = type(moment)(**{**vars(moment), "text_tokens": torch.tensor([2, 5])})
    torch.testing.assert_close(moment.words(0), torch.stack((keys[0, :2].mean(0), keys[1, :5].mean(0))))


def test_bytes_and_banks_of_a_state_are_counted_over_all_layers():
    bank = bank_of(1, 3)
    state = {"window": [bank, bank], "running": torch.zeros(3), "empty": [], "count": 4}
    assert [name for name, _ in banks(state)] == ["window"]
    assert held_bytes(state) == 2 * bank.nbytes
    # keys and values, positions, born, owner, score, slot
    one = 3 * (2 * 2 * 2 * 4 * 4 + 2 * 3 * 8 + 8 + 8 + 4 + 3 * 4)
    assert bank.nbytes == one


@pytest.mark.parametrize("name", ["window", "bank", "keys"])
def test_a_state_comes_back_from_a_file_as_it_was_whatever_its_parts_are_called(name, tmp_path):
    state = {name: [bank_of(1, 2), bank_of(1, 2)], "pair": (1, [None, 2.5]), "running": torch.ones(2), "none": {}}
    tree_to_file(to_plain(state), tmp_path / "state")
    assert difference(from_plain(tree_from_file(tmp_path / "state")), state, "state") is None
    single = {name: bank_of(1, 2)}
    assert difference(from_plain(to_plain(single)), single, "state") is None


# discovery


def test_memories_are_the_files_of_the_package_by_name():
    assert {"none", "window", "sink", "slots", "everything"} <= set(names())
    assert not any(name.startswith("_") for name in names())
    for name in names():
        assert find(name).called() == name


def test_a_path_is_a_memory_too_and_is_called_as_its_file(tmp_path):
    path = tmp_path / "halves.py"
    path.write_text("from slotmemory.memories.window import Window\nclass Halves(Window):\n    pass\n")
    policy = build(str(path), LAYOUT, window=6)
    assert policy.called() == "halves" and policy.window == 6


def test_a_file_may_hold_dataclasses_and_late_annotations_and_bear_the_name_of_another_module(tmp_path):
    path = tmp_path / "json.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from slotmemory.memory import Memory\n"
        "@dataclass\nclass Settings:\n    step: int = 2\n"
        "class Mine(Memory):\n    settings = Settings()\n"
    )
    assert find(str(path)).called() == "json"
    import json

    assert json.loads("1") == 1


def test_an_unknown_memory_names_the_nearest():
    with pytest.raises(InputError, match="unknown memory 'slot'; did you mean 'slots'?"):
        find("slot")
    with pytest.raises(InputError, match="does not exist"):
        find("nowhere/mine.py")


def test_an_unknown_argument_names_the_nearest_also_of_a_parent():
    with pytest.raises(InputError, match="'tokens_per_slots'; did you mean 'tokens_per_slot'?"):
        build("slots", LAYOUT, tokens_per_slots=3)
    with pytest.raises(InputError, match="unknown argument of memory 'slots' 'windov'; did you mean 'window'?"):
        build("slots", LAYOUT, windov=3)
    with pytest.raises(InputError, match="unknown argument of memory 'none' 'window'"):
        build("none", LAYOUT, window=3)


@pytest.mark.parametrize("count, body", [(2, "class A(Memory): pass\nclass B(Memory): pass\n"), (0, "")])
def test_a_file_with_two_memories_or_none_is_refused(count, body, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from slotmemory.memory import Memory\nfrom slotmemory.memories.sink import Sink\n" + body)
    with pytest.raises(InputError, match=f"defines {count} memories"):
        find(str(path))


def test_arguments_are_the_keywords_of_a_memory_and_of_its_parents_where_it_passes_them_on():
    assert arguments(find("none")) == {}
    assert arguments(find("sink"))["sink"] == 3
    assert "sink" not in arguments(find("window")) and arguments(find("window"))["window"] == 12
    assert {**arguments(Sink), "bank": 6, "top_k": None}.items() <= arguments(find("slots")).items()


def test_an_engine_gives_a_memory_the_arguments_its_model_was_trained_for():
    engine = toy().with_memory("slots", bank=3)
    assert (engine.memory.num_slots, engine.memory.capacity, engine.memory.window) == (3, 9, 9)
    assert toy().with_memory("none").memory.called() == "none"
    assert not any(p.requires_grad for p in engine.memory.parameters())


def test_a_memory_that_does_nothing_is_a_memory():
    memory = Memory(LAYOUT)
    state = memory.start(1)
    assert memory.read(state, 0, now(0)) == [] and memory.losses(state) == {} and memory.look(state) == {}
    assert memory.switch(state, now(0)) == (state, 0)


@pytest.mark.parametrize("setting, took", [("None", "sets none"), ("99", "takes 99")])
def test_a_memory_that_does_not_keep_to_the_budget_it_is_given_is_refused_with_the_number(setting, took, tmp_path):
    (tmp_path / "deaf.py").write_text(
        "from slotmemory.memory import Memory\n"
        "class Deaf(Memory):\n"
        f"    def __init__(self, layout, budget=None):\n        super().__init__(layout, {setting})\n"
    )
    with pytest.raises(InputError, match=f"memory 'deaf' is given a budget of 48 tokens and {took}; its __init__ must"):
        build(str(tmp_path / "deaf.py"), LAYOUT, 48)
    build(str(tmp_path / "deaf.py"), LAYOUT)


def test_only_the_ceiling_takes_no_notice_of_a_budget():
    assert [name for name in names() if find(name).unlimited] == ["everything"]
    assert [name for name in names() if toy().with_memory(name, 0).memory.budget != 0] == ["everything"]


@pytest.mark.parametrize("parent", ["Everything", "Ceiling"])
def test_what_is_made_of_a_ceiling_keeps_to_its_budget_unless_it_says_otherwise_itself(parent, tmp_path):
    path = tmp_path / "mine.py"
    lines = ["from slotmemory.memories.everything import Everything\n"]
    if parent == "Ceiling":
        (tmp_path / "parent.py").write_text(lines[0] + "class Ceiling(Everything):\n    unlimited = True\n")
        lines = [f"from slotmemory.memory import find\nCeiling = find({str(tmp_path / 'parent.py')!r})\n"]
    path.write_text(lines[0] + f"class Mine({parent}):\n    pass\n")
    with pytest.raises(InputError, match="memory 'mine' is given a budget of 48 .* sets none; .* unlimited = True"):
        build(str(path), LAYOUT, 48)
    path.write_text(lines[0] + f"class Mine({parent}):\n    unlimited = True\n")
    assert build(str(path), LAYOUT, 48).budget is None


def test_a_memory_that_forgets_to_set_itself_up_is_told_how(tmp_path):
    (tmp_path / "bare.py").write_text(
        "from slotmemory.memory import Memory\n"
        "class Bare(Memory):\n    def __init__(self, layout, budget=None):\n        pass\n"
    )
    with pytest.raises(InputError, match=r"memory 'bare' is not set up; its __init__ must call super\(\)"):
        build(str(tmp_path / "bare.py"), LAYOUT)
