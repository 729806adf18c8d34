"""Pretraining the history encoder: who is asked for, what is hidden, where gradients go, and what a stream then holds."""

import json

import pytest
import torch
from safetensors.torch import load_file

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.training import loop, preservation
from slotmemory.training.recipe import parse_recipe
from slotmemory.world.renderer import WorldSize
from tests.models_for_tests import write_model
from tests.training.test_videos import write_video

ENCODER = {"rate": "2x2x2", "width": 16, "heads": 2}
FILE = "memory.history"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    size = WorldSize()
    return write_model(tmp_path_factory.mktemp("model"), height=size.height, width=size.width)


def options_for(model, **changes):
    small = {"seconds": 6, "pool": 1, "refresh": 100, "frames": 9, "queries": 2, "held_out": 1}
    return preservation.Options(**{"model": str(model), **ENCODER, **small, **changes})


def objective_for(model, **changes):
    torch.manual_seed(0)
    return preservation.Objective(options_for(model, **changes), loop.Context(batch=2))


@pytest.fixture(scope="module")
def objective(model):
    found = objective_for(model)
    torch.nn.init.normal_(found.memory.encoder.project.weight, std=0.1)
    return found


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def of_stage(objective, stage, **changes):
    """The same objective in another stage."""
    objective.options = objective.options.model_copy(update={"stage": stage, **changes})
    return objective


@pytest.mark.parametrize("stage", ["query", "next"])
def test_gradient_reaches_every_weight_of_the_encoder_and_none_of_the_transformer(objective, stage):
    of_stage(objective, stage)
    objective.memory.zero_grad()
    loss, told = objective.loss(0, 0, random())
    loss.backward()
    assert torch.isfinite(loss) and set(told) == {"plain", "entity"}
    for name, weight in objective.memory.named_parameters():
        assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    assert all(weight.grad is None for weight in objective.transformer.parameters())


def test_asked_for_frames_are_clean_and_all_others_hidden(objective, monkeypatch):
    of_stage(objective, "query", hide=(0.5, 1.0))
    seen = {}
    monkeypatch.setattr(
        objective, "remember", lambda latents, prompts: seen.setdefault("latents", latents) is None or [(latents,) * 2]
    )
    monkeypatch.setattr(
        objective, "errors", lambda target, frames, *rest: seen.update(target=target, frames=frames) or target.mean(2)
    )
    item = objective.pool.at(0)[0]
    latents, weights, prompts = objective.clips([item], random(1))
    objective.query(latents, weights, prompts, random(5))  # frames 0 to 3
    same = (seen["latents"] == latents).flatten(2).all(-1)[0]
    asked = torch.zeros(9, dtype=torch.bool)
    asked[seen["frames"].flatten()] = True
    assert torch.equal(same, asked) and 3 < asked.sum() <= 6
    assert torch.equal(seen["target"], latents[0][seen["frames"]])
    apart = (seen["latents"] - latents).square().flatten(2).mean(-1)[0]
    assert apart[~asked].min() > 0.1


def test_every_frame_is_asked_for_about_as_often(objective, monkeypatch):
    of_stage(objective, "query", run=1)
    counts = torch.zeros(9)
    monkeypatch.setattr(objective, "remember", lambda latents, prompts: [])
    monkeypatch.setattr(
        objective, "errors", lambda target, frames, *rest: counts.put_(frames.flatten(), torch.ones(2), True)
    )
    clip = objective.clips([objective.pool.at(0)[0]], random())
    for seed in range(200):
        objective.query(*clip, random(seed))
    of_stage(objective, "query", run=3)
    assert counts.sum() == 400 and counts.min() > 25 and counts.max() < 65


def test_what_training_shows_is_what_a_stream_holds(objective, model, tmp_path):
    engine = Engine.from_pretrained(str(model), "none", dtype=torch.float32)
    path = tmp_path / f"{FILE}.safetensors"
    save(objective, path)
    engine = engine.with_memory("history", weights=str(path), placing="native")
    prompt = "A red cat walks in the meadow."
    latents = torch.randn(1, 9, *objective.pool.at(0)[0].latents.shape[1:], generator=random())
    session = engine.session({0: prompt})
    session.prefill(latents)
    with torch.no_grad():
        context = objective.remember(latents, [[prompt] * 3])
    read = session._rotated([[bank] for bank in session.state["history"]])
    for shown, held in zip(context, read, strict=True):
        assert shown[0].shape[1] == 4 * objective.memory.encoder.tokens
        torch.testing.assert_close(shown, held, atol=1e-4, rtol=0)


