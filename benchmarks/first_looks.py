"""What do those look like whose looks nobody has described, and do they differ from one another?

    python benchmarks/first_looks.py --models tiny,my-model --memory slots --streams 24

Two tables. *First looks*: pattern and accessory of everybody who can be asked for (all kinds, colours and scenes), in the first
chunk of a video of their own; a model with favourites shows here. *Strangers*: videos in which four of other names appear one
after the other, each alone in another scene; pairs of them should share looks as often as first looks do (*by chance*), and
share them more often where a memory lends the looks of one to the next.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.evaluation.reader import Reader, Reading
from slotmemory.evaluation.results import shown, status_of, table
from slotmemory.evaluation.returning import UNSTATED, rate
from slotmemory.world.entities import ACCESSORIES, PATTERNS
from slotmemory.world.grammar import Role, ShotSpec, compose_plain
from slotmemory.world.vocabulary import COLOURS, KINDS, SCENES

ANSWERS = {"pattern": PATTERNS, "accessory": ACCESSORIES}
STRANGERS = 4
CHUNKS_EACH = 2  # the second is read: a cut is settled by then


def waiting(colour: str, kind: str, scene: str) -> str:
    return compose_plain(ShotSpec(scene, (Role(colour, kind, "waits"),)))


def first_looks(engine: Engine, reader: Reader) -> list[Reading]:
    """Read everybody who can be asked for in the first chunk of a stream."""
    told = [waiting(colour, kind, scene) for kind, colour, scene in product(KINDS, COLOURS, SCENES)]
    return [reader.read(engine.session(prompt, seed=seed).step().frames[0]) for seed, prompt in enumerate(told)]


def strangers(engine: Engine, reader: Reader, number: int) -> list[Reading]:
    """Read four who have nothing but the stream in common."""
    rng = random.Random(number)
    cast = zip(*(rng.sample(names, STRANGERS) for names in (COLOURS, KINDS, SCENES)))
    session, readings = None, []
    for who in cast:
        if session is None:
            session = engine.session(waiting(*who), seed=number)
        else:
            session.prompt(waiting(*who))
        chunks = [session.step() for _ in range(CHUNKS_EACH)]
        readings.append(reader.read(chunks[-1].frames[0]))
    return readings


def by_chance(readings: Sequence[Reading], name: str) -> float:
    """How often two of these agree."""
    counts = Counter(getattr(reading, name) for reading in readings)
    return sum(n * (n - 1) for n in counts.values()) / (len(readings) * (len(readings) - 1))


def run(given: argparse.Namespace) -> None:
    reader = Reader.load()
    if given.streams < 1:
        raise InputError(f"--streams {given.streams}: at least one is needed")
    looks_rows, strangers_rows = [], []
    for model in given.models.split(","):
        engine = Engine.from_pretrained(model, given.memory, steps=given.steps)
        looks = first_looks(engine, reader)
        counts = {name: Counter(getattr(reading, name) for reading in looks) for name in UNSTATED}
        looks_rows.append([model, *(str(counts[name][answer]) for name in UNSTATED for answer in ANSWERS[name])])
        shared: dict[str, dict[int, list[bool]]] = {name: {} for name in UNSTATED}
        for number in range(given.streams):
            print(f"{model}: stream {number + 1}/{given.streams}", file=sys.stderr, flush=True)
            met = strangers(engine, reader, number)
            for name in UNSTATED:
                shared[name][number] = [getattr(a, name) == getattr(b, name) for a, b in combinations(met, 2)]
        found = {name: rate(shared[name]) for name in UNSTATED}
        strangers_rows.append(
            [model, given.memory]
            + [shown(x, ".0f", 100) for x in found.values()]
            + [f"{100 * by_chance(looks, name):.0f}" for name in UNSTATED]
        )
    heads = [answer for name in UNSTATED for answer in ANSWERS[name]]
    print(f"First looks of {len(looks)}\n\n{table(['model', *heads], looks_rows)}\n")
    print(f"Strangers that share looks, % of pairs, {given.streams} streams\n")
    chance = [f"{name} by chance" for name in UNSTATED]
    print(table(["model", "memory", *UNSTATED, *chance], strangers_rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="tiny", help="names or folders, with commas")
    parser.add_argument("--memory", default="slots", help="a name or a policy file")
    parser.add_argument("--steps", type=int, help="Euler steps (default: each model's own steps)")
    parser.add_argument("--streams", type=int, default=24, help="of four strangers each")
    given = parser.parse_args()
    return status_of(lambda: run(given), keeps=False)


if __name__ == "__main__":
    sys.exit(main())
