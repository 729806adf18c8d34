"""What a training leaves becomes a model that the engine opens."""

import json
import shutil
import sys
from importlib.resources import files

import pytest
import torch
import yaml

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.training import pack


def tell(run, **options):
    """Write the recipe of a run's folder."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"options": options}))
    return run


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
    tell(folder, student=micro, memory="slots", steps=[1000, 300])
    return folder


@pytest.mark.parametrize("flags, value", [([], 1.0), (["--raw"], 2.0)])
def test_a_run_packs_into_a_model_with_its_steps_and_its_memorys_weights(
    run, micro, tmp_path, monkeypatch, flags, value
):
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


def test_the_packaged_model_keeps_its_settings_when_it_is_packed_anew(tmp_path):
    shipped = embedded_settings()
    for source in (
        "tiny",
        tell(tmp_path / "named", settings="tiny"),
        tell(tmp_path / "before they were named", dim=256),
    ):
        assert list({"name": "tiny", **pack.settings_of(source)}.items()) == list(shipped.items())


def test_settings_are_those_of_the_first_run_of_a_chain_with_the_levels_of_the_last_student(tmp_path):
    own = {**embedded_settings(), "name": "mine", "height": 64, "adapters": [{"file": "a.safetensors", "scale": 1.0}]}
    (tmp_path / "mine.json").write_text(json.dumps(own))
    first = tell(tmp_path / "first", settings=str(tmp_path / "mine.json"), steps=[1000, 500], shift=3.0)
    second = tell(tmp_path / "second", student=str(first), memory="sink", steps=[1000, 250], shift=4.0)
    third = tell(tmp_path / "third", student=str(second), memory="decoupled", steps=None, shift=None)
    expected = {name: value for name, value in own.items() if name not in ("name", "adapters")}
    assert pack.settings_of(first) == expected
    assert pack.settings_of(third) == {**expected, "steps": [1000, 250], "shift": 4.0}
    based = tell(tmp_path / "based", student=str(first), base="tiny", memory="sink", steps=None)
    assert pack.settings_of(based)["height"] == embedded_settings()["height"]


def test_settings_can_be_named_for_a_run_whose_start_is_gone(run, micro, tmp_path, monkeypatch, capsys):
    tell(run, student="runs/gone", memory="slots", steps=[1000, 300])
    told = ["pack", "--transformer", str(run), "--codec", f"{micro}/codec.safetensors", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", told)
    assert pack.main() == 2
    assert "runs/gone tells no settings" in capsys.readouterr().err and not (tmp_path / "out").exists()
    monkeypatch.setattr(sys, "argv", [*told, "--settings", f"{micro}/model.json"])
    assert pack.main() == 0
    engine = Engine.from_pretrained(str(tmp_path / "out"))
    assert engine.sampler.steps == (1000, 300) and engine.layout.width == 48


def test_what_tells_no_settings_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere tells no settings.*--settings MODEL"):
        pack.settings_of("nowhere")
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(InputError, match="'height' is None"):
        pack.settings_of(tmp_path)


def embedded_settings():
    return json.loads((files("slotmemory") / "assets" / "tiny" / "model.json").read_text(encoding="utf-8"))
