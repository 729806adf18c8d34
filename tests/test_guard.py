"""A policy that breaks the contract while a video is made is stopped, named with chunk and layer; what was made stays."""

from dataclasses import replace

import pytest
import torch

from slotmemory.contract import Trial
from slotmemory.errors import InputError
from slotmemory.memories.window import Window


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
