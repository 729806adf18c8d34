"""Does an entity that was away come back as itself? Scripts, scores and statistics; pure functions.

Every script shows a hero for the first time after the frames that a sink keeps, takes it away for longer than a window
remembers, and asks for it again in the same two words. Its looks that no word states - exact hue, pattern, accessory -
are compared with the hero's own first appearance as generated, for nothing else is the truth of that video. A memory that
lends everybody the same looks would pass, so a stranger is read too: somebody else, alone, while the hero is away.

It knows chunks of the world's clock and readings, not models, memories or pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from slotmemory.evaluation.reader import Reading
from slotmemory.script import Script
from slotmemory.script import Shot as ScriptShot
from slotmemory.world.clock import FPS, FRAMES_PER_CHUNK
from slotmemory.world.entities import ACCESSORIES, HUE_JITTER, PATTERNS
from slotmemory.world.grammar import NUM_ROLES_ODDS, Role, ShotSpec, compose_plain
from slotmemory.world.vocabulary import ACTIONS, COLOURS, KINDS, SCENES

CHUNK_SECONDS = FRAMES_PER_CHUNK / FPS
FIRST_SEED = 2**32  # scripts have seeds from here on; every objective's training and validation seeds are below
GAPS = ((5.0, 10.0), (10.0, 15.0), (15.0, 20.0), (20.0, 25.0))  # seconds away, one stratum after the other
OPENING_CHUNKS = (3, 5)
SHOWN_CHUNKS = (6, 8)  # 4.5 to 6 s
AWAY_CHUNKS = (3, 8)  # of one shot while the hero is away
BACK_CHUNKS = 6
SETTLING_CHUNKS = 2  # after a switch, whoever enters or leaves is still on the way
STATED = ("present", "kind", "colour")
UNSTATED = ("pattern", "accessory")
SURE = 0.6  # a first appearance read with less certainty is no reference
NOMINAL_CHANCE = {"pattern": 1 / len(PATTERNS), "accessory": 1 / len(ACCESSORIES)}
DRAWS = 10_000
LEVEL = 0.95


# scripts


@dataclass(frozen=True)
class ReturnScript:
    """One held-out script. shots: (prompt, chunks) in order; first, back: the chunks in which the hero is read; stranger:
    who is alone while the hero is away, and the chunks in which they are read, None if nobody is."""

    number: int
    seed: int
    hero: tuple[str, str]  # colour, kind
    shots: tuple[tuple[str, int], ...]
    first: range
    back: range
    stratum: int  # index into GAPS
    stranger: tuple[tuple[str, str], range] | None = None

    @property
    def chunks(self) -> int:
        return sum(length for _, length in self.shots)

    @property
    def prompts(self) -> dict[int, str]:
        """Prompts by the chunk at which each starts, as a session takes them."""
        starts = np.cumsum([0, *(length for _, length in self.shots)])
        return {int(start): prompt for start, (prompt, _) in zip(starts, self.shots)}

    @property
    def gap_seconds(self) -> float:
        """Time from the end of the hero's first shot to the start of its last."""
        return sum(length for _, length in self.shots[2:-1]) * CHUNK_SECONDS

    def script(self) -> Script:
        """Give it as a script that people can read and generate."""
        shots = tuple(ScriptShot(prompt, length * CHUNK_SECONDS) for prompt, length in self.shots)
        return Script(shots, self.seed, f"Return {self.number}: {' '.join(self.hero)}")


def scripts(count: int = 32) -> list[ReturnScript]:
    """Write the benchmark's scripts; the first n are the same however many are asked for."""
    return [_write(number) for number in range(count)]


