"""What a training leaves becomes a model that the engine opens."""

import json
import shutil
import sys

import pytest
import torch

from slotmemory.engine import Engine
from slotmemory.training import look, pack


@pytest.fixture
def run(micro, tmp_path):
    """The folder of a student's run: averaged and trained weights, which differ, and a memory's."""
    folder = tmp_path / "run"
    (folder / "weights").mkdir(parents=True)
    engine = Engine.from_pretrained(micro, "slots", dtype=torch.float32)
    for part in ("transformer", "words"):
        for kind in ("", ".ema"):
            shutil.copy(f"{micro}/{part}.safetensors", folder / "weights" / f"{part}{kind}.safetensors")
    for kind, value in (("", 2.0), (".ema", 1.0)):
        state = {name: torch.full_like(tensor, value) for name, tensor in engine.memory.state_dict().items()}
        told = {"config": json.dumps({"slots": 2, "slot_dim": 8})}
        pack.write_part(folder / "weights" / f"memory.slots{kind}.safetensors", state, told)
    (folder / "recipe.yaml").write_text("options: {memory: slots, steps: [1000, 300]}\n")
    return folder


@pytest.mark.parametrize("flags, value", [([], 1.0), (["--raw"], 2.0)])
def test_a_run_packs_into_a_model_with_its_steps_and_its_memorys_weights(
    run, micro, tmp_path, monkeypatch, flags, value
):
    settings = json.loads(open(f"{micro}/model.json").read())
    monkeypatch.setattr(pack, "SETTINGS", {**look.SETTINGS, **settings})
    out = tmp_path / "model"
    told = ["pack", "--transformer", str(run), "--codec", f"{micro}/codec.safetensors", "--out", str(out), *flags]
    monkeypatch.setattr(sys, "argv", told)
    assert pack.main() == 0
    engine = Engine.from_pretrained(str(out), "slots")
    assert engine.sampler.steps == (1000, 300)
    assert float(engine.memory.adapters.weight.mean()) == value
    assert engine.session({0: "A red cat walks in the meadow."}).step().frames.shape[1] == 9


def test_a_folder_without_weights_is_named(tmp_path, monkeypatch, capsys):
    told = ["pack", "--transformer", str(tmp_path), "--codec", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", told)
    assert pack.main() == 2
    assert "holds no transformer weights" in capsys.readouterr().err
