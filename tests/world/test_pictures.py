"""What the world shows: the same pixels for the same seed, the same looks for the same words, and honest truth."""

import numpy as np
import pytest

from slotmemory.world import (
    ACCESSORIES,
    COLOURS,
    KINDS,
    PATTERNS,
    Narrative,
    WorldSize,
    chunk_frames,
    colour_name,
    latent_frames,
    sample_entity,
    sprites,
)
from slotmemory.world.entities import SIZES
from slotmemory.world.shapes import SAMPLES
from slotmemory.world.sprites import POSES, SpriteSheet

UNITS = WorldSize(80, 48)  # one pixel a unit: where distances are counted
RETURNING = [
    ("A red cat waits in the meadow.", 0),
    ("A blue ghost jumps in the meadow.", 4),
    ("The beach is empty.", 8),
    ("A red cat waits in the meadow.", 10),
]


@pytest.fixture(scope="module")
def story():
    return Narrative(
        [("A red cat walks in the snow.", 0), ("A red cat waits and a green robot jumps in the snow.", 3),
         ("A green robot walks and a red cat jumps in the snow.", 7), ("The snow is empty.", 11),
         ("A blue ball walks at night.", 14)],
        chunks=17, seed=5,
    )  # fmt: skip


def test_the_same_seed_gives_the_same_pixels():
    first, second = Narrative.random(7, 8.0), Narrative.random(7, 8.0)
    assert first.prompt(0) == second.prompt(0)
    assert np.array_equal(first.render(), second.render())
    assert not np.array_equal(Narrative.random(8, 8.0).render(0, 1), first.render(0, 1))


def test_any_span_shows_the_same_pixels_and_truth_as_the_whole(story):
    whole, truth = story.render(), story.truth()
    assert whole.shape == (story.frames, 3, 96, 160) and whole.dtype == np.uint8
    for first, last in [(0, 1), (9, 21), (40, 90), (story.frames - 1, story.frames), (30, 30)]:
        assert np.array_equal(story.render(first, last), whole[first:last])
        part = story.truth(first, last)
        assert np.array_equal(part.masks, truth.masks[first:last])
        assert np.array_equal(part.flow, truth.flow[first:last])
        assert np.array_equal(part.boxes, truth.boxes[:, first:last])


def test_an_entity_and_a_scene_return_with_the_identical_look():
    narrative = Narrative(RETURNING, chunks=14, seed=3)
    # Both spans start on a 24-frame breath, after the hard cut put the cat in place.
    before, after = chunk_frames(2).start, chunk_frames(12).start
    assert np.array_equal(narrative.render(before, before + 12), narrative.render(after, after + 12))
    beach = chunk_frames(8).start
    assert not np.array_equal(narrative.render(before, before + 1), narrative.render(beach, beach + 1))


def test_looks_depend_on_the_words_and_not_on_who_else_is_there():
    alone = Narrative.from_prompts(["A red cat waits in the snow."], seed=9)
    late = Narrative.from_prompts(["A blue ball and a red cat in the snow."], seed=9)
    assert alone.entities[0] == late.entities[1]
    others = {Narrative.from_prompts(["A red cat in the snow."], seed=seed).entities[0] for seed in range(20)}
    assert {entity.pattern for entity in others} == set(PATTERNS)
    assert {entity.accessory for entity in others} == set(ACCESSORIES)


def test_a_paraphrase_changes_no_pixel():
    plain = Narrative.from_prompts(["A red cat walks in the meadow."], seed=1)
    other = Narrative.from_prompts(["In the field, a crimson kitty strolls."], seed=1)
    assert np.array_equal(plain.render(), other.render())


def test_hues_stay_nearest_to_their_names():
    rng = np.random.default_rng(0)
    for colour in COLOURS:
        hues = [sample_entity(rng, colour, "cat").hue for _ in range(200)]
        assert {colour_name(hue) for hue in hues} == {colour}
        assert np.ptp([(hue + 180) % 360 for hue in hues]) > 10


