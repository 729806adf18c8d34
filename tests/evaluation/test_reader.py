import numpy as np
import pytest
import torch

from slotmemory.codecs.base import to_float
from slotmemory.errors import InputError
from slotmemory.evaluation.reader import ANSWERS, NOBODY, ONE, Reader, Reading, degrees, hue_vector, shipped
from slotmemory.training import loop
from slotmemory.training.reader import UNKNOWN, Objective, Options, Reel, label, losses, ruin, spoil
from slotmemory.training.recipe import load_recipe
from slotmemory.world.clock import chunk_frames
from slotmemory.world.entities import entity_of
from slotmemory.world.narrative import Narrative

SMALL = Options(widths=(8, 8, 16, 16), pool=1, clips=2, held_out=1)


def frames_of(prompt: str, seed: int, chunk: int = 1) -> torch.Tensor:
    narrative = Narrative([(prompt, 0)], 3, seed)
    span = chunk_frames(chunk)
    return torch.from_numpy(narrative.render(span.start, span.stop)[::3])


# shapes


def test_a_reader_answers_every_question_for_every_frame():
    seen = Reader((8, 8, 16, 16))(torch.zeros(5, 3, 48, 80))
    assert {name: tuple(logits.shape) for name, logits in seen.logits.items()} == {
        name: (5, len(answers)) for name, answers in ANSWERS.items()
    }
    assert seen.rgb.shape == (5, 3) and seen.hue.shape == (5, 2)
    assert torch.allclose(seen.hue.norm(dim=-1), torch.ones(5))


def test_the_shipped_size_has_less_than_a_million_weights():
    assert sum(p.numel() for p in Reader().parameters()) < 1_000_000


def test_frames_of_another_size_are_scaled_and_read():
    reader = Reader((8, 8, 16, 16)).eval()
    reading = reader.read(torch.full((2, 3, 96, 160), 90, dtype=torch.uint8))
    same = reader.read(torch.full((2, 3, 48, 80), 90, dtype=torch.uint8))
    assert reading == same


def test_many_frames_are_read_as_one_by_the_mean_of_their_logits():
    reader = Reader((8, 8, 16, 16)).eval()
    frames = torch.randint(256, (4, 3, 48, 80), dtype=torch.uint8)
    with torch.no_grad():
        seen = reader(to_float(frames))
    reading = reader.read(frames)
    for name, answers in ANSWERS.items():
        assert getattr(reading, name) == answers[int(seen.logits[name].mean(0).argmax())]
        assert reading.sure[name] == pytest.approx(float(seen.logits[name].mean(0).softmax(-1).max()), abs=1e-4)


def test_a_hue_is_the_one_of_hsl():
    colours = torch.tensor([[255.0, 0, 0], [255, 255, 0], [0, 255, 0], [0, 128, 255], [255, 0, 255]])
    expected = torch.tensor([0.0, 60.0, 120.0, 210.0 - 1 / 8.5, 300.0])
    for scale in (colours, colours / 127.5 - 1):  # neither scale nor offset turns a hue
        found = degrees(hue_vector(scale))
        assert torch.allclose((found - expected + 180) % 360 - 180, torch.zeros(5), atol=0.05)


def test_the_hue_is_measured_over_pixels_near_the_guess():
    # a reader that can only guess blue must measure the blue patch's own hue, whatever covers the rest
    reader = Reader((8, 8, 16, 16)).eval()
    entity = entity_of(3, "blue", "cat")
    rgb = torch.tensor(entity.rgb)
    frame = torch.empty(1, 3, 48, 80)
    frame[:] = torch.tensor([255.0, 243, 214])[:, None, None]
    frame[..., 10:30, 20:40] = rgb[:, None, None]
    with torch.no_grad():
        reader.body.weight.zero_()
        reader.body.bias.copy_(torch.tensor([-0.7, 0.0, 0.9]))
        reader.place.weight.zero_()
        reader.strictness.fill_(3.0)
        hue = float(degrees(reader(frame / 127.5 - 1).hue)[0])
    assert hue == pytest.approx(entity.hue, abs=0.2)


# files


def test_saved_weights_answer_alike_and_take_half_the_bytes(tmp_path):
    reader = Reader((8, 8, 16, 16)).eval()
    reader.save(tmp_path / "reader.safetensors")
    again = Reader.load(tmp_path / "reader.safetensors")
    frames = torch.randint(256, (4, 3, 48, 80), dtype=torch.uint8)
    one, two = reader.read(frames), again.read(frames)
    assert (one.kind, one.colour, one.pattern) == (two.kind, two.colour, two.pattern)
    weights = sum(p.numel() for p in reader.parameters())
    assert (tmp_path / "reader.safetensors").stat().st_size < 2 * weights + 8192


def test_a_missing_reader_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="no weights at"):
        Reader.load(tmp_path / "nothing.safetensors")


def test_a_reading_survives_being_written_down():
    reading = Reading(ONE, "cat", "red", 3.25, "half", "bow", {"kind": 0.9})
    assert Reading(**reading.to_dict()) == reading


# training


