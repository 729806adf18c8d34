"""Who learns from which loss in each stage that trains a student, and which clips it learns from."""

import json
from dataclasses import replace

import pytest
import torch

from slotmemory.errors import InputError
from slotmemory.sampler import Euler, FlowSchedule
from slotmemory.slots import Grouper
from slotmemory.slots.learning import Learning, Lesson, effective_rank, losses
from slotmemory.training import distribution_matching, long_tuning, loop, ode, slots, slots_warm_up
from slotmemory.training.prompts import PromptFile, Stories, open_source, reminder, together
from slotmemory.training.recipe import objectives, parse_recipe
from tests.training.test_videos import write_video

SHORT = {"chunks": 3, "new": 2, "length": 21, "switches": (9,)}


def build(module, micro, other, batch=1, **options):
    options = {"student": micro, "teacher": other, "steps": (1000, 500), **options}
    return module.Objective(module.Options(**options), loop.Context(batch=batch))


def step(objective, number):
    """One loss and its gradients, none left from before -> the terms."""
    for module in objective.modules().values():
        module.zero_grad()
    loss, terms = objective.loss(number, 0, loop.generator_for(0, number, 0))
    loss.backward()
    return terms


def learning(objective, name) -> set[str]:
    """Parameters of a module that have a gradient other than zero."""
    named = objective.modules()[name].named_parameters()
    return {key for key, p in named if p.grad is not None and float(p.grad.abs().max()) > 0}


# distribution matching


@pytest.mark.parametrize("score", ["causal", "joint"])
def test_generator_steps_teach_both_and_critic_steps_the_critic_alone(micro, other, score):
    objective = build(distribution_matching, micro, other, score=score, chunks=2, ratio=2)
    terms = step(objective, 0)
    assert {"matching", "difference", "critic"} <= set(terms)
    assert len(learning(objective, "transformer")) == len(list(objective.transformer.parameters()))
    assert len(learning(objective, "critic")) == len(list(objective.critic.parameters()))
    assert not learning(objective, "words") and all(p.grad is None for p in objective.teacher.module.parameters())
    terms = step(objective, 1)
    assert "matching" not in terms and not learning(objective, "transformer") and learning(objective, "critic")


def test_generator_and_critic_updates_are_counted_apart(micro, other):
    objective = build(distribution_matching, micro, other, chunks=1, ratio=5)
    assert [objective.generator_step(n) for n in range(7)] == [True, False, False, False, False, True, False]
    assert objective.trains(3) == {"critic"} and objective.trains(5) == {"transformer", "memory.sink", "critic"}
    terms = step(objective, 6)
    assert (float(terms["generator_updates"]), float(terms["critic_updates"])) == (2, 7)


def test_the_student_is_led_to_where_the_teacher_and_away_from_where_the_critic_points(micro, other):
    objective = build(distribution_matching, micro, other, chunks=2, guidance=0)
    clip = objective.clip(1, loop.generator_for(0, 0, 0))
    loss, _ = objective.generator_loss(clip, loop.generator_for(1, 0, 0))
    (direction,) = torch.autograd.grad(loss, clip.latents, retain_graph=True)
    given = objective.noised(clip, loop.generator_for(1, 0, 0))
    with torch.no_grad():
        fake = objective.predicted(objective.fake, clip, given)
        real = objective.predicted(objective.teacher, clip, given)
    expected = (fake - real) / (given.rows - real).abs().mean((1, 2, 3, 4), keepdim=True) / given.rows.numel()
    torch.testing.assert_close(direction, expected.detach().view_as(direction), atol=1e-7, rtol=1e-4)


def test_a_student_that_is_its_own_teacher_and_critic_has_nothing_to_learn(micro):
    objective = build(distribution_matching, micro, micro, chunks=2, guidance=0)
    assert float(step(objective, 0)["matching"]) == 0 and not learning(objective, "transformer")


def test_published_scores_look_their_noise_levels_up_in_another_table(micro, other):
    sound = build(distribution_matching, micro, other, chunks=1)
    shifted = build(distribution_matching, micro, other, chunks=1, compat=("score_shift",))
    with torch.no_grad():
        clip = sound.clip(1, loop.generator_for(0, 0, 0))
        given = sound.noised(clip, loop.generator_for(1, 0, 0))
        ours = sound.predicted(sound.teacher, clip, given)
        theirs = shifted.predicted(shifted.teacher, clip, given)
    sigma, table = given.timesteps / 1000, FlowSchedule(8.0)
    gap = (sound.schedule.sigma(given.timesteps) - table.sigma(given.timesteps)).abs()
    assert 0 < float(gap) < 0.2 * float(sigma) and float((ours - theirs).abs().max()) > 0