def test_unstated_attributes_change_the_picture_a_lot():
    sheet = SpriteSheet(1.0)

    def picture(**looks):
        entity = sample_entity(np.random.default_rng(0), "blue", "cat")
        entity = type(entity)(**{**vars(entity), "size": 1.0, "pattern": "plain", "accessory": "none", **looks})
        canvas = np.zeros((3, 60, 60))
        sprite = sheet.body(entity, 0, 1, 0, 0)
        height, width = sprite.clear.shape
        top, left = 50 + sprite.top, 30 + sprite.left
        canvas[:, top : top + height, left : left + width] = sprite.rgb
        return canvas

    for field, choices in (("pattern", PATTERNS), ("accessory", ACCESSORIES), ("kind", KINDS)):
        pictures = [picture(**{field: choice}) for choice in choices]
        for index, one in enumerate(pictures):
            for other in pictures[:index]:
                assert (np.abs(one - other).max(axis=0) > 60).sum() > 40, field


@pytest.mark.parametrize("kind", KINDS)
def test_no_sprite_outgrows_its_canvas(kind, monkeypatch):
    entity = sample_entity(np.random.default_rng(0), "red", kind)
    looks = [type(entity)(**{**vars(entity), "size": max(SIZES), "accessory": accessory}) for accessory in ACCESSORIES]

    def draw_all():
        sheet = SpriteSheet(1.0)
        return [sheet.body(look, pose, 1, SAMPLES - 1, 0) for look in looks for pose in range(len(POSES))]

    usual = draw_all()
    monkeypatch.setattr(sprites, "CANVAS_WIDTH", 60)
    monkeypatch.setattr(sprites, "CANVAS_HEIGHT", 70)
    monkeypatch.setattr(sprites, "CANVAS_FEET", 60)
    for one, roomy in zip(usual, draw_all()):
        assert np.array_equal(one.rgb, roomy.rgb)
        assert (one.left, one.top) == (roomy.left, roomy.top)


@pytest.mark.parametrize("kind", KINDS)
def test_every_body_covers_at_least_nine_cells_of_the_codec(kind):
    entity = sample_entity(np.random.default_rng(0), "red", kind)
    smallest = type(entity)(**{**vars(entity), "size": min(SIZES), "accessory": "none"})
    solid = SpriteSheet(1.0).body(smallest, 0, 1, 0, 0).solid
    assert solid.sum() >= 480 and min(solid.shape) >= 22


def test_boxes_are_tight_around_the_masks(story):
    truth = story.truth()
    for index in range(len(story.entities)):
        for t in range(0, story.frames, 5):
            rows, columns = np.nonzero(truth.masks[t] == index + 1)
            seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else (0, 0, 0, 0)
            assert tuple(truth.boxes[index, t]) == seen
            assert (truth.visibility[index, t] > 0) == (len(rows) > 0)


def test_masks_cover_the_bodies_and_nothing_of_the_scenery(story):
    frame = chunk_frames(5).start
    pixels, mask = story.render(frame, frame + 1)[0].astype(int), story.truth(frame, frame + 1).masks[0]
    empty_frame = chunk_frames(13).stop - 1
    changed = np.abs(pixels - story.render(empty_frame, empty_frame + 1)[0]).max(axis=0) > 8
    assert changed[mask > 0].mean() > 0.97
    assert (mask[changed] > 0).mean() > 0.85  # the rest is shadow and soft rim


