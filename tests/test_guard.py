"""A policy that breaks the contract while a video is made is stopped, named with chunk and layer; what was made stays."""

from dataclasses import replace

import pytest
import torch

from slotmemory.backbones.attention import Buffered
from slotmemory.contract import Trial
from slotmemory.errors import InputError
from slotmemory.memories.window import Window
from slotmemory.memory import Prefix


class Wrong(Window):
    """A window that does `what` of the things below wrong, at chunk 3 and in layer 1 only."""

    what = ""

    @classmethod
    def called(cls):
        return "wrong"

    def read(self, state, layer, now):
        found = super().read(state, layer, now)
        return self.misread(found, state) if (now.chunk, layer) == (3, 1) else found

    def misread(self, found, state):
        bank = found[-1]  # behind a sink of no frames
        match self.what:
            case "raises":
                return found[7]
            case "no list":
                return bank
            case "no bank":
                return [bank.keys]
            case "too few values":
                return [replace(bank, values=bank.values[:, :, 1:])]
            case "flat keys":
                return [replace(bank, keys=bank.keys.flatten(1, 2))]
            case "places without columns":
                return [replace(bank, positions=bank.positions[..., :2])]
            case "one row":
                return [bank.map(lambda x: x[:1])]
            case "double":
                return [replace(bank, keys=bank.keys.double())]
            case "too much":
                return [bank, bank]
            case "not a number":
                return [replace(bank, values=bank.values * float("nan"))]
            case "born tomorrow":
                return [replace(bank, born=bank.born + 9)]
            case "placed beside the chunk":
                return [bank.at(bank.born + 3)]
            case "edits its state":
                state["window"][1].keys.add_(1)
        return found

    def write(self, state, written):
        if written.now.chunk == 3:
            match self.what:
                case "adds to its state":
                    state["more"] = 1
                case "edits what was seen":
                    written.layers[1].values.mul_(2)
                case "raises in write":
                    raise IndexError("out of\n  range")
                case "writes what is not a number":
                    after = super().write(state, written)
                    banks = [
                        replace(bank, keys=bank.keys / 0) if i == 1 else bank for i, bank in enumerate(after["window"])
                    ]
                    return {**after, "window": banks}
        return super().write(state, written)


READS = {
    "raises": "raised IndexError: list index out of range in `read` in layer 1 at chunk 3",
    "no list": "returned a Bank from `read` in layer 1 at chunk 3; expected a list of banks",
    "no bank": "returned a list from `read` in layer 1 at chunk 3; expected a list of banks",
    "too few values": "read values of shape [2, 6, 15, 2, 12] in layer 1 at chunk 3; expected [2, 6, 16, 2, 12]",
    "flat keys": "read keys of shape [2, 96, 2, 12] in layer 1 at chunk 3; expected [B, M, n, H, D]",
    "places without columns": "read positions of shape [2, 6, 16, 2] in layer 1 at chunk 3; expected [2, 6, 16, 3]",
    "one row": "read keys of shape [1, 6, 16, 2, 12] in layer 1 at chunk 3; expected [2, 6, 16, 2, 12]",
    "double": "read keys in torch.float64 in layer 1 at chunk 3; the model runs in torch.float32",
    "too much": "read 192 tokens in layer 1 at chunk 3; its budget is 96",
    "not a number": "read values that are not finite in layer 1 at chunk 3; the chunk was dropped",
    "born tomorrow": "read an item born at frame 17 in layer 1 at chunk 3; the chunk starts at frame 9",
    "placed beside the chunk": "read a key placed at 11 in layer 1 at chunk 3; the chunk starts at frame 9",
    "edits its state": "changes state['window'][1].keys in `read` in layer 1 at chunk 3; return a new state, edit none",
}
WRITES = {
    "adds to its state": "changes state in `write` at chunk 3; return a new state, edit none",
    "edits what was seen": "changes written[1].values in `write` in layer 1 at chunk 3; return a new state, edit none",
    "raises in write": "raised IndexError: out of range in `write` at chunk 3",
}


def session_of(what):
    memory = Trial(type("Wrong", (Wrong,), {"what": what})).memory()
    return Trial(Wrong).session(memory, seeds=(1, 2))


@pytest.mark.parametrize("what, said", (READS | WRITES).items())
def test_what_a_policy_does_wrong_is_said_with_its_name_the_chunk_and_the_layer(what, said):
    session = session_of(what)
    for _ in range(3):
        session.step()
    with pytest.raises(InputError) as refusal:
        session.step()
    assert str(refusal.value) == f"memory 'wrong' {said}"
    assert session.index == 3


def test_numbers_that_are_not_finite_are_named_when_they_are_read():
    session = session_of("writes what is not a number")
    for _ in range(4):
        session.step()
    with pytest.raises(InputError, match="memory 'wrong' read keys that are not finite in layer 1 at chunk 4"):
        session.step()


def test_a_stopped_stream_goes_on_from_its_last_chunk_with_a_policy_that_keeps_the_contract():
    whole = Trial(Window).run(seeds=(1, 2))
    session = session_of("raises")
    made = [session.step().latents for _ in range(3)]
    with pytest.raises(InputError):
        session.step()
    session.engine = replace(session.engine, memory=Trial(Window).memory())
    made += [chunk.latents for chunk in session]
    assert torch.equal(torch.cat(made, 1), whole)


