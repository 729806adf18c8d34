"""Learning from the next chunk: what is asked for, who learns from it, what is measured, and what a stream then takes."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from slotmemory.backbones.attention import Dense
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.training import look, loop, next_chunk, pack
from slotmemory.training.narratives import Encoded
from slotmemory.training.next_chunk import Clip, Pick, returns
from slotmemory.training.plan import plan
from slotmemory.training.recipe import parse_recipe
from tests.models_for_tests import write_model

GATE = "memory.decoupled"
# 8 latent frames of a micro model: 2 of them window, 6 archive; fewer blocks than there are
SMALL = {
    "memory_options": {"top_blocks": 8, "window": 5},
    "budget": 192,
    "chunks": 6,
    "asked": 1,
    "levels": 1,
    "away": 1,
    "seconds": 8,
    "pool": 2,
    "refresh": 5,
    "held_out": 2,
}


# who is visible in the chunks of a narrative: 0 and 1 return in turn
SEEN = [{0}, {0}, {1}, {1}, {0}, {0, 1}, {1}, {1}, {0}, {0}, {1}]


def story(objective, seed):
    """A narrative of noise, in place of one that takes a second to draw."""
    layout, random = objective.engine.layout, torch.Generator().manual_seed(seed)
    frames = 3 * len(SEEN)
    latents = torch.randn(frames, layout.latent_channels, layout.latent_height, layout.latent_width, generator=random)
    cells = torch.rand(2, frames, *layout.grid, generator=random) < 0.3
    shown = torch.tensor([[entity in seen for seen in SEEN] for entity in range(2)]).repeat_interleave(3, 1)
    prompts = [("A red cat walks in the meadow.", "A blue ball waits on the beach.")[k // 4 % 2] for k in range(11)]
    seen = [frozenset(each) for each in SEEN]
    return Encoded(latents, cells & shown[..., None, None], None, None, prompts, seen, [0, 4, 8], [], [], frozenset())


def build(micro, batch=1, **changes):
    torch.manual_seed(0)
    return next_chunk.Objective(next_chunk.Options(student=micro, **{**SMALL, **changes}), loop.Context(batch=batch))


@pytest.fixture(scope="module")
def objective(micro):
    return build(micro, batch=2)


def learning(objective, step=0) -> set[str]:
    """Weights that have a gradient other than zero after a step, by their full names."""
    for module in objective.modules().values():
        module.zero_grad()
    loss, _ = objective.loss(step, 0, loop.generator_for(0, step, 0))
    loss.backward()
    named = [(f"{m}.{n}", p) for m, module in objective.modules().items() for n, p in module.named_parameters()]
    return {name for name, p in named if p.grad is not None and float(p.grad.abs().max()) > 0}


# who learns


def test_gradients_reach_every_gate_and_nothing_else_unless_the_transformer_is_tuned(objective, micro):
    assert learning(objective) == {f"{GATE}.weight", f"{GATE}.bias"}
    assert all(float(layer.abs().max()) > 0 for layer in objective.memory.bias.grad)
    tuned = build(micro, tune=True)
    found = learning(tuned)
    assert {f"{GATE}.weight", f"{GATE}.bias"} < found
    assert len([name for name in found if name.startswith("transformer.")]) == len(list(tuned.transformer.parameters()))


def test_tokens_that_a_memory_makes_itself_learn_as_well(micro):
    encoder = {"rate": "1x1x1", "width": 16, "heads": 2}
    found = learning(build(micro, memory="history", memory_options=encoder, budget=None))
    assert found and all(name.startswith("memory.history.") for name in found)


def test_a_memory_without_weights_is_refused_unless_the_transformer_is_tuned(micro):
    plain = {"memory": "sink", "memory_options": {}}
    with pytest.raises(InputError, match="memory 'sink' has no weights to train; set tune=true"):
        build(micro, **plain)
    found = learning(build(micro, tune=True, **plain))
    assert found and all(name.startswith("transformer.") for name in found)


def test_weights_that_no_error_can_reach_are_refused(micro):
    deaf = build(micro, memory_options={"archive": 0})
    with pytest.raises(InputError, match="memory 'decoupled' with memory_options={'archive': 0} has weights that no"):
        deaf.loss(0, 0, loop.generator_for(0, 0, 0))


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"seconds": 3}, "seconds=3 is 4 chunks; a clip has chunks=6"),
        ({"chunks": 3, "asked": 2}, "chunks=3 leaves no past for a return: expected asked"),
        ({"lora": 2}, "lora=2 adapts the transformer"),
    ],
)
def test_options_that_contradict_each_other_are_named(micro, wrong, said):
    with pytest.raises(InputError, match=said.replace("+", r"\+")):
        build(micro, **wrong)


# what is asked


def test_the_error_through_the_session_is_that_of_one_plain_pass_for_everything(tmp_path):
    model = str(write_model(tmp_path / "model", context_noise=0.0))
    objective = build(model, tune=True, memory="everything", memory_options={})
    random = torch.Generator().manual_seed(0)
    layout, prompt = objective.engine.layout, "A red cat walks in the meadow."
    shape = (1, 9, layout.latent_channels, layout.latent_height, layout.latent_width)
    latents, noise = torch.randn(shape, generator=random), torch.randn((1, 3, *shape[2:]), generator=random)
    cells = torch.zeros(1, 9, *layout.grid, dtype=torch.bool)
    clip = Clip(latents, [[prompt]] * 3, cells, cells)
    with torch.no_grad():
        errors, _ = objective.stream(objective.engine, clip, {2: [(0.7, noise)]}, [0])
        text = objective.transformer.text_keys(objective.words.encode([prompt])[0])
        noisy = torch.cat((latents[:, :6], 0.3 * latents[:, 6:] + 0.7 * noise), 1)
        steps = torch.tensor([[0.0] * 6 + [700.0] * 3])
        chunk = torch.arange(9) // 3
        flow, _ = objective.transformer(noisy, steps, text, torch.arange(9), Dense(chunk[:, None] >= chunk))
    expected = (flow[:, 6:] - (noise - latents[:, 6:])).square().mean(2)
    assert list(errors) == [2]
    torch.testing.assert_close(errors[2][0], expected, atol=1e-4, rtol=1e-4)


def test_a_stream_remembers_the_truth_and_not_what_it_was_asked(objective):
    clip = objective.cut([Pick(objective.pool.at(0)[0], 0)], 4)
    noise, told = torch.randn_like(clip.latents[:, :3]), []
    for asks in ({}, {1: [(0.9, noise)], 2: [(0.5, noise)]}):
        with torch.no_grad():
            asked = {**asks, 3: [(0.7, noise)]}
            told.append(objective.stream(objective.engine, clip, asked, [0])[0][3])
    assert torch.equal(*told)


def test_returns_are_clips_whose_past_showed_who_comes_back_after_an_absence():
    seen = [{0}, {0, 1}, {1}, {1}, {0, 1}, {0}, {0}]
    item = SimpleNamespace(chunks=len(seen), visible=seen)
    found = [(pick.start, pick.entity) for pick in returns(item, past=3, asked=1, away=2)]
    assert found == [(1, 0)]  # chunk 4 shows 0 again; 1 was never away before it left
    assert [(pick.start, pick.entity) for pick in returns(item, past=4, asked=1, away=2)] == [(0, 0)]
    assert returns(item, past=2, asked=1, away=2) == []  # the two chunks before show 0 no more
    assert returns(item, past=4, asked=4, away=2) == []  # the narrative ends sooner
    assert returns(item, past=3, asked=1, away=3) == []


def test_most_clips_begin_asking_at_a_return_and_the_rest_anywhere(objective):
    pool = [story(objective, seed) for seed in range(4)]
    drawn = [objective.draw(pool, 4, torch.Generator().manual_seed(seed)) for seed in range(200)]
    back = [pick for pick in drawn if pick.entity >= 0]
    assert 110 < len(back) < 170
    for pick in back:
        assert pick.entity in pick.item.visible[pick.start + 4] and pick.entity not in pick.item.visible[pick.start + 3]
        clip = objective.cut([pick], 5)
        assert clip.returning[:, 12:].any() and bool((clip.returning <= clip.entities).all())
    assert all(0 <= pick.start <= pick.item.chunks - 5 for pick in drawn) and len({pick.start for pick in drawn}) > 3


def test_cells_of_entities_weigh_more(objective, monkeypatch):
    def stream(engine, clip, asks, seeds):
        (chunk,) = asks
        on = clip.entities[:, chunk * 3 : (chunk + 1) * 3].float()
        seen["share"] = float(on.mean())
        return {chunk: (objective.memory.bias.sum() * 0 + 1 + on)[None]}, {}

    seen = {}
    monkeypatch.setattr(objective, "stream", stream)
    loss, told = objective.loss(0, 0, loop.generator_for(0, 0, 0))
    share = seen["share"]
    assert 0 < share < 1 and float(told["entity"]) == 2
    assert float(loss.detach()) == pytest.approx((1 - share + 3 * 2 * share) / (1 - share + 3 * share))


# what is measured


def test_held_out_returns_are_measured_with_the_memory_as_it_is_as_it_was_and_with_a_window(micro, monkeypatch):
    monkeypatch.setattr(next_chunk.Objective, "make", story)
    objective = build(micro)
    before = objective.validate(0)
    assert before["return"] == before["return_untrained"] != before["return_window"]
    assert objective.window().budget == 192 and objective.window().past == 8
    torch.nn.init.constant_(objective.memory.bias, 3.0)
    after = objective.validate(1)
    assert after["return"] != before["return"]
    assert {name: after[name] for name in after if "_" in name} == {
        name: before[name] for name in before if "_" in name
    }
    assert set(after) == {f"{what}{whose}" for what in ("return", "plain") for whose in ("", "_untrained", "_window")}


# runs


def recipe(micro, steps, **values):
    optimizer = {"learning_rate": 0.01, "warmup": 2, "decay": 0.0}
    given = {"objective": "next_chunk", "steps": steps, "batch": 1, "ema": 0.9, "validate_steps": 100}
    options = {"student": micro, **SMALL}
    return parse_recipe({**given, "sample_steps": 100, "optimizer": optimizer, "options": options, **values})


def test_a_resumed_run_goes_on_bitwise_and_its_weights_are_what_streams_and_models_take(micro, tmp_path, monkeypatch):
    monkeypatch.setattr(next_chunk.Objective, "make", story)
    monkeypatch.setattr(look, "SCRIPTS", (["A red cat walks in the meadow."],))
    monkeypatch.setattr(look, "CHUNKS_PER_SHOT", 1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    loop.train(recipe(micro, 8), whole)
    loop.train(recipe(micro, 5), parts)
    loop.train(recipe(micro, 8), parts)
    weights, again = (load_file(run / "weights" / f"{GATE}.safetensors") for run in (whole, parts))
    assert all(torch.equal(weights[name], again[name]) for name in weights) and weights["weight"].abs().max() > 0
    lines = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    fixed, start = (
        load_file(path) for path in (whole / "weights" / "transformer.safetensors", f"{micro}/transformer.safetensors")
    )
    assert all(torch.equal(fixed[name], start[name]) for name in start)
    # a stream with the file, and a model packed from the run, have the averaged gate and its arguments
    averaged = load_file(whole / "weights" / f"{GATE}.ema.safetensors")["bias"]
    file = str(whole / "weights" / f"{GATE}.ema.safetensors")
    engine = Engine.from_pretrained(micro, "decoupled", dtype=torch.float32, weights=file, budget=192)
    assert torch.equal(engine.memory.bias, averaged) and engine.memory.top_blocks == 8
    engine.session({0: "A red cat walks in the meadow."}).step()
    given = ["--transformer", str(whole), "--codec", f"{micro}/codec.safetensors", "--out", str(tmp_path / "model")]
    monkeypatch.setattr(sys, "argv", ["pack", *given])
    assert pack.main() == 0
    packed = Engine.from_pretrained(str(tmp_path / "model"), "decoupled", dtype=torch.float32)
    assert torch.equal(packed.memory.bias, averaged)
    assert packed.sampler.timesteps == engine.sampler.timesteps  # no student: the model's own steps


def test_a_dry_run_plans_it(micro):
    found = plan(recipe(micro, 3))
    assert found.parameters[GATE] == (68, 68) and found.parameters["transformer"][0] == 0
    assert found.flops["asking"] > 0 and found.flops["clean passes"] > 0
