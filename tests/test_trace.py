"""A trace record says what was read, written and evicted, whatever the memory is."""

import pytest
import torch

from slotmemory import memory
from slotmemory.contract import Trial, toy
from slotmemory.memory import Bank, held_bytes
from slotmemory.trace import record
from slotmemory.tree import tree_from_file, tree_to_file


def bank(*born, owner=-1, tokens=4):
    births = torch.tensor([born], dtype=torch.long)
    keys = torch.zeros(1, len(born), tokens, 1, 2)
    places = torch.zeros(1, len(born), tokens, 3, dtype=torch.long)
    return Bank(keys, keys, places, births, torch.full_like(births, owner), births.float() / 8)


def state(**parts):
    return {name: [found, found] for name, found in parts.items()}


def by_id(trace):
    return {item["id"]: item for item in trace["items"]}


def test_items_are_read_written_evicted_or_just_held():
    before = state(sink=bank(0), window=bank(3, 4))
    after = state(sink=bank(0), window=bank(4, 5, 6))
    trace = record(before, before, after, [bank(0), bank(3)], 1)
    assert trace["read"] == {"sink": 4, "window": 4}
    assert trace["written"] == 8 and trace["evicted"] == ["window:3"]
    assert {name: item["read"] for name, item in by_id(trace).items()} == {
        "sink:0": True,
        "window:3": True,
        "window:4": False,
        "window:5": False,
        "window:6": False,
    }
    assert trace["bytes"] == held_bytes(after)


def test_an_item_says_its_bank_birth_owner_score_and_tokens():
    trace = record(state(slots=bank(3, owner=5)), state(slots=bank(3, owner=5)), state(slots=bank(3, owner=5)), [], 0)
    expected = {"id": "slots:3.5", "kind": "slots", "born": 3, "owner": 5, "score": 0.375, "tokens": 4, "read": False}
    assert trace["items"] == [expected]
    assert trace["read"] == {} and trace["written"] == 0 and trace["evicted"] == []


def test_what_a_prompt_switch_drops_is_evicted_and_what_it_moves_is_read_where_it_is_now():
    before = state(sink=bank(0), window=bank(3, 4))
    switched = state(sink=bank(3), window=bank(4))
    after = state(sink=bank(3), window=bank(4, 5))
    trace = record(before, switched, after, [bank(3), bank(4)], 0)
    assert trace["read"] == {"sink": 4, "window": 4}
    assert trace["evicted"] == ["sink:0", "window:3"] and trace["written"] == 8
    assert by_id(trace)["sink:3"]["read"] and not by_id(trace)["window:3"]["read"]


def test_what_is_read_without_being_held_is_counted_all_the_same():
    before = state(window=bank(3, 4))
    assert record(before, before, before, [bank(3, 4), bank(1, 2)], 0)["read"] == {"window": 8, "made": 8}


def test_an_empty_memory_has_an_empty_record():
    empty = {"read": {}, "items": [], "written": 0, "evicted": [], "bytes": 0}
    assert record({}, {}, {"sink": []}, [], 0) == empty


@pytest.mark.parametrize("name", memory.names())
def test_a_stream_of_records_is_plain_values_and_follows_every_item_from_writing_to_eviction(name, tmp_path):
    alive, frames = set(), Trial(memory.find(name)).engine.layout.frames_per_chunk
    for chunk in Trial(memory.find(name)).session():
        trace = chunk.trace
        tree_to_file(trace, tmp_path / "trace")  # refuses anything but plain values and tensors
        assert tree_from_file(tmp_path / "trace") == trace
        ids = [item["id"] for item in trace["items"]]
        assert len(set(ids)) == len(ids) and alive <= set(ids)
        fresh = [item for item in trace["items"] if item["id"] not in alive]
        # an item may have come from another bank, as packed anew: born earlier
        assert all(item["born"] // frames <= chunk.index and not item["read"] for item in fresh)
        assert sum(item["tokens"] for item in fresh) == trace["written"]
        assert sum(item["tokens"] for item in trace["items"] if item["read"]) == sum(trace["read"].values())
        alive = set(ids) - set(trace["evicted"])


def test_a_record_says_which_chunk_shot_and_prompt_it_was_and_how_long_its_parts_took():
    trial = Trial(memory.find("slots"))
    traces = [chunk.trace for chunk in trial.session()]
    assert [t["chunk"] for t in traces] == list(range(6))
    assert [t["shot"] for t in traces] == [0] * 4 + [1] * 2
    assert [t["switched"] for t in traces] == [False] * 4 + [True, False]
    assert traces[4]["prompt"] == "the blue dog sleeps in the sun"
    assert traces[0]["seconds"][0] == 0
    assert all(a["seconds"][1] == b["seconds"][0] for a, b in zip(traces, traces[1:]))
    assert traces[-1]["seconds"][1] == round(toy().layout.seconds(6), 4)
    parts = {"read", "denoise", "clean", "write", "decode"}
    assert parts <= set(traces[0]["milliseconds"]) and "switch" in traces[4]["milliseconds"]
