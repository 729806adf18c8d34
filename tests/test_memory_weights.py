"""Trained weights of a memory come with the model or from a file, and never silently with other arguments."""

import json

import pytest
import torch
from safetensors.torch import save_file

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from tests.models_for_tests import write_model

TRAINED = {"rate": "2x2x1", "width": 16, "heads": 2}


def trained(engine, path, **changes):
    """Write a history encoder whose weights are all 0.5."""
    policy = engine.with_memory("history", weights="none", **(TRAINED | changes)).memory
    tensors = {name: torch.full_like(tensor, 0.5) for name, tensor in policy.state_dict().items()}
    save_file(tensors, path, {"config": json.dumps(TRAINED | changes)})
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"))
    trained(load(folder), folder / "memory.history.safetensors")
    return folder


def load(folder) -> Engine:
    return Engine.from_pretrained(str(folder), "none", dtype=torch.float32)


def values(engine):
    return {float(weight.unique()) if weight.unique().numel() == 1 else None for weight in engine.memory.parameters()}


def test_what_comes_with_the_model_is_loaded_with_the_arguments_it_was_trained_with(model):
    engine = load(model).with_memory("history")
    assert values(engine) == {0.5} and engine.memory.encoder.rate == (2, 2, 1)
    assert load(model).defaults_for("history", {})["rate"] == "2x2x1"
    assert not any(weight.requires_grad for weight in engine.memory.parameters())


def test_weights_of_a_file_are_preferred_and_none_leaves_a_memory_untrained(model, tmp_path):
    path = trained(load(model), tmp_path / "mine.safetensors", rate="2x2x2")
    engine = load(model).with_memory("history", weights=str(path))
    assert values(engine) == {0.5} and engine.memory.encoder.rate == (2, 2, 2)
    assert values(load(model).with_memory("history", weights="none", **TRAINED)) != {0.5}
    assert load(model).with_memory("window").memory.called() == "window"


def test_a_relative_path_is_remembered_from_the_root(model, tmp_path, monkeypatch):
    trained(load(model), tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = load(model).defaults_for("history", {"weights": "mine.safetensors"})
    assert arguments["weights"] == str(tmp_path / "mine.safetensors")


def test_other_arguments_than_the_trained_ones_are_refused_by_name(model):
    with pytest.raises(InputError, match="rate='4x4x1', but .* was trained with rate='2x2x1'; leave"):
        load(model).with_memory("history", rate="4x4x1")


def test_a_missing_or_foreign_file_is_named(model, tmp_path):
    with pytest.raises(InputError, match="no weights at .*nowhere.safetensors"):
        load(model).with_memory("history", weights=str(tmp_path / "nowhere.safetensors"))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"config": "{}"})
    with pytest.raises(InputError, match="lacks the tensor 'encoder"):
        load(model).with_memory("history", weights=str(tmp_path / "x.safetensors"))