def test_labels_name_the_entity_that_is_drawn():
    narrative = Narrative([("A blue ghost waits at night.", 0), ("The night is empty.", 1)], 5, 11)
    (entity,) = narrative.entities
    answers, hue, rgb = label(narrative, 0, 9, 2)
    named = {name: {ANSWERS[name][i] for i in answer.tolist()} for name, answer in answers.items()}
    looks = {name: {getattr(entity, name)} for name in ("kind", "colour", "pattern", "accessory")}
    assert named == {"count": {ONE}, **looks}
    assert torch.allclose(hue, torch.full((5,), entity.hue))
    body = ((rgb[0] + 1) * 127.5)[:, None, None]
    assert float((torch.from_numpy(narrative.render(0, 1))[0] - body).abs().amax(0).min()) <= 2


def test_who_is_half_way_out_is_neither_there_nor_away():
    narrative = Narrative([("A blue ghost waits at night.", 0), ("The night is empty.", 1)], 5, 11)
    answers, _, _ = label(narrative, 0, narrative.frames, 1)
    known = answers["count"].tolist()
    here, away = (ANSWERS["count"].index(name) for name in (ONE, NOBODY))
    assert known[0] == here and known[-1] == away
    leaving = [i for i, answer in enumerate(known) if answer == UNKNOWN]
    assert leaving and known[: leaving[0]] == [here] * leaving[0]
    assert set(known[leaving[-1] + 1 :]) == {away}


def test_a_reel_follows_from_its_seed():
    reels = Objective(SMALL, loop.Context(batch=2)).reels
    assert torch.equal(reels.make(5).clean, reels.make(5).clean)
    assert not torch.equal(reels.make(5).clean, reels.make(6).clean)


def test_spoiling_leaves_the_hue_alone():
    random = torch.Generator().manual_seed(0)
    colours = torch.tensor([entity_of(i, "green", "ball").rgb for i in range(32)]) / 127.5 - 1
    frames = colours[..., None, None].expand(-1, -1, 16, 16)
    spoilt, rgb = spoil(frames, colours, Options(grain=0.0), random)
    before, after = degrees(hue_vector(colours)), degrees(hue_vector(rgb))
    assert torch.allclose(before, after, atol=0.05)
    assert not torch.allclose(colours, rgb, atol=0.05)
    inside = rgb.abs().amax(-1) < 1
    assert torch.allclose(spoilt[inside].mean((2, 3)), rgb[inside], atol=1e-3)


def test_a_ruined_frame_keeps_its_colours_and_loses_its_shapes():
    frames = to_float(frames_of("A red cat waits in the meadow.", 1))
    ruined = ruin(frames, torch.Generator().manual_seed(0))
    assert ruined.shape == frames.shape
    assert torch.allclose(ruined.mean((2, 3)), frames.mean((2, 3)), atol=0.05)
    assert ((ruined - frames).abs().mean((1, 2, 3)) > 0.08).all()


def test_unknown_answers_do_not_count_in_the_loss():
    reader = Reader((8, 8, 16, 16))
    seen = reader(torch.zeros(2, 3, 48, 80))
    blank = torch.zeros(2, 3, 48, 80, dtype=torch.uint8)
    nothing = Reel(
        blank, blank, {name: torch.full((2,), UNKNOWN) for name in ANSWERS}, torch.zeros(2), torch.zeros(2, 3)
    )
    assert all(term.item() == 0 for term in losses(seen, nothing, nothing.rgb).values())


def test_training_lowers_the_loss_and_measures_held_out_clips():
    objective = Objective(SMALL, loop.Context(batch=8))
    optimizer = torch.optim.AdamW(objective.reader.parameters(), lr=3e-3)
    values = []
    for step in range(12):
        loss, _ = objective.loss(0, 0, loop.generator_for(0, step, 0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert np.mean(values[-3:]) < 0.8 * values[0]
    assert "clean_kind" in objective.validate(0) and "clean_hue_error" in objective.validate(0)


def test_the_recipe_is_valid():
    assert load_recipe("recipes/train/tiny/reader.yaml").objective == "reader"


# the weights that ship


def test_the_shipped_reader_is_small():
    assert shipped().stat().st_size < 2_000_000


@pytest.mark.parametrize(
    ("prompt", "seed"),
    [
        ("A red cat waits in the meadow.", 2**40),
        ("A yellow robot walks on the beach.", 2**40 + 1),
        ("A green ball jumps in the snow.", 2**40 + 2),
        ("A blue ghost waits at night.", 2**40 + 3),
        ("A purple cat walks in the snow.", 2**40 + 4),
    ],
)
def test_the_shipped_reader_reads_a_clean_frame_right(prompt, seed):
    reading = Reader.load().read(frames_of(prompt, seed))
    (entity,) = Narrative([(prompt, 0)], 3, seed).entities
    assert (reading.count, reading.kind, reading.colour) == (ONE, entity.kind, entity.colour)
    assert (reading.pattern, reading.accessory) == (entity.pattern, entity.accessory)
    assert reading.hue == pytest.approx(entity.hue, abs=2.0) or abs(reading.hue - entity.hue) > 358.0


@pytest.mark.parametrize("scene", ["meadow", "beach", "snow", "night"])
def test_the_shipped_reader_sees_nobody_in_an_empty_scene(scene):
    assert Reader.load().read(frames_of(f"The {scene} is empty.", 2**40)).count == NOBODY


def test_the_shipped_reader_sees_nobody_in_noise():
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (4, 3, 48, 80), generator=random, dtype=torch.uint8)
    assert Reader.load().read(noise).count == NOBODY