def _write(number: int) -> ReturnScript:
    seed = FIRST_SEED + number
    rng = np.random.default_rng(seed)
    # heroes go round all colours and kinds, and gaps turn against kinds, so that small sets are balanced too
    hero = COLOURS[number % len(COLOURS)], KINDS[number % len(KINDS)]
    stratum = (number + number // len(GAPS)) % len(GAPS)
    everyone = [(colour, kind) for colour in COLOURS for kind in KINDS if (colour, kind) != hero]
    others = [everyone[i] for i in rng.permutation(len(everyone))[:2]]
    scenes = [str(scene) for scene in rng.permutation(SCENES)[:3]]

    opening = _other_shot(rng, others, scenes, None)
    shown = _hero_shot(rng, hero, scenes)
    specs = [(opening, _length(rng, OPENING_CHUNKS)), (shown, _length(rng, SHOWN_CHUNKS))]
    for length in _split(rng, _away_chunks(rng, *GAPS[stratum])):
        specs.append((_other_shot(rng, others, scenes, specs[-1][0]), length))
    # half of the heroes come back to the scene in which they were first seen
    elsewhere = [scene for scene in scenes if scene != shown.scene]
    there = [shown.scene] if (number // len(GAPS)) % 2 == 0 else elsewhere
    specs.append((_hero_shot(rng, hero, there), BACK_CHUNKS))

    starts = np.cumsum([0, *(length for _, length in specs)])
    first = range(int(starts[1]) + SETTLING_CHUNKS, int(starts[2]))
    back = range(int(starts[-2]) + SETTLING_CHUNKS, int(starts[-1]))
    strangers = (
        (spec.roles[0].identity, range(start + SETTLING_CHUNKS, start + length))
        for (spec, length), start in zip(specs[2:-1], starts[2:].tolist())
        if len(spec.roles) == 1
    )
    shots = tuple((compose_plain(spec), length) for spec, length in specs)
    return ReturnScript(number, seed, hero, shots, first, back, stratum, next(strangers, None))


def _hero_shot(rng: np.random.Generator, hero: tuple[str, str], scenes: Sequence[str]) -> ShotSpec:
    return ShotSpec(str(rng.choice(scenes)), (Role(*hero, str(rng.choice(ACTIONS))),))


def _other_shot(
    rng: np.random.Generator, others: Sequence[tuple[str, str]], scenes: Sequence[str], previous: ShotSpec | None
) -> ShotSpec:
    """Roll a shot without the hero that differs from the one before in its scene or in who is there."""
    while True:
        cast = [others[i] for i in rng.permutation(len(others))[: int(rng.choice(3, p=NUM_ROLES_ODDS))]]
        spec = ShotSpec(str(rng.choice(scenes)), tuple(Role(*who, str(rng.choice(ACTIONS))) for who in cast))
        if previous is None or _shown(spec) != _shown(previous):
            return spec


def _shown(spec: ShotSpec) -> tuple[str, frozenset[tuple[str, str]]]:
    return spec.scene, frozenset(role.identity for role in spec.roles)


def _length(rng: np.random.Generator, limits: tuple[int, int]) -> int:
    return int(rng.integers(limits[0], limits[1] + 1))


def _away_chunks(rng: np.random.Generator, shortest: float, longest: float) -> int:
    """Roll a number of chunks that last from `shortest` seconds to just below `longest`."""
    return int(rng.integers(math.ceil(shortest / CHUNK_SECONDS), math.ceil(longest / CHUNK_SECONDS)))


def _split(rng: np.random.Generator, chunks: int) -> list[int]:
    """Cut so many chunks into shots within AWAY_CHUNKS."""
    shortest, longest = AWAY_CHUNKS
    lengths = []
    while chunks:
        fits = [n for n in range(shortest, longest + 1) if n == chunks or chunks - n >= shortest]
        lengths.append(int(rng.choice(fits)))
        chunks -= lengths[-1]
    return lengths


# scores


@dataclass(frozen=True)
class Score:
    """How one return went. Stated: against the prompt. Unstated: against the first appearance, None if that cannot be
    read; hue_error in degrees, also None unless both show the stated colour."""

    present: bool
    kind: bool
    colour: bool
    readable: bool
    pattern: bool | None
    accessory: bool | None
    itself: bool | None  # present, kind, colour, pattern and accessory, all of them
    hue_error: float | None


def circular_difference(a: float, b: float) -> float:
    """Degrees between two hues, 0..180."""
    return abs((a - b + 180.0) % 360.0 - 180.0)


def is_readable(hero: tuple[str, str], first: Reading) -> bool:
    """Tell whether a first appearance can serve as a reference: the hero is there, and clear to see."""
    named = first.present and (first.colour, first.kind) == tuple(hero)
    return named and all(first.sure[name] >= SURE for name in UNSTATED)


def score(hero: tuple[str, str], first: Reading, back: Reading) -> Score:
    """Score a return; who does not come back has no attribute right."""
    present = back.present
    colour, kind = (present and getattr(back, name) == word for name, word in zip(("colour", "kind"), hero))
    if not is_readable(hero, first):
        return Score(present, kind, colour, False, None, None, None, None)
    pattern, accessory = (present and getattr(back, name) == getattr(first, name) for name in UNSTATED)
    error = circular_difference(first.hue, back.hue) if colour else None
    itself = kind and colour and pattern and accessory
    return Score(present, kind, colour, True, pattern, accessory, itself, error)


def lent(hero: tuple[str, str], first: Reading, stranger: tuple[str, str], other: Reading) -> dict[str, bool] | None:
    """Which unstated attributes a stranger shares with the hero's first appearance; None if either cannot be read."""
    if not (is_readable(hero, first) and is_readable(stranger, other)):
        return None
    return {name: getattr(first, name) == getattr(other, name) for name in UNSTATED}


# chance


def expected_hue_difference(colour: str) -> float:
    """Degrees by which two individuals of one colour name differ on average: 2/3 of the half-width of its hues."""
    return 2 * HUE_JITTER[colour] / 3


def shuffled(readings: Sequence[tuple[tuple[str, str], Reading, Reading]]) -> dict[str, float]:
    """Agreement of first appearances with the returns of other scripts: (hero, first, back) -> rate by attribute.

    Chance as this memory's own videos make it, should it draw some looks more often than others; the hue is compared
    within a colour. NaN where there is no pair."""
    usable = [item for item in readings if is_readable(item[0], item[1]) and item[2].present]
    pairs = [(a, b) for i, a in enumerate(usable) for j, b in enumerate(usable) if i != j]
    rates = {name: _mean([float(getattr(a[1], name) == getattr(b[2], name)) for a, b in pairs]) for name in UNSTATED}
    alike = [(a, b) for a, b in pairs if a[0][0] == b[0][0] == b[2].colour]
    return {**rates, "hue_error": _mean([circular_difference(a[1].hue, b[2].hue) for a, b in alike])}


# statistics


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval over so many scripts; NaN where there is none."""

    mean: float
    low: float
    high: float
    scripts: int


def wilson(successes: int, trials: int) -> Interval:
    """Proportion with its Wilson score interval (Wilson 1927)."""
    if trials == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    z, share = 1.959963984540054, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # at 0 and at all the bound is exact; rounding would leave a speck beyond it
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return Interval(share, low, high, trials)


def bootstrap(by_script: Mapping[int, Sequence[float]], draws: int = DRAWS) -> Interval:
    """Mean of the scripts' means, with the percentile interval of scripts drawn with replacement."""
    means = np.array([np.mean(values) for _, values in sorted(by_script.items()) if len(values)], dtype=float)
    if not len(means):
        return Interval(math.nan, math.nan, math.nan, 0)
    picks = np.random.default_rng(0).integers(len(means), size=(draws, len(means)))
    low, high = np.quantile(means[picks].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(means.mean()), float(low), float(high), len(means))


def rate(by_script: Mapping[int, Sequence[bool]]) -> Interval:
    """Proportion: Wilson if every script was made once, else bootstrap, for seeds of one script are not independent."""
    filled = {number: values for number, values in by_script.items() if len(values)}
    if all(len(values) == 1 for values in filled.values()):
        return wilson(sum(bool(values[0]) for values in filled.values()), len(filled))
    return bootstrap({number: [float(v) for v in values] for number, values in filled.items()})


def paired(a: Mapping[tuple[int, int], float | None], b: Mapping[tuple[int, int], float | None]) -> Interval:
    """Mean difference a - b by (script, seed), over those that both have; scripts are drawn with replacement."""
    differences: dict[int, list[float]] = {}
    for key in sorted(set(a) & set(b)):
        if a[key] is not None and b[key] is not None:
            differences.setdefault(key[0], []).append(float(a[key]) - float(b[key]))
    return bootstrap(differences)


Keyed = Mapping[tuple[int, int], Score]  # by (script, seed)


def summary(scores: Keyed) -> dict[str, Interval]:
    """Every rate of one memory, and the mean hue error in degrees."""
    return {
        **{name: rate(_by_script(scores, name)) for name in ("readable", *STATED, *UNSTATED, "itself")},
        "hue_error": bootstrap(_by_script(scores, "hue_error")),
    }


def comparison(scores: Keyed, others: Keyed) -> dict[str, Interval]:
    """Every paired difference between two memories, first minus second."""
    names = (*STATED, *UNSTATED, "itself", "hue_error")
    return {name: paired(*({k: getattr(s, name) for k, s in x.items()} for x in (scores, others))) for name in names}


def by_gap(scores: Keyed, scripts: Sequence[ReturnScript], name: str) -> list[Interval]:
    """One rate per stratum of the time away."""
    strata = {script.number: script.stratum for script in scripts}
    parts = [{key: s for key, s in scores.items() if strata[key[0]] == stratum} for stratum in range(len(GAPS))]
    measure: Callable = bootstrap if name == "hue_error" else rate
    return [measure(_by_script(part, name)) for part in parts]


def _by_script(scores: Keyed, name: str) -> dict[int, list]:
    """Values of one field by script; what could not be read is left out."""
    values: dict[int, list] = {}
    for (number, _), one in sorted(scores.items()):
        value = getattr(one, name)
        values.setdefault(number, []).extend([] if value is None else [value])
    return values


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