def test_flow_moves_the_mask_onto_the_next_one(story):
    truth = story.truth()
    checked = 0
    for t in range(0, story.frames - 1, 3):
        for index in range(len(story.entities)):
            rows, columns = np.nonzero(truth.masks[t] == index + 1)
            alone = truth.visibility[index, t : t + 2].min() == 1.0
            if not alone:
                continue
            x = np.rint(columns + truth.flow[t, 0, rows, columns]).astype(int)
            y = np.rint(rows + truth.flow[t, 1, rows, columns]).astype(int)
            inside = (x >= 0) & (x < 160) & (y >= 0) & (y < 96)
            # A turning cat throws its tail over, which flow does not follow.
            turning = story.entities[index].kind == "cat"
            assert (truth.masks[t + 1, y[inside], x[inside]] == index + 1).mean() > (0.85 if turning else 0.95)
            checked += 1
    assert checked > 20
    assert np.abs(truth.flow).max() > 1.0
    assert not truth.flow[np.broadcast_to((truth.masks == 0)[:, None], truth.flow.shape)].any()


def test_nothing_flows_across_a_cut():
    narrative = Narrative.from_prompts(["A red cat and a blue ball in the snow.", "A red cat on the beach."], seed=0)
    cut = chunk_frames(4).start
    assert narrative.truth(cut - 1, cut + 1).visibility[0].min() == 1.0
    assert not narrative.truth(cut - 1, cut).flow.any()


def test_flow_adds_up_to_the_way_walked(story):
    robot, span = 1, 40
    first = chunk_frames(7).start
    truth = story.truth(first, first + span + 1)
    steps = [truth.flow[t, 0][truth.masks[t] == robot + 1].mean() for t in range(span)]
    way = truth.boxes[robot, :, 0] - truth.boxes[robot, 0, 0]
    assert np.ptp(way) > 15
    assert np.allclose(np.cumsum(steps), way[1:], atol=1.0)


def test_hops_repeat_with_the_chunk_and_start_on_the_ground():
    narrative = Narrative.from_prompts(["A red robot jumps in the snow."], seed=2, chunks_per_shot=4, size=UNITS)
    one, two = (narrative.render(chunk_frames(k).start, chunk_frames(k).stop) for k in (1, 2))
    assert np.array_equal(one, two)
    bottoms = narrative.truth(9, 21).boxes[0, :, 3]
    assert bottoms.argmax() == 0 and bottoms.max() - bottoms.min() in (4, 5)


def test_a_hop_goes_up_once_and_comes_down_once():
    narrative = Narrative.from_prompts(["A red robot jumps in the snow."], seed=2, size=UNITS)
    heights = -narrative.truth(9, 22).boxes[0, :, 3]
    assert (np.diff(np.sign(np.diff(heights)[np.diff(heights) != 0])) != 0).sum() == 1


@pytest.mark.parametrize("action", ["walks", "jumps", "waits"])
def test_every_drawing_is_held_for_a_latent(action):
    told = ["The snow is empty.", f"A red robot {action} in the snow.", f"A red robot {action} at night."]
    narrative = Narrative.from_prompts(told, seed=2, size=UNITS)
    for latent in range(1, 36):
        frames = latent_frames(latent)
        pictures = narrative.render(frames.start, frames.stop)
        assert (pictures == pictures[:1]).all()


def test_a_walker_goes_to_and_fro_and_turns_to_where_it_goes():
    narrative = Narrative.from_prompts(["A yellow robot walks in the snow."], seed=2, chunks_per_shot=9, size=UNITS)
    truth = narrative.truth(9, 105)
    steps = np.array([truth.flow[t, 0][truth.masks[t] == 1].mean() for t in range(95)])
    assert set(np.abs(steps)) == {0.0, 3.0} and (np.flatnonzero(steps) % 4 == 3).all()  # held for a latent; 12 units/s
    assert (np.diff(steps[3::4]) != 0).sum() == 3  # 24 latents, turning every six, the first time after three
    assert 16 <= np.ptp(truth.boxes[0, :, 0]) <= 20


