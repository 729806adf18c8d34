"""First looks: who is asked for, and how often looks agree by chance."""

from types import SimpleNamespace

import pytest
from benchmarks import first_looks

from slotmemory.evaluation.reader import ONE, Reading
from slotmemory.world.grammar import parse

SURE = {name: 1.0 for name in ("count", "kind", "colour", "pattern", "accessory")}


class Engine:
    """Remembers what its sessions are told, and shows the prompt in place of frames."""

    def __init__(self):
        self.told = []

    def session(self, prompt, seed):
        self.now = prompt
        self.told.append((seed, prompt))
        return self

    def prompt(self, prompt):
        self.now = prompt
        self.told.append((None, prompt))

    def step(self):
        return SimpleNamespace(frames=[self.now])


class Reader:
    """Reads from a prompt who is there, and gives cats stripes and all others spots."""

    def read(self, prompt):
        (role,) = parse(prompt).roles
        return Reading(ONE, role.kind, role.colour, 0.0, "stripes" if role.kind == "cat" else "spots", "hat", SURE)


def test_everybody_is_asked_for_once_in_a_stream_of_their_own():
    engine = Engine()
    looks = first_looks.first_looks(engine, Reader())
    assert len(looks) == len({prompt for _, prompt in engine.told}) == len({seed for seed, _ in engine.told}) == 80
    assert sum(look.pattern == "stripes" for look in looks) == 20


def test_strangers_share_neither_name_nor_scene():
    for number in range(5):
        engine = Engine()
        met = first_looks.strangers(engine, Reader(), number)
        specs = [parse(prompt) for _, prompt in engine.told]
        assert len({(x.kind) for x in met}) == len({x.colour for x in met}) == len({s.scene for s in specs}) == 4


def test_chance_is_how_often_two_different_ones_agree():
    looks = first_looks.first_looks(Engine(), Reader())
    assert first_looks.by_chance(looks, "accessory") == 1.0
    assert first_looks.by_chance(looks, "pattern") == pytest.approx((20 * 19 + 60 * 59) / (80 * 79))
