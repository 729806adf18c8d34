"""What makes a job smaller or faster reaches the engine, the forecast and the recipe."""

import pytest
import torch
import yaml

from slotmemory import models
from slotmemory.cli.prepare import plan
from slotmemory.codecs.offload import Offloaded
from slotmemory.config import generate_options
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.footprint import bytes_of
from slotmemory.script import load_script
from tests.cli.conftest import words_of

PLAIN = {"memory": "sink", "arguments": {"window": 6}, "dtype": "fp32"}


def test_the_options_reach_the_engine_and_the_recipe(slotmemory, script, model, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(models, "compile_blocks", compiled.append)
    done = slotmemory(*words_of(script, model, "run", "--compile", "--kernel", "flash", "--offload", "all"))
    assert done.status == 0, done.err
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (recipe["compile"], recipe["kernel"], recipe["offload"]) == (True, "flash", "all") and len(compiled) == 1


def test_doctor_says_which_kernel_is_used(slotmemory, model):
    done = slotmemory("doctor", "--model", model, "--dtype", "fp32", "--kernel", "flash")
    assert done.status == 0 and "in use: flash" in done.out


def test_an_offloaded_codec_is_counted_where_it_rests(script, model):
    """On a device that is not the processor; `meta` stands for one."""
    told = load_script(script)
    options = {**PLAIN, "model": str(model), "device": "meta"}
    here, away = (plan(told, generate_options({**options, "offload": each})).forecast for each in (None, "codec"))
    codec = bytes_of(models.load(str(model), here.device, torch.float32).codec.state_dict().values())
    assert here.footprint.parts["weights"] - away.footprint.parts["weights"] == codec
    assert away.host > codec and "codec and its cache" in away.resting and here.host == 0


def test_on_the_processor_nothing_rests_elsewhere(script, model):
    options = {**PLAIN, "model": str(model), "device": "cpu"}
    both = [plan(load_script(script), generate_options({**options, "offload": each})) for each in (None, "all")]
    assert both[0].forecast.footprint == both[1].forecast.footprint
    assert not isinstance(Engine.from_pretrained(str(model), "none", offload="all").codec, Offloaded)


def test_an_unknown_part_is_refused(model):
    with pytest.raises(InputError, match="unknown offload 'codex'; did you mean 'codec'"):
        Engine.from_pretrained(str(model), "none", offload="codex")