def test_a_bank_cannot_change_under_passes_that_are_not_recomputed():
    with pytest.raises(InputError, match="set recompute: true"):
        parse_recipe({"objective": "distribution_matching", "steps": 1, "options": {"compat": ["mutated_bank"]}})


def test_exits_are_drawn_for_all_ranks_alike_and_visit_every_step(micro, other):
    objective = build(distribution_matching, micro, other)
    drawn = [tuple(objective.exits(n)) for n in range(20)]
    assert {exit for pair in drawn for exit in pair} == {0, 1} and drawn == [
        tuple(objective.exits(n)) for n in range(20)
    ]
    assert build(distribution_matching, micro, other, last_step_only=True).exits(0) == [1, 1]


# long tuning


def test_streams_are_consumed_clip_by_clip_and_renewed_where_they_would_grow_too_long(micro, other):
    objective = build(long_tuning, micro, other, **SHORT)
    random = loop.generator_for(0, 0, 0)
    with torch.no_grad():
        clips = [objective.clip(1, random) for _ in range(4)]
    new = [clip.new.shape[1] for clip in clips]
    assert new == [9, 6, 6, 9]  # 21 latent frames, then another stream
    assert [clip.start + clip.past for clip in clips] == [0, 9, 15, 0]
    told = [prompts[0] for clip in clips[:3] for prompts in clip.prompts[clip.past // 3 :]]
    assert len(set(told[:3])) == 1 == len(set(told[3:])) and told[2] != told[3]  # the switch is at latent frame 9
    assert torch.equal(clips[1].latents[:, : clips[1].past], clips[0].latents[:, -clips[1].past :])


def test_the_published_streams_hold_thirteen_clips_and_switch_where_clips_begin():
    options = long_tuning.Options()
    starts = [0, *range(3 * options.chunks, options.length - 3 * options.new + 1, 3 * options.new)]
    assert len(starts) == 13 and set(options.switches) <= set(starts)


def test_joint_scores_see_a_clips_length_whose_first_latent_frame_is_an_image_again(micro, other):
    objective = build(long_tuning, micro, other, score="joint", **SHORT)
    random = loop.generator_for(0, 0, 0)
    first, second = objective.clip(1, random), objective.clip(1, random)
    assert first.latents.shape[1] == second.latents.shape[1] == 9 and (first.past, second.past) == (0, 3)
    last = first.latents[:, 6:].detach()
    assert torch.equal(second.latents[:, 1:3].detach(), last[:, 1:]) and second.start == 6
    frame = objective.codec.decode(first.latents[:, :7].detach())[:, -1:]
    torch.testing.assert_close(second.latents[:, :1].detach(), objective.codec.encode(frame))
    assert objective.view.counts(second).sum() == 6


def test_returning_entities_bring_the_chunk_that_showed_them_last(micro, other):
    cat, ball = "A red cat walks in the meadow.", "A blue ball waits on the beach."
    told = [cat, cat, ball, ball, ball, cat, cat]
    assert [reminder(told, chunk, 2) for chunk in range(7)] == [None] * 5 + [1, 1]
    assert reminder(told, 6, 2, lasts=1) is None and reminder([*told, ball, cat], 8, 2) is None
    objective = build(long_tuning, micro, other, reminders=True, **{**SHORT, "switches": ()})
    objective.source = type("Told", (), {"script": lambda *_: {0: cat, 2: ball, 5: cat}})()
    random = loop.generator_for(0, 0, 0)
    with torch.no_grad():
        objective.clip(1, random), objective.clip(1, random)
        clip = objective.clip(1, random)  # chunks 5 and 6, after 3 and 4
    assert {chunk: prompt for chunk, (_, prompt) in clip.reminders[0].items()} == {2: cat, 3: cat}
    assert torch.equal(clip.reminders[0][2][0], objective.stream.made[1][0])
    table = objective.view.table(clip)
    assert table[-2].tolist() == [0, 1, 2, 4] and table[-1].tolist() == [0, 2, 3, 5]
    objective.generator_loss(clip, random)


def test_reminders_lead_the_chunks_that_have_one_and_no_others(micro, other):
    cat, ball = "A red cat walks in the meadow.", "A blue ball waits on the beach."
    options = {**SHORT, "reminders": True, "reminder_guidance": 2.0, "guidance": 0.0, "switches": ()}
    objective = build(long_tuning, micro, other, **options)
    objective.source = type("Told", (), {"script": lambda *_: {0: cat, 2: ball, 5: cat}})()
    random = loop.generator_for(0, 0, 0)
    with torch.no_grad():
        first = objective.clip(1, random)
        assert objective.away(first, objective.noised(first, random)) == []  # nobody returns yet
        objective.clip(1, random)
        clip = objective.clip(1, random)  # chunks 5 and 6; the cat returns in 5
        given = objective.noised(clip, random)
        told = objective.predicted(objective.teacher, clip, given)
        ((scale, forgetful),) = objective.away(clip, given)
        assert scale == 2.0 and not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(told, forgetful))
        alone = replace(clip, reminders=[{2: clip.reminders[0][2]}])
        ((_, forgetful),) = objective.away(alone, given)
        told = objective.predicted(objective.teacher, alone, replace(given, past=given.past[:-1]))
        torch.testing.assert_close(told[1], forgetful[1])


def test_switches_lead_the_chunk_after_them_and_no_other(micro, other):
    cat, ball = "A red cat walks in the meadow.", "A blue ball waits on the beach."
    options = {**SHORT, "switch_guidance": 2.0, "guidance": 0.0, "switches": ()}
    objective = build(long_tuning, micro, other, **options)
    objective.source = type("Told", (), {"script": lambda *_: {0: cat, 4: ball}})()
    random = loop.generator_for(0, 0, 0)
    with torch.no_grad():
        first = objective.clip(1, random)
        assert objective.away(first, objective.noised(first, random)) == []  # nothing switches yet
        clip = objective.clip(1, random)  # chunks 3 and 4
        given = objective.noised(clip, random)
        told = objective.predicted(objective.teacher, clip, given)
        ((scale, late),) = objective.away(clip, given)
    assert scale == 2.0 and not torch.allclose(told[1], late[1], atol=1e-4)
    torch.testing.assert_close(told[0], late[0])
    with pytest.raises(ValueError, match="switch_guidance needs score=causal"):
        long_tuning.Options(switch_guidance=1.0, score="joint")


def test_reminder_guidance_without_reminders_is_refused():
    with pytest.raises(ValueError, match="reminder_guidance needs reminders=true"):
        long_tuning.Options(reminder_guidance=1.0)


def test_switches_inside_a_chunk_are_refused(micro, other):
    with pytest.raises(InputError, match="switches: 20 is not a multiple of 3"):
        build(long_tuning, micro, other, switches=(20,))


# slots


@pytest.mark.parametrize("stage", [1, 2])
def test_stage_one_teaches_adapters_and_stage_two_the_grouper_as_well(micro, other, stage):
    objective = build(slots, micro, other, stage=stage, threshold=0.2, ratio=2, **SHORT)
    trained = set()
    for number in range(4):
        terms = step(objective, number)
        trained |= learning(objective, "memory.slots")
    assert ("slot_reconstruction" in terms) == (stage == 2) and "slot_contrast" in terms
    expected = {n for n, _ in objective.memory.named_parameters() if stage == 2 or n.startswith("adapters.")}
    assert trained == expected
    group = next(g for g in objective.parameter_groups() if g["names"][0].startswith("memory.slots."))
    assert {name.removeprefix("memory.slots.") for name in group["names"]} == expected


def test_slots_learn_from_critic_steps_too_unless_told_otherwise(micro, other):
    for always in (True, False):
        objective = build(slots, micro, other, always=always, ratio=2, **SHORT)
        assert ("memory.slots" in objective.trains(1)) == always
        step(objective, 0)
        assert ("slot_contrast" in step(objective, 1)) == always
        assert bool(learning(objective, "memory.slots")) == always and not learning(objective, "transformer")


def test_slots_of_finished_streams_become_negatives_and_no_others(micro, other):
    objective = build(slots, micro, other, queue=20, ratio=9, **SHORT)
    sizes = []
    for number in range(8):
        step(objective, number)
        sizes.append(objective.lessons.queue.shape[1])
    # the first step makes two clips; a stream of three clips of two slots each ends with clips 4, 7 and 10
    assert sizes == [0, 0, 6, 6, 6, 12, 12, 12]
    assert objective.memory.learning.negatives.shape[1] == 12


def test_the_confidence_threshold_rises_to_its_value(micro, other):
    objective = build(slots, micro, other, threshold_from=0.2, threshold=0.5, threshold_steps=10, **SHORT)
    found = []
    for number in (0, 5, 10, 50):
        objective.lessons.at(number)
        found.append(round(objective.memory.learning.threshold, 3))
    assert found == [0.2, 0.35, 0.5, 0.5]


def test_a_slotcontrast_checkpoint_starts_grouper_and_keeps_its_scale(micro, other, tmp_path):
    torch.manual_seed(3)
    given = Grouper.fresh(2, 8, "released")
    prefixes = {"initializer.": "initializer.", "grouper.": "processor.module.corrector."}
    prefixes["predictor."] = "processor.module.predictor."
    renamed = {
        theirs + name.removeprefix(ours): tensor
        for name, tensor in given.state_dict().items()
        for ours, theirs in prefixes.items()
        if name.startswith(ours)
    }
    torch.save({"state_dict": renamed}, tmp_path / "slotcontrast.ckpt")
    objective = build(slots, micro, other, grouper=str(tmp_path / "slotcontrast.ckpt"), **SHORT)
    found, x = objective.memory.grouper, torch.randn(1, 6, 8)
    assert torch.equal(found.first(x).slots, given.first(x).slots)
    assert torch.equal(found.predict(x[:, :2]), given.predict(x[:, :2]))
    config = json.loads(objective.metadata("memory.slots")["config"])
    assert config == {"slots": 2, "slot_dim": 8, "attn_scale": "released"}
    with pytest.raises(InputError, match=r"has 2 slots, the memory 3; set memory_options: \{slots: 2\}"):
        options = {"grouper": str(tmp_path / "slotcontrast.ckpt"), "memory_options": {"slots": 3}}
        build(slots, micro, other, **options, **SHORT)


@pytest.mark.parametrize("on", ["world", "own", "videos"])
def test_a_warm_up_teaches_all_of_the_slots_and_nothing_else(micro, other, on, tmp_path):
    if on == "videos":
        on = str(tmp_path)
        write_video(tmp_path / "a.mp4", 40)
    objective = build(slots_warm_up, micro, other, batch=2, on=on, chunks=3, pool=2, seconds=5.0, threshold=0.2)
    terms = step(objective, 0)
    assert {"slot_contrast", "slot_reconstruction", "slot_coverage"} <= set(terms)
    assert list(objective.modules()) == ["memory.slots"]
    assert learning(objective, "memory.slots") == {name for name, _ in objective.memory.named_parameters()}
    assert all(p.grad is None for p in objective.transformer.parameters())
    assert objective.lessons.queue.shape[1] == 4 and "slot_centred" in step(objective, 1)


def lesson(**changes) -> Lesson:
    """One layer, one row, two slots of width two; slot vectors as rows."""
    values = {
        "slots": torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]),
        "assignment": torch.tensor([[[[0.9, 0.4], [0.1, 0.6]]]]),
        "tokens": torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]),
        "earlier": torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]]),
        "earlier_mass": torch.full((1, 1, 2), 0.5),
        "switched": False,
    }
    return Lesson(**{**values, **changes})