def test_the_window_stands_behind_the_tokens_as_its_clean_pass_left_it(objective):
    latents = torch.randn(1, 6, *objective.pool.at(0)[0].latents.shape[1:], generator=random())
    prompts = [["a red cat", "a blue ball"]]
    with torch.no_grad():
        context = objective.remember(latents, prompts)
        joined = objective.with_window(context, latents, prompts, torch.zeros_like(latents[:, :3]))
    tokens = objective.layout.tokens_per_chunk
    for (keys, _), (more, _) in zip(context, joined, strict=True):
        assert more.shape[1] == keys.shape[1] + tokens and torch.equal(more[:, : keys.shape[1]], keys)


def test_recalled_frames_are_measured_beside_those_painted_without_a_memory(objective, tmp_path):
    found = objective.validate(0)
    assert found["compression"] == 8
    assert {f"{name}{kind}" for name in ("psnr", "ssim") for kind in ("", "_without")} < set(found)
    assert found["psnr"] != found["psnr_without"] and all(-1 <= found[f"ssim{kind}"] <= 1 for kind in ("", "_without"))
    painted, truth = objective.recall(objective.held_out[0], random())
    assert painted.shape == truth.shape and truth.shape[:2] == (2, 12)
    objective.sample(0, tmp_path)
    assert (tmp_path / "recalled.png").stat().st_size > 1000


def test_without_branches_to_train_it_says_so(model):
    low = objective_for(model, branches="low")
    with pytest.raises(InputError, match="branches=low has no weights of its own"):
        low.loss(0, 0, random())
    tuned = objective_for(model, branches="low", tune=True)
    tuned.loss(0, 0, random())[0].backward()
    assert set(tuned.modules()) == {FILE, "transformer"}
    assert tuned.transformer.blocks[0].self_attn.k.weight.grad.abs().sum() > 0
    assert tuned.transformer.patch_embedding.weight.grad is None  # the low-resolution branch is a copy of it


def test_clips_that_are_no_whole_chunks_are_named(model):
    with pytest.raises(InputError, match="frames=10: expected a multiple of 3"):
        objective_for(model, frames=10)


def test_a_folder_of_videos_is_learnt_from_and_measured_on(model, tmp_path):
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", 40, height=96, width=160)
    objective = objective_for(model, on=str(tmp_path))
    learnt, measured = objective.make(0), objective.make(preservation.HELD_OUT)
    assert learnt.latents.shape == measured.latents.shape == (9, 16, 12, 20)
    assert not torch.equal(learnt.latents, measured.latents)
    torch.nn.init.normal_(objective.memory.encoder.project.weight, std=0.1)
    loss, told = objective.loss(0, 0, random())
    loss.backward()
    assert loss > 0 and told["entity"] == 0  # nobody knows where anybody is
    assert objective.memory.encoder.project.weight.grad.abs().sum() > 0
    assert 0 < objective.validate(0)["psnr"] < 60


def save(objective, path):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in objective.memory.state_dict().items()}, path, objective.metadata(FILE))


def recipe(model, steps, **values):
    return parse_recipe(
        {
            "objective": "preservation",
            "steps": steps,
            "batch": 1,
            "ema": 0.9,
            "validate_steps": 1000,
            "sample_steps": 1000,
            "optimizer": {"learning_rate": 0.003, "warmup": 2, "decay": 0.0},
            "options": options_for(model, frames=6, queries=1).model_dump(),
            **values,
        }
    )


def test_twenty_steps_train_and_a_resumed_run_repeats_them_bitwise(model, tmp_path):
    loop.train(recipe(model, 20), tmp_path / "whole")
    loop.train(recipe(model, 9), tmp_path / "parts")
    loop.train(recipe(model, 20), tmp_path / "parts")
    whole, parts = (load_file(tmp_path / run / "weights" / f"{FILE}.safetensors") for run in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    # the exported file is what an engine takes
    engine = Engine.from_pretrained(str(model), "none", dtype=torch.float32)
    path = tmp_path / "whole" / "weights" / f"{FILE}.ema.safetensors"
    engine = engine.with_memory("history", weights=str(path))
    assert engine.memory.encoder.rate == (2, 2, 2)
    engine.session({0: "A red cat walks in the meadow."}).step()
