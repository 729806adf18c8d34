"""The benchmark of retention: who is on the tokens that a memory holds when somebody is asked for again."""

import pytest
import torch
from benchmarks import retention

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.evaluation import returning
from slotmemory.memory import Bank
from tests.models_for_tests import write_model


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "micro", height=96, width=160))


def bank_at(*places):
    positions = torch.tensor(places)[None, :, None]  # [1, M, 1, 3]
    items = positions.shape[1]
    tokens, numbers = torch.zeros(1, items, 1, 1, 2), torch.zeros(1, items)
    return Bank(tokens, tokens, positions, numbers.long(), numbers.long(), numbers, {})


def test_tokens_on_the_hero_count_once_in_every_layer_however_often_they_are_held():
    hero = torch.zeros(4, 2, 2, dtype=torch.bool)
    hero[1, 0, 0] = hero[3, 1, 1] = True
    state = {
        "sink": [bank_at((0, 0, 0), (1, 0, 0)), bank_at((0, 1, 1))],
        "slots": [bank_at((1, 0, 0), (3, 1, 1)), bank_at((3, 1, 0))],
    }
    assert retention.held(state, hero) == [2, 0] and retention.held({}, hero) == []


def test_places_that_are_not_where_the_tokens_were_are_refused():
    hero = torch.ones(2, 2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match="re-places"):
        retention.held({"far": [bank_at((7, 0, 0))]}, hero)
    with pytest.raises(InputError, match="averages"):
        retention.held({"mean": [bank_at((0.5, 0.0, 0.0))]}, hero)


def test_a_ceiling_holds_all_of_the_hero_and_a_window_nothing(name):
    script = returning.scripts(1)[0]
    engines = {
        word: Engine.from_pretrained(name, word, dtype=torch.float32) for word in ("everything", "window", "none")
    }
    latents, hero = retention.told(engines["window"], script)
    counted = {word: retention.asked(engine, script, latents, hero) for word, engine in engines.items()}
    before = int(hero[: 3 * sorted(script.prompts)[-1]].sum())
    assert before > 0 and set(counted["everything"]) == {before}
    assert set(counted["window"]) == set(counted["none"]) == {0}


def test_it_prints_a_row_per_memory_and_says_in_one_line_what_it_does_not_know(name, capsys):
    words = ["--model", name, "--scripts", "1", "--memories", "sink,slots:bank=2:evict=redundancy"]
    assert retention.main(words) == 0
    assert "| slots:bank=2:evict=redundancy |" in capsys.readouterr().out
    assert retention.main(["--model", name, "--memories", "slits"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "slots" in said
