"""The session as a rollout: the same chunks as when it streams, and gradients through the last pass of each."""

from dataclasses import replace

import pytest
import torch

from slotmemory.backbones.guided import Guided
from slotmemory.models import load
from slotmemory.training.networks import Cast, Lines, add_lora, merged
from slotmemory.training.policies import InTraining
from slotmemory.training.rollout import Rollout, engine_for

CAT, BALL = "A red cat walks in the meadow.", "A blue ball waits on the beach."
CPU, LAST = torch.device("cpu"), 1


@pytest.fixture
def model(micro):
    return load(micro, CPU, torch.float32)


def student(engine, memory="sink", recompute=False, through=(), defects=(), clip=21, **options):
    """An engine that rolls out the model's own transformer, and the transformer."""
    whole = engine.with_memory(memory, **options)
    cast = Cast(engine.backbone.requires_grad_(True), torch.float32, recompute)
    policy = whole.memory.requires_grad_(True)
    if through or defects:
        policy = InTraining(policy, cast, through, defects, clip)
    return engine_for(whole, backbone=cast, memory=policy)


def stream(engine, prompts=(CAT,), seeds=(7,), **options) -> Rollout:
    return Rollout(engine, {0: list(prompts)}, list(seeds), **options)


def gradients(engine, loss) -> dict[str, torch.Tensor]:
    module = engine.backbone.module
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, found)}


def close(a, b) -> None:
    # with gradients, CPUs compute attention by products instead of the fused kernel
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def apart(a, b) -> float:
    return max(float((a[name] - b[name]).abs().max() / (1e-9 + b[name].abs().max())) for name in a)


@pytest.mark.parametrize("memory", ["sink", "slots"])
def test_a_rollout_to_the_last_step_makes_what_the_session_makes(model, memory):
    session = model.with_memory(memory).session({0: CAT, 3: BALL}, seed=7)
    expected = torch.cat([session.step().latents for _ in range(5)], 1)
    for recording in (False, True):
        rollout = Rollout(student(model, memory), {0: [CAT], 3: [BALL]}, [7])
        with torch.set_grad_enabled(recording):
            clip = rollout.roll(2, LAST), rollout.roll(3, LAST)
        made = torch.cat([part.latents.detach() for part in clip], 1)
        close(made, expected) if recording else torch.testing.assert_close(made, expected, atol=0, rtol=0)
    assert clip[1].start == 6 and clip[1].prompts == [[CAT], [BALL], [BALL]]


def test_a_rollout_stops_at_the_step_it_is_told_and_only_that_step_records_gradients(model):
    engine = student(model)
    calls = []
    engine.backbone._call = lambda *given, method="forward", kept=engine.backbone._call: (
        calls.append((method, torch.is_grad_enabled())) or kept(*given, method=method)
    )
    passes = {}
    for exit in (0, 1):
        calls.clear()
        stream(engine).roll(2, exit)
        passes[exit] = [recording for method, recording in calls if method == "forward"]
    assert passes == {0: [True, False] * 2, 1: [False, True, False] * 2}  # the clean pass comes last


@pytest.mark.parametrize("memory", ["sink", "slots", "everything"])
def test_the_loss_of_a_chunk_reaches_no_pass_of_an_earlier_one(model, memory):
    engine = student(model, memory)
    together = stream(engine).roll(2, LAST).latents[:, 3:].square().mean()
    rollout = stream(engine)
    with torch.no_grad():
        rollout.roll(1, LAST)
    alone = rollout.roll(1, LAST).latents.square().mean()
    close(together, alone)
    assert apart(gradients(engine, together), gradients(engine, alone)) < 1e-3


def test_published_caches_leak_gradients_into_earlier_passes(model):
    sound = student(model)
    loss = stream(sound).roll(2, LAST).latents[:, 3:].square().mean()
    leaky = student(model, defects=["leaking_cache"])
    leaking = stream(leaky).roll(2, LAST).latents[:, 3:].square().mean()
    close(loss, leaking)
    assert apart(gradients(leaky, leaking), gradients(sound, loss)) > 0.05


def test_recomputed_passes_have_the_same_gradients_unless_the_memory_changes_under_them(model):
    plain = stream(student(model)).roll(5, LAST).latents.square().mean()
    expected = gradients(student(model), plain)
    kept = student(model, recompute=True)
    assert apart(gradients(kept, stream(kept).roll(5, LAST).latents.square().mean()), expected) < 1e-5
    mutated = student(model, recompute=True, defects=["mutated_bank"])
    loss = stream(mutated).roll(5, LAST).latents.square().mean()
    close(loss, plain)
    assert apart(gradients(mutated, loss), expected) > 1e-3


def test_published_switches_after_the_first_clip_leave_a_sink_of_zeros(model):
    def sink(defects, switch):
        rollout = Rollout(student(model, recache=True, defects=defects, clip=6), {0: [CAT], switch: [BALL]}, [7])
        with torch.no_grad():
            rollout.roll(4, LAST)
        return float(rollout.session.state["sink"][0].values.abs().max())

    assert sink(["null_sink"], 3) == 0 < sink(["null_sink"], 2) and sink([], 3) > 0