def test_what_slots_are_asked_by_hand():
    # logits of each slot: 1 / tau with itself, 0 with the other: log(1 + exp(-1 / tau)) at tau 0.5
    contrast = float(torch.log1p(torch.exp(torch.tensor(-2.0))))
    found = losses(lesson(), Learning(reconstruct=True, tau=0.5, threshold=0.55, alpha=2.0))
    assert float(found["slot_contrast"]) == pytest.approx(contrast)
    # both tokens are confident; the second is bound to slot 1, which points elsewhere: (0 + 1) / 2, times alpha
    assert float(found["slot_reconstruction"]) == pytest.approx(1.0, rel=1e-5)
    assert float(losses(lesson(switched=True), Learning(tau=0.5, across=0.25))["slot_contrast"]) == pytest.approx(
        contrast / 4
    )
    assert float(losses(lesson(earlier_mass=torch.tensor([[[0.99, 0.01]]])), Learning(tau=0.5))["slot_contrast"]) == 0
    assert not losses(lesson(earlier=None, earlier_mass=None), Learning())
    none = losses(lesson(), Learning(reconstruct=True, threshold=0.95))
    assert float(none["slot_reconstruction"]) == 0


def test_the_effective_rank_counts_directions():
    assert float(effective_rank(torch.eye(4)[None, None])) == pytest.approx(4, rel=1e-4)
    assert float(effective_rank(torch.ones(1, 1, 5, 4))) == pytest.approx(1, rel=1e-3)


