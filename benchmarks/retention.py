"""Who is still in the memory when the prompt asks for them? What memories hold of heroes that were away.

    python benchmarks/retention.py --memories slots,slots:evict=relevance,narrative,sink

The scripts of `returning_entity.py` are told by the world and given to the stream as its past, chunk by chunk, so that it is
known which tokens show the hero; nothing is made. Counted is what every layer holds at the moment at which the hero is asked
for again: its tokens on the hero, and whether they are at least `ENOUGH`. What a model does with them is another matter
(`returning_entity.py`). `MEMORY:KEY=VALUE:KEY=VALUE` gives a memory arguments. Memories that average or re-place what they
keep cannot be asked where it was, and are refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from slotmemory.config import parse_arguments
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.evaluation import returning
from slotmemory.evaluation.results import shown, status_of, table
from slotmemory.evaluation.returning import GAPS, ReturnScript, bootstrap
from slotmemory.memory import State, banks
from slotmemory.training.narratives import latents_of
from slotmemory.world.masks import token_masks
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize

ENOUGH = 5  # tokens; an entity covers eight and more of a latent frame
SPANS = ((GAPS[0][0], GAPS[0][1]), (GAPS[1][0], GAPS[-1][1]))  # seconds away: what a bank spans anyway, and longer


def engine_of(model: str, spec: str) -> Engine:
    """Read `slots:evict=redundancy`: a memory's name and arguments."""
    name, *pairs = spec.split(":")
    return Engine.from_pretrained(model, name, **parse_arguments(pairs))


def told(engine: Engine, script: ReturnScript) -> tuple[Tensor, Tensor]:
    """A script as the world tells it: latents [1, T, C, h, w], where its hero is [T, rows, columns] bool."""
    layout = engine.layout
    shots = [(prompt, start) for start, prompt in script.prompts.items()]
    narrative = Narrative(shots, script.chunks, script.seed, WorldSize(layout.width, layout.height))
    hero = [entity.identity for entity in narrative.entities].index(script.hero)
    masks = torch.from_numpy(token_masks(narrative, layout.grid))
    return latents_of(narrative, engine.codec)[None], masks == hero + 1


def held(state: State, hero: Tensor) -> list[int]:
    """Tokens of every layer that show the hero; hero [T, rows, columns] bool. One held twice counts once."""
    found: list[set[tuple[int, ...]]] = []
    for _, layers in banks(state):
        found = found or [set() for _ in layers]
        for layer, bank in enumerate(layers):
            places = bank.positions[0][bank.owner[0] >= -1].flatten(0, -2)
            if places.is_floating_point() and bool((places != places.round()).any()):
                raise InputError("this memory averages places, so nobody can say where its tokens were")
            places = places.long().cpu()
            frames, rows, columns = hero.shape
            outside = (places < 0) | (places >= torch.tensor([frames, rows, columns]))
            if bool(outside.any()):
                raise InputError("this memory re-places what it keeps, so nobody can say where its tokens were")
            found[layer] |= {tuple(place) for place in places[hero[places.T.unbind()]].tolist()}
    return [len(places) for places in found]


def asked(engine: Engine, script: ReturnScript, latents: Tensor, hero: Tensor) -> list[int]:
    """Give a stream all of a script but the hero's return -> tokens of the hero that every layer holds then."""
    size = engine.layout.frames_per_chunk
    starts = sorted(script.prompts)
    session = engine.session({0: script.prompts[0]})
    for chunk in range(starts[-1]):
        session.prompts[session.index] = script.prompts[max(start for start in starts if start <= chunk)]
        session.prefill(latents[:, chunk * size : (chunk + 1) * size])
    return held(session.state, hero) or [0] * engine.layout.layers


def report(results: dict[str, dict[int, list[int]]], scripts: Sequence[ReturnScript]) -> str:
    """A row per memory: the share of layers that hold enough of the hero, and tokens of it, by seconds away."""
    away = {script.number: script.gap_seconds for script in scripts}
    spans = [f"{low:.0f}-{high:.0f} s" for low, high in SPANS]
    rows = []
    for name, by_script in results.items():
        cells = []
        for low, high in SPANS:
            chosen = {number: tokens for number, tokens in by_script.items() if low <= away[number] < high}
            enough = {number: [count >= ENOUGH for count in tokens] for number, tokens in chosen.items()}
            cells += [shown(bootstrap(enough), ".0f", 100), shown(bootstrap(chosen), ".1f")]
        rows.append([name, *cells])
    header = ["memory", *(f"{what}, {span} away" for span in spans for what in ("held, %", "tokens"))]
    return table(header, rows)


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    engines = {spec: engine_of(options.model, spec) for spec in options.memories.split(",")}
    results: dict[str, dict[int, list[int]]] = {name: {} for name in engines}
    scripts = returning.scripts(options.scripts)
    for script in scripts:
        latents, hero = told(next(iter(engines.values())), script)
        for name, engine in engines.items():
            results[name][script.number] = asked(engine, script, latents, hero)
        sys.stderr.write(f"script {script.number + 1} of {len(scripts)}\n")
    print(report(results, scripts))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--memories", default="sink,slots:evict=relevance,slots:evict=redundancy")
    parser.add_argument("--scripts", type=int, default=32)
    parser.add_argument("--threads", type=int)
    return status_of(lambda: run(parser.parse_args(arguments)), keeps=False)


if __name__ == "__main__":
    sys.exit(main())