def test_a_rollout_goes_on_from_a_saved_state_under_the_weights_of_now(model):
    engine = student(model, "slots")
    with torch.no_grad():
        rollout = stream(engine, (CAT, BALL), (1, 2), keep=6)
        rollout.roll(2, LAST)
        twin = Rollout.from_state(engine, rollout.state(), keep=6)
        a, b = rollout.roll(2, LAST), twin.roll(2, LAST)
        assert torch.equal(a.latents, b.latents) and a.past == 6 and torch.equal(a.first, b.first)
        before = rollout.session.told.keys[0][0].clone()
        engine.backbone.module.text_embedding[0].weight.mul_(1.5)
        engine.backbone.refresh()
        rollout.roll(1, LAST)
        assert not torch.equal(before, rollout.session.told.keys[0][0]), "the prompt was told by old weights"


def test_nothing_of_an_earlier_roll_is_differentiated_again(model):
    rollout = stream(student(model, "slots"))
    for _ in range(2):
        clip = rollout.roll(2, LAST)
        (clip.latents.square().mean() + sum(clip.losses.values())).backward()  # a second backward pass would raise
        rollout.session.engine.backbone.refresh()


@pytest.mark.parametrize("memory", ["sink", "slots"])
def test_streams_of_a_batch_have_scripts_and_noise_of_their_own(model, memory):
    with torch.no_grad():
        both = stream(student(model, memory), (CAT, BALL), (1, 2)).roll(3, LAST).latents
        for row, prompt in enumerate((CAT, BALL)):
            alone = stream(student(model, memory), (prompt,), (1 + row,)).roll(3, LAST).latents
            torch.testing.assert_close(both[row : row + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("through, reached", [((), False), (("hidden",), True)])
def test_slots_teach_the_backbone_only_where_it_is_asked_for(model, through, reached):
    engine = student(model, "slots", through=through)
    losses = stream(engine).roll(2, LAST).losses
    assert set(losses) == {"slot_contrast"}
    policy = engine.memory.policy if through else engine.memory
    adapters = torch.autograd.grad(losses["slot_contrast"], policy.adapters.weight, retain_graph=True)[0]
    assert float(adapters.abs().max()) > 0
    found = gradients(engine, losses["slot_contrast"]) if losses["slot_contrast"].requires_grad else {}
    assert any(float(g.abs().max()) > 0 for g in found.values()) == reached


def test_constant_weights_make_the_same_clip_and_teach_only_the_memory(model):
    engine = student(model, "slots")
    recorded = stream(engine).roll(2, LAST)
    with engine.backbone.constant():
        constant = stream(engine).roll(2, LAST)
    close(recorded.latents, constant.latents)
    assert not constant.latents.requires_grad
    assert constant.losses["slot_contrast"].requires_grad and recorded.latents.requires_grad


def test_adapters_change_nothing_until_trained_and_merge_into_the_weights(model):
    module = model.backbone
    plain = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    shape = (1, 3, module.config.in_dim, 4, 6)
    given = torch.ones(shape), torch.full((1, 3), 500.0), module.text_keys(torch.ones(1, 2, 8)), torch.arange(3)
    before = module(*given)[0]
    add_lora(module, 2)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 10 * len(module.blocks) and all(".lora." in name for name in trained)
    close(module(*given)[0], before)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(".up"):
                p.normal_(std=0.1)
    after = module(*given)[0]
    weights = merged(module.state_dict())
    assert set(weights) == set(plain) and float((after - before).abs().max()) > 0.01
    module = type(module)(module.config)
    module.load_state_dict(weights)
    torch.testing.assert_close(module(*given)[0], after, atol=1e-4, rtol=1e-4)


def test_guidance_leads_the_flow_away_from_the_negative_prompt(model):
    text = Lines(model.text)
    guided = Guided(model.backbone, text.embed([BALL])[0], 2.0)
    shape = (2, 3, model.backbone.config.in_dim, 4, 6)
    x, t, frames = torch.ones(shape), torch.full((2, 3), 500.0), torch.arange(3)
    told = model.backbone.text_keys(text.encode(["\n".join((CAT, BALL))])[0])
    flow = guided(x, t, told, frames)[0]
    plain = model.backbone(x, t, told, frames)[0]
    away = model.backbone(x, t, model.backbone.text_keys(text.embed([BALL, BALL])[0]), frames)[0]
    torch.testing.assert_close(flow, plain + 2 * (plain - away))
    torch.testing.assert_close(flow[1], plain[1])  # told the negative prompt itself


def test_bf16_rollouts_train_fp32_weights(model):
    whole = model.with_memory("sink")
    cast = Cast(model.backbone.requires_grad_(True), torch.bfloat16)
    engine = engine_for(replace(whole, memory=whole.memory), backbone=cast)
    stream(engine).roll(2, LAST).latents.float().square().mean().backward()
    weight = model.backbone.blocks[0].self_attn.q.weight
    assert weight.dtype == weight.grad.dtype == torch.float32 and float(weight.grad.abs().max()) > 0