# ODE pairs


def test_trajectories_are_the_euler_samplers_with_the_students_levels_noted(micro, other):
    objective = build(ode, micro, other, chunks=2, teacher_steps=4, pool=1, guidance=0)
    assert objective.trajectory.timesteps == pytest.approx(Euler(4, objective.schedule).timesteps)
    pair = objective.make(5)
    session = ode.engine_for(objective.whole, backbone=objective.teacher).session({0: pair["script"][0][1]}, seed=5)
    object.__setattr__(session, "engine", ode.replace(session.engine, sampler=Euler(4, objective.schedule)))
    for states, end in pair["chunks"]:
        torch.testing.assert_close(session.step().latents[0], end, atol=1e-5, rtol=1e-4)
        assert states.shape == (2, *end.shape)


def test_a_level_between_the_teachers_steps_gets_a_step_of_its_own():
    schedule = FlowSchedule(5.0)
    levels = schedule.few_step((1000, 750, 500, 250))
    assert len(ode.Trajectory(48, schedule, levels).timesteps) == 48
    assert len(ode.Trajectory(10, schedule, levels).timesteps) == 10 + 2  # 1000 and 500 are among the ten


def test_the_student_regresses_the_end_from_a_noted_state_and_reads_clean_chunks(micro, other):
    objective = build(ode, micro, other, batch=2, chunks=2, teacher_steps=2, pool=2)
    terms = step(objective, 0)
    assert set(terms) == {"ends"} and len(learning(objective, "transformer")) > 60
    # chunk by chunk, what is remembered is the teacher's chunk, not the student's guess at it
    kept = {}

    def note(clip, *given, roll=ode.Rollout.roll):
        found = roll(clip, *given)
        kept["latents"] = found.latents.detach()
        return found

    patched = pytest.MonkeyPatch()
    patched.setattr(ode.Rollout, "roll", note)
    objective.loss(0, 0, loop.generator_for(0, 0, 0))
    patched.undo()
    ends = [torch.cat([end for _, end in pair["chunks"]]) for pair in objective.pool.at(0)]
    assert all(any(torch.equal(row, end) for end in ends) for row in kept["latents"])


