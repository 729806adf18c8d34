"""What the flow objective shows a transformer: clips of chunks, who sees whom, and where gradients go."""

import json

import pytest
import torch
from PIL import Image

from slotmemory.codecs.preview import PreviewCodec, PreviewConfig
from slotmemory.errors import InputError
from slotmemory.training import clips, flow, look, loop, shown, single_frames
from slotmemory.world.vocabulary import canonical


@pytest.fixture(scope="module")
def objective(tmp_path_factory):
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    torch.manual_seed(0)
    PreviewCodec(
        PreviewConfig(
            latent_channels=4,
            patch=4,
            encoder_channels=(8, 8, 8),
            decoder_channels=(8, 8, 8, 8),
            blocks=(1, 1, 1),
            space=(True, False, False),
            plain=True,
        )
    ).save(path)
    options = flow.Options(codec=str(path), dim=32, ffn_dim=64, heads=2, layers=2, text_dim=16, freq_dim=16, pool=2)
    return flow.Objective(options, loop.Context(batch=2))


def random(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_chunk_sees_distant_chunks_and_the_clean_past_never_another_noisy_chunk(objective):
    options = objective.options
    clean, per_clip = options.run - 1, clips.DISTANT + options.run - 1 + options.copies * options.run
    for seed in range(20):
        batch = objective.clips.batch(objective.pool.at(0), random(seed))
        for row, seen in enumerate(batch.table.tolist()):
            clip, place = divmod(row, per_clip)
            for other in (s for s in seen if s >= 0):
                assert other // per_clip == clip, "a clip saw another clip"
                assert other % per_clip < clips.DISTANT + clean, "a noisy chunk was seen"
                if place >= clips.DISTANT and other % per_clip >= clips.DISTANT:
                    assert batch.frames[other].max() < batch.frames[row].min(), "the future was seen"
            if place < clips.DISTANT:
                assert max(seen) < 0, "a distant chunk is encoded alone"


def test_many_first_chunks_see_nothing_and_some_see_only_a_memory(objective):
    alone = remembered = count = 0
    for seed in range(40):
        batch = objective.clips.batch(objective.pool.at(0), random(seed))
        first = batch.noisy & (batch.frames[:, 0] == 0)
        sees = batch.table[first] >= 0
        alone, remembered, count = (
            alone + int((~sees).all(1).sum()),
            remembered + int(sees.any(1).sum()),
            count + len(sees),
        )
    assert 0.5 < alone / count < 0.8
    assert remembered / count > 0.2


def test_clips_about_a_return_show_who_comes_back_in_the_distant_chunk_and_hide_it_from_nobody(objective):
    objective = with_options(objective, returns=1.0, seconds=40.0)
    drawn, item, per_clip = objective.clips, objective.make(3), clips.DISTANT + objective.options.run - 1
    found = clips.returns_in(item, 2)
    assert found
    for start, entity in found:
        assert not any(entity in item.visible[k] for k in (start - 2, start - 1))
        assert any(entity in item.visible[k] for k in range(start - 2))
    for seed in range(10):
        first, far, entity = drawn.clip_of_return(item, random(seed))
        start = next(k for k, who in found if who == entity and 0 <= k - first <= objective.options.run)
        assert entity in item.visible[far] and far < first
        batch = objective.clips.batch([item], random(seed))
        assert (batch.table[per_clip:] == clips.MEMORY).any(1).all()


def test_a_montage_cuts_to_other_scenes_only_and_goes_on_elsewhere(objective):
    drawn, cuts = with_options(objective, montage=1.0, seconds=40.0), 0
    for number in range(8):
        item = drawn.make(number)
        for seed in range(20):
            run = drawn.clips.run_of(item, random(seed))
            assert len(run) == drawn.options.run and 0 <= min(run) and max(run) < item.chunks
            for before, chunk in zip(run, run[1:]):
                if chunk != before + 1:
                    cuts += 1
                    assert chunk in item.cuts and item.scenes[chunk] != item.scenes[before]
                    assert (chunk - before) % 2, "half a breath would come twice"
    assert cuts > 100


def test_keys_of_distant_chunks_stand_before_the_run_within_reach(objective):
    batch = objective.clips.batch(objective.pool.at(0), random())
    far = batch.frames[: clips.DISTANT]
    assert (far < 0).all() and (far >= -3 * objective.options.far).all()


def test_hiding_leaves_the_entity_in_sight_or_a_part_of_the_chunk(objective):
    item = objective.pool.at(0)[0]
    chunk = next(k for k in range(item.chunks) if item.visible[k])
    entity = min(item.visible[chunk])
    cells = item.cells[entity, chunk * 3 : chunk * 3 + 3].flatten()
    shares = set()
    for seed in range(60):
        hidden = objective.clips.hide(item, chunk, entity, random(seed))
        assert hidden.shape == cells.shape
        assert not hidden.all(), "a memory without a token"
        shares.add(round(float((~hidden & cells).sum() / cells.sum()), 1))
    assert 1.0 in shares and min(shares) < 0.7


def test_clean_chunks_carry_little_noise_and_noisy_ones_the_samplers_levels(objective):
    batch = objective.clips.batch(objective.pool.at(0), random())
    assert (batch.sigma[~batch.noisy] <= objective.options.context_noise).all()
    levels = objective.clips.levels.schedule.warp(objective.clips.levels.steps)
    at_level = (batch.sigma[batch.noisy][:, None] - levels).abs().amin(1) < 1e-6
    assert at_level.float().mean() > 0.4


def test_the_loss_reaches_words_and_every_block(objective):
    loss, terms = objective.loss(0, 0, random())
    loss.backward()
    assert torch.isfinite(loss) and set(terms) == {"alone", "guided", "entity"}
    # the head starts at zero, so only it learns in the first step; take one and look again
    with torch.no_grad():
        objective.transformer.head.head.weight.add_(0.01 * torch.randn(objective.transformer.head.head.weight.shape))
    objective.loss(0, 0, random())[0].backward()
    assert objective.words.embedding.weight.grad.abs().sum() > 0
    for block in objective.transformer.blocks:
        assert block.self_attn.k.weight.grad.abs().sum() > 0
        assert block.cross_attn.v.weight.grad.abs().sum() > 0


def test_the_pool_at_a_step_is_a_function_of_the_step(objective):
    again = flow.Pool(objective.make, 2, 1, 0, 0)
    torch.testing.assert_close(again.at(3)[0].latents, flow.Pool(objective.make, 2, 1, 0, 0).at(3)[0].latents)
    kept = again.at(4)
    assert len(kept) == 2


def with_options(objective, **changes):
    return flow.Objective(objective.options.model_copy(update=changes), objective.context)


def test_a_still_step_shows_single_latent_frames_that_see_nothing_else(objective):
    still = with_options(objective, stills=1.0, still_rows=6, probe=0.5)
    batch = still.single.stills(still.pool.at(0), 12, random())
    assert batch.latents.shape[:2] == (12, 1) and batch.table.shape == (12, 0) and batch.noisy.all()
    loss, terms = still.loss(0, 0, random())
    assert set(terms) == {"still", "entity", "probe"} and torch.isfinite(loss)
    loss.backward()
    assert still.transformer.blocks[0].self_attn.q.weight.grad.abs().sum() > 0, "the probe teaches early blocks"
    assert still.probe.answer.weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def strangers(objective):
    """Eight narratives, so that strangers can be found."""
    return [objective.make(seed) for seed in range(8)]


def names_in(batch, row):
    """Who shows in a row, as far as others see it: {(kind, colour)}."""
    seen = batch.labels[row][~batch.hidden[row]][:, :2]
    return {tuple(who) for who in seen.tolist() if who[0]}


def seen_by(batch, row):
    return {s for s in batch.table[row].tolist() if s >= 0}


def names_seen_by(batch, row):
    return set().union(*(names_in(batch, s) for s in seen_by(batch, row)))


def test_recalls_show_a_frame_beside_its_own_with_strangers_and_without(objective, strangers):
    batch = objective.single.recalls(strangers, 40 * single_frames.GROUP, random())
    clean = ~batch.noisy
    assert batch.latents.shape[1] == 1 and 30 * single_frames.GROUP < len(clean) <= 40 * single_frames.GROUP
    assert (batch.frames[clean] < 0).all() and (batch.frames[~clean] == 0).all()
    assert (batch.sigma[clean] <= objective.options.context_noise).all()
    assert (batch.table[clean] < 0).all() and not batch.hidden[~clean].any()
    assert {bool(h.any()) for h in batch.hidden[clean]} == {True, False}, "of some, only the entity shows"
    assert sorted(row for pair in batch.twins for row in pair) == batch.noisy.nonzero()[:, 0].tolist()
    recalled = new = 0
    for beside, without in batch.twins:
        asked = names_in(batch, beside)
        added = seen_by(batch, beside) - seen_by(batch, without)
        assert seen_by(batch, without) <= seen_by(batch, beside)
        assert asked and not any(names_in(batch, s) & asked for s in added), "strangers show nobody who is asked for"
        if seen_by(batch, without):
            recalled += bool(asked & names_seen_by(batch, without))
        else:
            new += bool(added)
    assert recalled == 40 and new > 60


def test_splices_go_over_to_strangers_and_their_twins_see_none_of_the_old_cast(objective, strangers):
    objective = with_options(objective, splices=1.0, no_sink=0.3)
    old_cast_seen = alone = 0
    for seed in range(40):
        item = strangers[seed % len(strangers)]
        clip = objective.clips.clip(item, strangers, random(seed))
        if clip.joint is not None:
            before, after = clip.run[: clip.joint], clip.run[clip.joint :]
            assert all(narrative is item for narrative, _ in before) and len({id(n) for n, _ in after}) == 1
            assert not after[0][0].names & item.names
            assert after[0][0].scenes[after[0][1]] not in {item.scenes[k] for _, k in before}
        batch = objective.clips.batch([item], random(seed), strangers)
        for beside, without in batch.twins:
            for row, kept in ((beside, True), (without, False)):
                met = names_seen_by(batch, row)
                told = {
                    (shown.QUESTIONS["kind"].index(k) + 1, shown.QUESTIONS["colour"].index(c) + 1)
                    for c, k in item.names
                }
                assert kept or not met & told
                old_cast_seen += kept and bool(met & told)
            alone += not seen_by(batch, without)
    assert old_cast_seen > 20 and alone > 5


def test_twins_are_the_same_picture_under_the_same_prompt_from_the_same_noise_level(objective, strangers):
    spliced = with_options(objective, splices=1.0).clips
    batches = [objective.single.recalls(strangers, 90, random())]
    batches += [spliced.batch([strangers[seed]], random(seed), strangers) for seed in range(8)]
    assert sum(bool(batch.twins) for batch in batches) > 4
    assert any("" in batch.prompts for batch in batches)
    for batch in batches:
        for beside, without in batch.twins:
            assert torch.equal(batch.latents[beside], batch.latents[without])
            assert batch.prompts[beside] == batch.prompts[without] != ""
            assert batch.sigma[beside] == batch.sigma[without] and batch.noisy[[beside, without]].all()


def test_without_strangers_to_be_had_recalls_ask_nothing_of_them(objective, strangers):
    batch = objective.single.recalls(strangers[:1], 20 * single_frames.GROUP, random())
    for beside, without in batch.twins:
        added = seen_by(batch, beside) - seen_by(batch, without)
        assert not any(names_in(batch, s) & names_in(batch, beside) for s in added)


def test_indifference_moves_predictions_beside_strangers_towards_those_without_them(objective, strangers):
    wary = with_options(objective, recalls=1.0, indifference=2.0)
    batch = wary.single.recalls(strangers, 90, random())
    flow_ = torch.zeros_like(batch.latents)
    beside, without = (list(rows) for rows in zip(*batch.twins))
    assert not wary.lent(flow_, batch).detach()
    changed = flow_.detach().clone()
    changed[beside] += 1.0
    changed.requires_grad_()
    lent = wary.lent(changed, batch)
    torch.testing.assert_close(lent, torch.tensor(1.0))
    lent.backward()
    assert not changed.grad[without].any() and (changed.grad[beside] >= 0).all() and changed.grad[beside].any()
    told = wary.loss(0, 0, random())[1]
    assert set(told) == {"recall", "entity", "lent"}
    assert "lent" not in with_options(objective, recalls=1.0).loss(0, 0, random())[1]


def test_twins_are_predicted_from_the_same_noise(objective, monkeypatch):
    recall, given = with_options(objective, recalls=1.0), []
    predict = recall.predict
    monkeypatch.setattr(recall, "predict", lambda batch, noise: given.append((batch, noise)) or predict(batch, noise))
    recall.loss(0, 0, random())
    [(batch, noise)] = given
    assert batch.twins and all(torch.equal(noise[a], noise[b]) for a, b in batch.twins)
    assert not torch.equal(noise[batch.twins[0][0]], noise[batch.twins[1][0]])


def test_validation_says_what_right_and_wrong_memories_change(objective):
    with torch.no_grad():
        objective.transformer.head.head.weight.add_(0.01 * torch.randn(objective.transformer.head.head.weight.shape))
    found = objective.validate(0)
    assert {"return_right", "return_none", "return_wrong", "return_past", "recalled", "lent", "lent_past"} == set(found)
    assert found["recalled"] > 0 and found["lent"] > 0


def test_all_ranks_take_the_same_kind_of_step(objective):
    third = with_options(objective, stills=0.3, recalls=0.3)
    names = ("still", "recall", "guided")
    told = [[third.loss(step, rank, random(rank))[1] for rank in (0, 1)] for step in range(12)]
    kinds = [[next(name for name in names if name in terms) for terms in pair] for pair in told]
    assert all(a == b for a, b in kinds) and {a for a, _ in kinds} == set(names)


def test_shares_of_steps_beyond_all_of_them_are_refused(objective):
    with pytest.raises(ValueError, match="lower one"):
        flow.Options(codec="codec.safetensors", stills=0.6, recalls=0.5)


def test_own_predictions_replace_clean_chunks_only_and_only_below_the_limit(objective):
    own = with_options(objective, own_below=0.9)
    batch = own.clips.batch(own.pool.at(0), random())
    changed = own.with_own_past(batch, torch.randn(batch.latents.shape, generator=random()))
    for row, (before, after) in enumerate(zip(batch.latents, changed.latents)):
        made = dict(batch.stand_ins).get(row)
        replaced = made is not None and float(batch.sigma[made]) <= 0.9
        assert torch.equal(before, after) != replaced, row
    assert any(float(batch.sigma[made]) <= 0.9 for _, made in batch.stand_ins), "nothing was tried"


def test_labels_name_the_entity_that_covers_a_cell_and_the_scene_of_its_frame(objective):
    item = objective.pool.at(0)[0]
    covered = item.cells.any(0).flatten(1)
    assert torch.equal(item.labels[..., 0] > 0, covered)
    assert (item.places[~covered] == 0).all() and item.places.abs().max() <= 2
    chunk = next(k for k in range(item.chunks) if item.visible[k])
    named = shown.QUESTIONS["kind"][int(item.labels[chunk * 3 + 1][covered[chunk * 3 + 1]][0, 0]) - 1]
    assert named in canonical(item.prompts[chunk])
    words = canonical(item.prompts[chunk])
    assert shown.SCENES[int(item.labels[chunk * 3, 0, 4])] in words


def test_the_probe_loss_counts_places_on_entities_only():
    labels = torch.tensor([[[1, 2, 1, 1, 0], [0, 0, 0, 0, 0]]])
    answers = torch.zeros(1, 2, sum(shown.SIZES) + 2)
    at_home = shown.probe_loss(answers, labels, torch.tensor([[[0.0, 0.0], [0.0, 0.0]]]))
    away = shown.probe_loss(answers, labels, torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]))
    even = torch.tensor([float(size) for size in shown.SIZES]).log().mean()
    torch.testing.assert_close(at_home, even)
    torch.testing.assert_close(away, even + 1.0)


def test_its_filmstrips_are_made_as_its_settings_say(objective, tmp_path, monkeypatch):
    named = {"height": 64, "width": 96, "fps": 16, "shift": 5.0, "steps": [1000], "context_noise": 0.1, "memory": {}}
    (tmp_path / "model.json").write_text(json.dumps(named))
    monkeypatch.setattr(look, "SCRIPTS", (["A red cat walks in the meadow."],) * 2)
    monkeypatch.setattr(look, "CHUNKS_PER_SHOT", 1)
    options = objective.options.model_copy(update={"settings": str(tmp_path / "model.json")})
    flow.Objective(options, loop.Context(batch=2)).sample(0, tmp_path)
    film = Image.open(tmp_path / "filmstrips.png")
    assert film.size == (2 * 96, 2 * 64)  # two frames per chunk, a row per script
    with pytest.raises(InputError, match="tells no settings"):
        flow.Objective(objective.options.model_copy(update={"settings": "nothing"}), loop.Context(batch=2))
