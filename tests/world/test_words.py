"""What people may say, and what the world makes of it."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmemory.world import (
    ACTIONS,
    COLOURS,
    KINDS,
    SCENES,
    WORDS,
    Role,
    ShotSpec,
    UnknownWord,
    canonical,
    chunk_frames,
    compose,
    compose_plain,
    latent_frames,
    parse,
    sample_story,
)

IDENTITIES = st.tuples(st.sampled_from(COLOURS), st.sampled_from(KINDS))
SHOTS = st.builds(
    lambda scene, identities, actions: ShotSpec(scene, tuple(Role(*who, act) for who, act in zip(identities, actions))),
    st.sampled_from(SCENES),
    st.lists(IDENTITIES, max_size=2, unique=True),
    st.tuples(st.sampled_from(ACTIONS), st.sampled_from(ACTIONS)),
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(SHOTS, st.integers(0, 10_000))
def test_every_paraphrase_parses_to_the_same_shot(spec, seed):
    assert parse(compose(spec, np.random.default_rng(seed))) == spec
    assert parse(compose_plain(spec)) == spec


def test_paraphrases_differ_in_their_words():
    spec = ShotSpec("beach", (Role("red", "cat", "walks"),))
    assert len({compose(spec, np.random.default_rng(seed)) for seed in range(50)}) > 20


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A Kitty, crimson, STROLLS on the shore!", ["cat", "red", "walks", "beach"]),
        ("The night is empty.", ["night", "empty"]),
        ("an azure orb and a bot jumping in the snow", ["blue", "ball", "and", "robot", "jumps", "snow"]),
    ],
)
def test_synonyms_and_function_words_reduce_to_canonical_words(prompt, words):
    assert canonical(prompt) == words


def test_word_ids_are_unique_and_leave_zero_for_padding():
    assert len(set(WORDS)) == len(WORDS)
    assert WORDS[0] not in (*COLOURS, *KINDS, *ACTIONS, *SCENES)
    assert {*COLOURS, *KINDS, *ACTIONS, *SCENES} < set(WORDS[1:])


def test_an_unknown_word_names_the_nearest_known_ones():
    with pytest.raises(UnknownWord, match="gost.*ghost") as caught:
        canonical("a red gost waits in the meadow")
    assert caught.value.word == "gost"
    assert caught.value.nearest[0] == "ghost"
    assert len(caught.value.nearest) <= 3
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "roles"),
    [
        ("A red cat in the meadow.", [("red", "cat", "waits")]),
        ("In the meadow jumps a red cat.", [("red", "cat", "jumps")]),
        ("A red cat comes back and waits in the meadow.", [("red", "cat", "waits")]),
        ("A red cat returns in the meadow.", [("red", "cat", "walks")]),
        ("A red cat and a blue ghost walk in the meadow.", [("red", "cat", "walks"), ("blue", "ghost", "walks")]),
        ("A red cat walks and a blue ghost in the meadow.", [("red", "cat", "walks"), ("blue", "ghost", "waits")]),
        ("The meadow.", []),
    ],
)
def test_loose_sentences_read_as_english_does(prompt, roles):
    assert parse(prompt) == ShotSpec("meadow", tuple(Role(*role) for role in roles))


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("A red cat waits.", "no scene"),
        ("A red cat waits in the snow on the beach.", "2 scenes"),
        ("A red cat and a blue cat and a green cat in the snow.", "3 entities"),
        ("A cat waits in the snow.", "no colour"),
        ("Red waits in the snow.", "of nothing"),
        ("Walks in the snow.", "of nobody"),
        ("A red cat walks and jumps in the snow.", "too many"),
        ("A red cat a blue ball in the snow.", "two colours"),
        ("A red cat and a red cat in the snow.", "twice"),
        ("A red cat in the empty snow.", "both empty"),
    ],
)
def test_a_prompt_without_one_meaning_says_what_is_wrong(prompt, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse(prompt)


def test_stories_keep_their_statistics():
    sizes, cuts, returns, lengths = [], [], 0, []
    for seed in range(120):
        story = sample_story(np.random.default_rng(seed), 40.0)
        specs = [parse(prompt) for prompt, _ in story]
        starts = [start for _, start in story]
        assert starts[0] == 0
        lengths += list(np.diff(starts))
        sizes += [len(spec.roles) for spec in specs]
        cuts += [before.scene != after.scene for before, after in zip(specs, specs[1:])]
        cast = {role.identity for spec in specs for role in spec.roles}
        assert len(cast) <= 3
        for who in cast:
            there = [who in {role.identity for role in spec.roles} for spec in specs]
            returns += sum(1 for before, now in zip(there, there[1:]) if now and not before)
    assert min(lengths) >= 3 and max(lengths) <= 8
    shares = np.bincount(sizes, minlength=3) / len(sizes)
    assert np.allclose(shares, [0.15, 0.60, 0.25], atol=0.07)
    assert 0.4 < np.mean(cuts) < 0.6
    assert returns / 120 > 3


def test_chunks_and_latents_tile_time_without_gaps():
    assert [len(chunk_frames(chunk)) for chunk in range(3)] == [9, 12, 12]
    assert [len(latent_frames(latent)) for latent in range(3)] == [1, 4, 4]
    for chunk in range(5):
        latents = [frame for latent in range(3 * chunk, 3 * chunk + 3) for frame in latent_frames(latent)]
        assert latents == list(chunk_frames(chunk))
