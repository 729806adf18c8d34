"""The benchmark of slots: it looks at the latents that trainings learn from, and prints a row per grouping."""

import pytest
import torch
from benchmarks import slot_quality

from slotmemory.engine import Engine
from slotmemory.training.narratives import encode
from slotmemory.world.masks import token_masks
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize
from tests.models_for_tests import write_model


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "micro", height=96, width=160))


def test_a_narrative_is_read_as_trainings_see_it_with_everybody_where_they_are(name):
    engine = Engine.from_pretrained(name, "slots", dtype=torch.float32)
    latents, truth, prompts = slot_quality.read(engine, 6, 4.0)
    narrative = Narrative.random(6, 4.0, WorldSize(160, 96))
    taught = encode(narrative, engine.codec)
    assert latents.shape[0] == 1 and torch.equal(latents[0], taught.latents) and prompts == taught.prompts
    masks = torch.from_numpy(token_masks(narrative, engine.layout.grid))
    assert torch.equal(truth, masks.view(len(prompts), -1)) and truth.any()


def test_it_prints_the_mean_and_the_best_layer_of_every_grouping(name, capsys):
    words = ["--model", name, "--narratives", "2", "--seconds", "4", "--groupings", "learned,grid"]
    assert slot_quality.main(words) == 0
    rows = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert [row[0].strip("| ") for row in rows[-4:]] == ["learned"] * 2 + ["grid"] * 2
    assert [row[1].strip().split(", ")[-1] for row in rows[-4:]] == ["mean", "the best"] * 2


def test_a_grouping_that_is_not_there_is_said_in_one_line(name, capsys):
    assert slot_quality.main(["--model", name, "--groupings", "lerned"]) == 2
    said = capsys.readouterr().err
    assert "lerned" in said and said.count("\n") == 1