def test_after_a_cut_prompts_alone_settle_who_stands_where():
    """What is left to chance must be guessed by a model, and halves of two guesses are seen at once."""
    for prompt in ("A red cat walks in the snow.", "A red cat waits and a blue ball jumps in the snow."):
        tracks = []
        for seed in range(4):
            narrative = Narrative.from_prompts(["The beach is empty.", prompt], seed=seed)
            boxes = narrative.truth(chunk_frames(4).start, narrative.frames).boxes
            tracks.append(boxes[:, :, [0, 2]].mean(axis=2))
        spread = np.ptp(np.stack(tracks), axis=0)
        assert spread.max() < 4, prompt  # pixels of 160: looks differ, places do not


def test_the_first_named_stands_left_and_two_never_overlap():
    for seed in range(6):
        narrative = Narrative.from_prompts(["A red cat walks and a blue ball jumps in the snow."], seed=seed)
        truth = narrative.truth()
        assert (truth.boxes[0, :, 2] <= truth.boxes[1, :, 0] + 1).all()
        assert truth.visibility.min() > 0.95


def test_nobody_is_cut_off_at_the_top():
    for seed in range(40):
        kind = KINDS[seed % len(KINDS)]
        narrative = Narrative.from_prompts([f"A red {kind} jumps in the snow."], seed=seed, chunks_per_shot=2)
        assert narrative.truth(9, 21).visibility.min() > 0.97


def test_newcomers_and_leavers_cross_the_edge_while_the_scene_stays(story):
    robot = 1
    arrives = story.truth(chunk_frames(3).start, chunk_frames(5).stop).visibility[robot]
    assert arrives[0] == 0 and arrives[-1] == 1
    assert ((arrives > 0) & (arrives < 1)).sum() >= 4
    truth = story.truth(chunk_frames(4).start + 3, chunk_frames(4).start + 5)
    assert np.allclose(truth.flow[0, 0][truth.masks[0] == robot + 1], -12.0)  # a latent's way, 24 units per second
    leaves = story.truth(chunk_frames(11).start, chunk_frames(13).stop).visibility[robot]
    assert leaves[0] > 0.8 and leaves[-1] == 0


def test_motion_is_continuous_while_the_scene_stays(story):
    boxes = story.truth(0, chunk_frames(14).start)
    for index in range(2):
        whole = boxes.visibility[index] == 1.0
        centres = boxes.boxes[index, :, [0, 2]].mean(axis=0)
        # A turning cat throws its tail over, which shifts the box but not the body.
        assert np.abs(np.diff(centres))[whole[1:] & whole[:-1]].max() < 14


def test_visible_names_who_shows_for_most_of_a_chunk(story):
    assert [story.visible(chunk) for chunk in (1, 6, 13, 15)] == [{0}, {0, 1}, set(), {2}]
    assert story.cast(7) == (1, 0)
    assert [role.kind for role in story.roles(7)] == ["robot", "cat"]


def test_a_larger_world_shows_the_same_story():
    prompts = ["A red cat walks and a blue ghost jumps on the beach."]
    small = Narrative.from_prompts(prompts, seed=4).render(0, 30)
    large = Narrative.from_prompts(prompts, seed=4, size=WorldSize(320, 192)).render(0, 30)
    assert large.shape == (30, 3, 192, 320)
    shrunk = large.reshape(30, 3, 96, 2, 160, 2).mean(axis=(3, 5))
    other = Narrative.from_prompts(prompts, seed=5).render(0, 30)
    assert np.abs(shrunk - small).mean() < 4.0 < np.abs(shrunk - other).mean() / 3  # edges alone are sharper


def test_bad_spans_and_shots_say_what_is_wrong(story):
    with pytest.raises(ValueError, match="frames 0..*are outside"):
        story.render(0, story.frames + 1)
    with pytest.raises(ValueError, match="chunks 0..16"):
        story.prompt(17)
    with pytest.raises(ValueError, match="must start at 0"):
        Narrative([("The snow.", 1)], chunks=4, seed=0)
    with pytest.raises(ValueError, match="must rise"):
        Narrative([("The snow.", 0), ("The beach.", 4)], chunks=4, seed=0)
    with pytest.raises(ValueError, match="too small"):
        WorldSize(10, 20)
