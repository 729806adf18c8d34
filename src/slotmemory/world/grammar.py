"""Turn prompts into shots, shots into prompts, and dice into stories.

Knows what is said, never how it looks: unstated attributes live in `entities`.
"""

from dataclasses import dataclass

import numpy as np

from slotmemory.world.clock import FPS, FRAMES_PER_CHUNK, chunks_in
from slotmemory.world.vocabulary import ACTIONS, AND, COLOURS, EMPTY, KINDS, SCENES, SYNONYMS, canonical

MAX_ROLES = 2
SHOT_SECONDS = (2.0, 6.0)
NUM_ROLES_ODDS = (0.15, 0.60, 0.25)
SAME_SCENE_ODDS = 0.5
_PREPOSITION = {"meadow": "in", "beach": "on", "snow": "in", "night": "in"}
_SYNONYM_ODDS = 0.35


@dataclass(frozen=True)
class Role:
    """What a prompt says of one entity; (colour, kind) names the individual within a narrative."""

    colour: str
    kind: str
    action: str

    @property
    def identity(self) -> tuple[str, str]:
        return self.colour, self.kind


@dataclass(frozen=True)
class ShotSpec:
    """What one prompt asks for: a scene and up to two roles, the first-named on the left."""

    scene: str
    roles: tuple[Role, ...] = ()


def parse(prompt: str) -> ShotSpec:
    """Read a prompt; every paraphrase of a shot gives the same spec.
    A role without an action shares the next role's ("a red cat and a blue ghost walk"), else it waits.
    Raises ValueError naming what is missing or too much, UnknownWord for a word outside the vocabulary."""
    words = canonical(prompt)
    scenes = [word for word in words if word in SCENES]
    if len(scenes) != 1:
        found = f"names {len(scenes)} scenes ({', '.join(scenes)})" if scenes else "names no scene"
        raise ValueError(f"prompt '{prompt}' {found}; name exactly one of {', '.join(SCENES)}")

    drafts: list[dict[str, str]] = []
    for phrase in _split(words):
        draft = _read_phrase(phrase, prompt)
        if draft.keys() == {"action"}:
            # "a red cat comes back and waits": the phrase belongs to the entity before it.
            if not drafts:
                raise ValueError(f"prompt '{prompt}' says '{draft['action']}' of nobody; name a colour and a kind")
            if "action" in drafts[-1]:
                raise ValueError(f"prompt '{prompt}' has an action '{draft['action']}' too many; one per entity")
            drafts[-1].update(draft)
        elif draft:
            drafts.append(draft)

    if len(drafts) > MAX_ROLES:
        raise ValueError(f"prompt '{prompt}' names {len(drafts)} entities; at most {MAX_ROLES} fit in one shot")
    if drafts and EMPTY in words:
        raise ValueError(f"prompt '{prompt}' is both empty and inhabited; drop '{EMPTY}' or the entities")
    roles: list[Role] = []
    action = "waits"
    for draft in reversed(drafts):
        action = draft.get("action", action)
        roles.insert(0, Role(draft["colour"], draft["kind"], action))
    if len({role.identity for role in roles}) < len(roles):
        raise ValueError(f"prompt '{prompt}' names the same individual twice; change a colour or a kind")
    return ShotSpec(scenes[0], tuple(roles))


def _split(words: list[str]) -> list[list[str]]:
    """Cut the words at 'and'; scenes and 'empty' belong to the shot, not to a phrase."""
    phrases: list[list[str]] = [[]]
    for word in words:
        if word == AND:
            phrases.append([])
        elif word not in SCENES and word != EMPTY:
            phrases[-1].append(word)
    return phrases


def _read_phrase(phrase: list[str], prompt: str) -> dict[str, str]:
    """Sort one phrase's words into colour, kind and action."""
    draft: dict[str, str] = {}
    for word in phrase:
        part = "colour" if word in COLOURS else "kind" if word in KINDS else "action"
        if part in draft:
            raise ValueError(
                f"prompt '{prompt}' gives two {part}s ('{draft[part]}' and '{word}') to one entity; "
                "separate entities with 'and'"
            )
        draft[part] = word
    if "kind" in draft and "colour" not in draft:
        raise ValueError(f"prompt '{prompt}' gives '{draft['kind']}' no colour; add one of {', '.join(COLOURS)}")
    if "colour" in draft and "kind" not in draft:
        raise ValueError(f"prompt '{prompt}' says '{draft['colour']}' of nothing; add one of {', '.join(KINDS)}")
    return draft