def test_published_pairs_are_made_at_other_levels_than_they_are_told(micro, other):
    sound = build(ode, micro, other, chunks=1, teacher_steps=4)
    wrong = build(ode, micro, other, chunks=1, teacher_steps=4, compat=("mislabelled",))
    assert sound.trajectory.levels == sound.levels == wrong.levels
    assert wrong.trajectory.levels == FlowSchedule(8.0).few_step((1000, 500)) != wrong.levels


def test_trajectories_are_kept_as_files(micro, other, tmp_path):
    options = {"chunks": 2, "teacher_steps": 2, "pool": 1, "pairs": str(tmp_path / "pairs")}
    made = build(ode, micro, other, **options).make(9)
    again = build(ode, micro, other, **options)
    again.streaming = None  # nothing can be made
    read = again.make(9)
    assert read["script"] == made["script"] and torch.equal(read["chunks"][1][0], made["chunks"][1][0])


# prompts


def test_prompt_files_give_lines_pairs_and_lists_and_count_what_they_skip(tmp_path, caplog):
    first, second, listed = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.jsonl"
    first.write_text("one\n\nthree\n")
    second.write_text("uno\ndos\ntres\n")
    listed.write_text('{"prompts": ["a", "b"]}\nno json\n{"prompts": []}\n')
    random = torch.Generator().manual_seed(0)
    told = {tuple(PromptFile(first, second).script(9, random, 4).items()) for _ in range(20)}
    assert told == {((0, "one"), (4, "uno")), ((0, "three"), (4, "tres"))}
    assert PromptFile(first).skipped == 1 and PromptFile(first).script(9, random, 4) in ({0: "one"}, {0: "three"})
    assert PromptFile(listed).script(9, random, 4) == {0: "a", 4: "b"} and PromptFile(listed).skipped == 2
    assert "2 of 3 lines were skipped" in caplog.text
    second.write_text("uno\n")
    with pytest.raises(InputError, match="line i must follow line i"):
        PromptFile(first, second)
    first.write_text("\n\n")
    with pytest.raises(InputError, match="holds no prompt"):
        PromptFile(first)
    with pytest.raises(InputError, match="no such file"):
        open_source(str(tmp_path / "none.txt"))


def test_stories_switch_where_they_do_or_where_they_are_told(tmp_path):
    random = torch.Generator().manual_seed(0)
    story = Stories().script(40, random)
    assert 0 in story and len(story) > 2 and max(story) < 40
    assert set(Stories().script(40, random, 7)) == {0, 7}
    merged = together([{0: "a", 3: "b"}, {0: "x", 5: "y"}])
    assert merged == {0: ["a", "x"], 3: ["b", "x"], 5: ["b", "y"]}


def test_all_stages_are_found_by_name():
    assert {"flow", "ode", "distribution_matching", "long_tuning", "slots"} <= set(objectives())
    assert not {"loop", "student", "rollout"} & set(objectives())