def in_layer_1(change):
    """`attend` whose pattern does `change` to its result at chunk 3, in layer 1."""

    def attend(self, state, now, read, context):
        whole = Buffered(context)

        def pattern(layer, *given):
            made = whole(layer, *given)
            return change(state, made) if (now.chunk, layer) == (3, 1) else made

        return pattern

    return attend


def at_chunk_3(change):
    """`update` that does `change` to the state it leaves at chunk 3."""

    def update(self, state, written):
        after = Window.update(self, state, written)
        return change(after) if written.now.chunk == 3 else after

    return update


def prefix_of(*shapes):
    def prefix(self, state, written):
        tokens, places = (torch.zeros(shape) for shape in shapes)
        return state, Prefix(tokens, places) if written.now.chunk == 3 else None

    return prefix


def halved(state):
    return {
        **state,
        "window": [
            bank if i == 0 else replace(bank, owner=bank.owner[:, :3]) for i, bank in enumerate(state["window"])
        ],
    }


CALLS = [
    ("attend", lambda *_: 7, "returned a int from `attend` at chunk 0; expected a pattern, or None"),
    (
        "attend",
        in_layer_1(lambda state, made: made[:, 1:]),
        "attends with a result of shape [2, 47, 2, 12] in layer 1 at chunk 3; expected [2, 48, 2, 12]",
    ),
    (
        "attend",
        in_layer_1(lambda state, made: None),
        "attends with a result of type NoneType in layer 1 at chunk 3; expected [2, 48, 2, 12]",
    ),
    ("attend", in_layer_1(lambda state, made: {}["x"]), "raised KeyError: 'x' in `attend` in layer 1 at chunk 3"),
    (
        "attend",
        in_layer_1(lambda state, made: made / 0),
        "attends with a result that is not finite in layer 1 at chunk 3; the chunk was dropped",
    ),
    (
        "attend",
        in_layer_1(lambda state, made: made + state["window"][1].keys.mul_(0.5).sum()),
        "changes state['window'][1].keys in `attend` in layer 1 at chunk 3; return a new state, edit none",
    ),
    (
        "update",
        at_chunk_3(lambda state: None),
        "returned a NoneType from `update` at chunk 3; expected its state, a dictionary",
    ),
    (
        "update",
        at_chunk_3(lambda state: {**state, "window": state["window"][:1]}),
        "left a list of 1 as 'window' in `update` at chunk 3; expected a bank for each of 2 layers",
    ),
    (
        "update",
        at_chunk_3(halved),
        "left in 'window' in `update` owner of shape [2, 3] in layer 1 at chunk 3; expected [2, 6]",
    ),
    (
        "update",
        at_chunk_3(lambda state: {**state, "seen": {1, 2}}),
        "left a set as state['seen'] in `update` at chunk 3; a state is made of banks, tensors, numbers and text",
    ),
    (
        "switch",
        lambda self, state, now: state,
        "returned a dict from `switch` at chunk 4; expected a state and a number of frames",
    ),
    (
        "switch",
        lambda self, state, now: (state, 50),
        "asks to replay 50 latent frames in `switch` at chunk 4; 0 are kept, and its `replays` is 0",
    ),
    (
        "prefix",
        lambda self, state, written: None,
        "returned a NoneType from `prefix` at chunk 0; expected a state and a Prefix, or None",
    ),
    (
        "prefix",
        prefix_of((2, 5, 7), (1, 5, 3)),
        "made prefix tokens of shape [2, 5, 7] at chunk 3; expected [2, N, 24]",
    ),
    (
        "prefix",
        prefix_of((2, 5, 24), (1, 4, 3)),
        "made prefix positions of shape [1, 4, 3] at chunk 3; expected [2 or 1, 5, 3]",
    ),
    (
        "start",
        lambda self, batch: None,
        "returned a NoneType from `start` before the first chunk; expected its state, a dictionary",
    ),
    ("start", lambda self, batch: {}["x"], "raised KeyError: 'x' in `start` before the first chunk"),
]


@pytest.mark.parametrize("call, wrong, said", CALLS, ids=[said[:40] for *_, said in CALLS])
def test_every_call_is_watched_and_so_is_the_pattern_that_attends(call, wrong, said):
    policy = type("Wrong", (Window,), {"called": classmethod(lambda cls: "wrong"), call: wrong})
    with pytest.raises(InputError) as refusal:
        Trial(policy).run(seeds=(1, 2))
    assert str(refusal.value) == f"memory 'wrong' {said}"


@pytest.mark.parametrize("place", [float("nan"), float("-inf")])
def test_a_key_that_stands_nowhere_is_named(place):
    class Lost(Window):
        def read(self, state, layer, now):
            found = super().read(state, layer, now)
            lost = [replace(bank, positions=bank.positions.float() * 0 + place) for bank in found]
            return lost if (now.chunk, layer) == (3, 1) else found

    with pytest.raises(InputError, match=f"read a key placed at {place:g} in layer 1 at chunk 3; a place is a number"):
        Trial(Lost).run()
