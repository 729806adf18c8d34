"""Every stage that trains a student, end to end on a micro model: it runs, survives a kill bitwise, leaves a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from slotmemory.codecs.base import read_tensors
from slotmemory.errors import InputError
from slotmemory.models import load
from slotmemory.training import distribution_matching, look, loop, slots
from slotmemory.training.loop import TrainingError, train
from slotmemory.training.recipe import find_objective, parse_recipe
from tests.models_for_tests import write_model

STREAM = {"chunks": 2, "new": 1, "length": 12, "switches": [6], "ratio": 3}
STAGES = {
    "ode": {"chunks": 2, "teacher_steps": 2, "pool": 2, "refresh": 5},
    "distribution_matching": {"chunks": 2, "ratio": 3},
    "long_tuning": {**STREAM, "score": "joint", "memory": "sink", "memory_options": {"recache": True}},
    "slots_warm_up": {
        "on": "world",
        "record": True,
        "chunks": 3,
        "pool": 2,
        "seconds": 5,
        "threshold": 0.2,
        "queue": 12,
    },
    "slots": {**STREAM, "stage": 2, "threshold": 0.3, "features": 1, "queue": 12, "memory_gradients": "exit_step"},
}


@pytest.fixture(autouse=True)
def short_films(monkeypatch):
    monkeypatch.setattr(look, "SCRIPTS", (["A red cat walks in the meadow."],))
    monkeypatch.setattr(look, "CHUNKS_PER_SHOT", 1)


def recipe(stage, micro, other, **values):
    options = {"student": micro, "teacher": other, "steps": [1000, 500], **STAGES[stage], **values.pop("options", {})}
    given = {"objective": stage, "steps": 20, "batch": 1, "ema": 0.9, "ema_from": 4, "validate_steps": 100}
    optimizer = {"learning_rate": 1e-3, "betas": [0.0, 0.999], "warmup": 0, "decay": 0.0}
    return parse_recipe({**given, "sample_steps": 100, "optimizer": optimizer, "options": options, **values})


def curve(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("minutes", "steps_per_second")} for line in lines]


def files(run):
    return {path.name: load_file(path) for path in sorted((run / "weights").glob("*.safetensors"))}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_runs_and_a_killed_run_goes_on_bitwise(stage, micro, other, tmp_path, monkeypatch):
    objective = find_objective(stage).Objective
    losses, whole, killed = objective.loss, tmp_path / "whole", tmp_path / "killed"

    def loss(self, step, *given):
        if step == 11 and not killed.exists():
            shutil.copytree(whole, killed)  # what a kill in the middle of this step leaves
        return losses(self, step, *given)

    monkeypatch.setattr(objective, "loss", loss)
    assert train(recipe(stage, micro, other, checkpoint_steps=10), whole) == "steps"
    assert len(curve(killed)) == 11 and torch.load(killed / "checkpoint" / "last.pt", weights_only=True)["step"] == 10
    train(recipe(stage, micro, other), tmp_path / "killed")
    assert len(curve(tmp_path / "whole")) == 20 and curve(tmp_path / "killed") == curve(tmp_path / "whole")
    whole, again = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert whole.keys() == again.keys() and all(
        torch.equal(whole[name][key], again[name][key]) for name in whole for key in whole[name]
    )
    filmed = (tmp_path / "whole" / "samples" / "0000020" / "filmstrips.png").is_file()
    assert filmed == (stage != "slots_warm_up")  # which changes nothing that is seen


def test_critic_steps_leave_generator_average_and_momenta_alone(micro, other, tmp_path):
    options = {"ratio": 100}  # one generator update, the first
    # momentum and decay would move weights that merely have no gradient
    moving = {"learning_rate": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.1, "warmup": 0, "decay": 0.0}
    for steps, name in ((1, "one"), (6, "six")):
        given = {"steps": steps, "options": options, "optimizer": moving}
        train(recipe("distribution_matching", micro, other, **given), tmp_path / name)
    one, six = files(tmp_path / "one"), files(tmp_path / "six")
    for name in ("transformer.safetensors", "transformer.ema.safetensors"):
        assert all(torch.equal(one[name][key], six[name][key]) for key in one[name])
    assert not all(torch.equal(one["critic.safetensors"][k], v) for k, v in six["critic.safetensors"].items())
    start = load(micro, torch.device("cpu"), torch.float32).backbone.state_dict()
    assert not all(torch.equal(start[key], tensor) for key, tensor in one["transformer.safetensors"].items())


def test_the_average_follows_the_weights_until_it_begins(micro, other, tmp_path):
    train(recipe("distribution_matching", micro, other, steps=4, options={"ratio": 1}), tmp_path / "early")
    early = files(tmp_path / "early")
    assert all(
        torch.equal(early["transformer.safetensors"][k], v) for k, v in early["transformer.ema.safetensors"].items()
    )
    train(recipe("distribution_matching", micro, other, steps=6, options={"ratio": 1}), tmp_path / "late")
    late = files(tmp_path / "late")
    assert not all(
        torch.equal(late["transformer.safetensors"][k], v) for k, v in late["transformer.ema.safetensors"].items()
    )


def test_adapters_are_exported_merged_and_start_the_next_stage(micro, other, tmp_path):
    adapted = {"lora": 2}
    train(recipe("slots", micro, other, steps=4, options=adapted), tmp_path / "first")
    weights = files(tmp_path / "first")
    plain = load(micro, torch.device("cpu"), torch.float32).backbone.state_dict()
    changed = [k for k, v in weights["transformer.safetensors"].items() if not torch.equal(v, plain[k])]
    assert weights["transformer.safetensors"].keys() == plain.keys()
    assert changed and all(k.endswith(".weight") and k.startswith("blocks.") for k in changed)
    run, memory = str(tmp_path / "first"), str(tmp_path / "first" / "weights" / "memory.slots.ema.safetensors")
    codec = f"{micro}/codec.safetensors"
    options = {**adapted, "student": run, "critic": run, "codec": codec, "memory_options": {"weights": memory}}
    objective = slots.Objective(
        slots.Options(**{**STAGES["slots"], **options, "teacher": other, "steps": (1000, 500)}),
        distribution_matching.loop.Context(batch=1),
    )
    assert (objective.whole.layout.height, objective.whole.layout.width) == (32, 48)  # as in what the run started from
    assert torch.equal(objective.memory.adapters.weight, weights["memory.slots.ema.safetensors"]["adapters.weight"])
    merged = weights["critic.ema.safetensors"]["blocks.0.ffn.0.weight"]
    assert torch.equal(objective.critic.blocks[0].ffn[0].weight, merged)


def test_the_memorys_file_says_what_it_was_trained_for(micro, other, tmp_path):
    train(recipe("slots", micro, other, steps=1), tmp_path / "run")
    _, told = read_tensors(tmp_path / "run" / "weights" / "memory.slots.safetensors")
    assert json.loads(told["config"]) == {"slots": 2, "slot_dim": 8, "attn_scale": "standard"}


def test_a_loss_that_is_not_finite_names_term_and_prompt_and_keeps_the_last_checkpoint(
    micro, other, tmp_path, monkeypatch
):
    def critic_loss(objective, clip, random, made=distribution_matching.Objective.critic_loss):
        loss = made(objective, clip, random)
        return loss * float("nan") if critic_loss.broken else loss

    critic_loss.broken = False
    monkeypatch.setattr(distribution_matching.Objective, "critic_loss", critic_loss)
    train(recipe("distribution_matching", micro, other, steps=2), tmp_path)
    before = (tmp_path / "checkpoint" / "last.pt").read_bytes()
    critic_loss.broken = True
    with pytest.raises(TrainingError, match=r"critic is nan in step 3 \('.+'\); stopped before its optimizer step"):
        train(recipe("distribution_matching", micro, other, steps=4), tmp_path)
    assert (tmp_path / "checkpoint" / "last.pt").read_bytes() == before


def test_recorded_features_teach_slots_what_the_videos_themselves_teach(other, tmp_path):
    model = str(write_model(tmp_path / "model", context_noise=0.0))
    # clips as long as the videos: both begin where the stream does
    whole = {"chunks": 100, "memory_options": {"bank": 0}}
    first = {}
    for record in (False, True):
        train(
            recipe("slots_warm_up", model, other, steps=1, options={**whole, "record": record}), tmp_path / str(record)
        )
        first[record] = curve(tmp_path / str(record))[0]
    assert first[True]["slot_reconstruction"] > 0
    for name in ("slot_contrast", "slot_reconstruction", "slot_sharpness"):
        assert first[True][name] == pytest.approx(first[False][name], rel=0.01)  # kept in bf16


def test_what_the_model_makes_anew_in_every_step_cannot_be_recorded(micro, other):
    with pytest.raises(InputError, match="use on=world"):
        recipe("slots_warm_up", micro, other, options={"on": "own", "record": True})


@pytest.mark.parametrize("stage", ["slots_warm_up", "slots"])
def test_a_decoder_of_features_that_nothing_would_use_is_refused(stage, micro, other):
    given = {"decoder": "runs/earlier", "features": 0}
    with pytest.raises(InputError, match="decoder=runs/earlier without features: .* or decoder to null"):
        recipe(stage, micro, other, options=given)
    assert recipe(stage, micro, other, options={**given, "features": 1}).options.decoder == "runs/earlier"


def test_slots_that_tell_features_are_taught_by_a_decoder_that_stays_behind(micro, other, tmp_path):
    for features in (0, 10):
        train(recipe("slots_warm_up", micro, other, steps=1, options={"features": features}), tmp_path / str(features))
    plain, told = (curve(tmp_path / str(features))[0] for features in (0, 10))
    assert "slot_features" not in plain and told["slot_features"] > 0
    exported = {path.name for path in (tmp_path / "10" / "weights").glob("slot_decoder*")}
    assert exported and not any(
        "decoder" in name for name in load_file(tmp_path / "10/weights/memory.slots.safetensors")
    )
    again = {"features": 10, "decoder": str(tmp_path / "10")}
    context = loop.Context(batch=1)
    goes_on = slots.Objective(
        slots.Options(student=micro, teacher=other, steps=(1000, 500), switches=(), **again), context
    )
    saved = load_file(tmp_path / "10" / "weights" / "slot_decoder.ema.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in goes_on.lessons.decoder.state_dict().items())