def compose_plain(spec: ShotSpec) -> str:
    """Write the one plain sentence for a shot, canonical words only."""
    if not spec.roles:
        return f"The {spec.scene} is empty."
    who = " and ".join(f"a {role.colour} {role.kind} {role.action}" for role in spec.roles)
    return _sentence(f"{who} {_PREPOSITION[spec.scene]} the {spec.scene}")


def compose(spec: ShotSpec, rng: np.random.Generator) -> str:
    """Write a random paraphrase of a shot; `parse` maps it back to the same spec."""

    def say(word: str) -> str:
        return str(rng.choice(SYNONYMS[word])) if rng.random() < _SYNONYM_ODDS else word

    scene = say(spec.scene)
    place = f"{_PREPOSITION[spec.scene]} the {scene}"
    if not spec.roles:
        empty = say(EMPTY)
        return str(rng.choice([f"The {scene} is {empty}.", _sentence(f"{place} it is {empty}"), f"The {scene}."]))

    phrases = []
    for role in spec.roles:
        article = str(rng.choice(["a", "the"], p=[0.7, 0.3]))
        action = say(role.action)
        again = " again" if rng.random() < 0.1 else ""
        phrases.append(_article(f"{article} {say(role.colour)} {say(role.kind)} {action}{again}"))
    who = " and ".join(phrases)
    return _sentence(f"{place}, {who}" if rng.random() < 0.4 else f"{who} {place}")


def _article(phrase: str) -> str:
    return f"an {phrase[2:]}" if phrase.startswith("a ") and phrase[2] in "aeiou" else phrase


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def sample_story(rng: np.random.Generator, seconds: float) -> list[tuple[str, int]]:
    """Roll a narrative of about so many seconds: (prompt, start chunk) per shot, the first at chunk 0.
    A cast of two or three leaves and comes back often; half of the changes keep the scene, the others cut."""
    chunks = chunks_in(seconds)
    cast = _sample_cast(rng)
    scenes = [str(scene) for scene in rng.permutation(SCENES)[: int(rng.integers(2, 4))]]
    shortest, longest = (round(limit * FPS / FRAMES_PER_CHUNK) for limit in SHOT_SECONDS)

    story: list[tuple[str, int]] = []
    previous = None
    start = 0
    while start < chunks:
        spec = _sample_shot(rng, cast, scenes, previous)
        story.append((compose(spec, rng), start))
        previous = spec
        start += int(rng.integers(shortest, longest + 1))
    # A last shot shorter than the shortest would be a flicker at the end of the video.
    if len(story) > 1 and chunks - story[-1][1] < shortest:
        story.pop()
    return story


def _sample_cast(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Roll two or three distinct individuals."""
    everyone = [(colour, kind) for colour in COLOURS for kind in KINDS]
    chosen = rng.choice(len(everyone), size=int(rng.integers(2, 4)), replace=False)
    return [everyone[index] for index in chosen]


def _sample_shot(
    rng: np.random.Generator, cast: list[tuple[str, str]], scenes: list[str], previous: ShotSpec | None
) -> ShotSpec:
    """Roll one shot that differs from the previous one in its scene or in who is there."""
    scene = str(rng.choice(scenes))
    if previous is not None:
        others = [other for other in scenes if other != previous.scene]
        scene = previous.scene if rng.random() < SAME_SCENE_ODDS else str(rng.choice(others))
    while True:
        count = int(rng.choice(len(NUM_ROLES_ODDS), p=NUM_ROLES_ODDS))
        chosen = [cast[index] for index in rng.permutation(len(cast))[:count]]
        if previous is None or scene != previous.scene:
            break
        if set(chosen) != {role.identity for role in previous.roles}:
            break
    return ShotSpec(scene, tuple(Role(*identity, str(rng.choice(ACTIONS))) for identity in chosen))
