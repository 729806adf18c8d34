"""Do slots hold things? Slots, clusters and fixed regions on the same features of the same held-out narratives.

    python benchmarks/slot_quality.py --model tiny --narratives 16
    python benchmarks/slot_quality.py --weights runs/slots/weights/memory.slots.ema.safetensors

The world's own frames are given to the stream as its past, chunk by chunk, so that it is known who is where; nothing is
made. Every layer groups by itself: printed are the mean over layers and the best layer, with 95 % intervals over narratives
(bootstrap). `grouping.py` in `slotmemory.evaluation` says what the measures are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.evaluation.grouping import Quality, measure
from slotmemory.evaluation.results import shown, table
from slotmemory.evaluation.returning import bootstrap
from slotmemory.training.narratives import HELD_OUT, latents_of
from slotmemory.world.masks import token_masks
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize

GROUPINGS = ("learned", "kmeans", "grid", "shuffled")
FIRST_SEED = HELD_OUT + 10_000  # beyond what trainings learn from and validate on
HEADER = ("grouping", "layer", "FG-ARI", "mBO, clip", "mBO, chunk", "bound", "usage")


def labels_of(engine: Engine, latents: Tensor, prompts: Sequence[str]) -> Tensor:
    """Give a stream its past -> the group of every token in every layer, [layers, chunks, tokens]."""
    size = engine.layout.frames_per_chunk
    session = engine.session({0: prompts[0]})
    found = []
    for chunk, prompt in enumerate(prompts):
        session.prompts[session.index] = prompt
        session.prefill(latents[:, chunk * size : (chunk + 1) * size])
        found.append(engine.memory.look(session.state)["labels"][:, 0])
    return torch.stack(found, 1)


def read(engine: Engine, seed: int, seconds: float) -> tuple[Tensor, Tensor, list[str]]:
    """A held-out narrative: latents [1, T, C, h, w], who is where [chunks, tokens], the prompt of every chunk."""
    layout = engine.layout
    narrative = Narrative.random(seed, seconds, WorldSize(layout.width, layout.height))
    truth = torch.from_numpy(token_masks(narrative, layout.grid)).unflatten(0, (-1, layout.frames_per_chunk))
    prompts = [narrative.prompt(k) for k in range(narrative.chunks)]
    return latents_of(narrative, engine.codec)[None], truth.flatten(1), prompts


def report(results: Mapping[str, Sequence[Sequence[Quality]]]) -> str:
    """Write a table in markdown of measures by grouping, [narratives][layers] each."""
    rows = []
    for name, clips in results.items():
        layers = list(range(len(clips[0])))
        best = max(layers, key=lambda i: np.mean([clip[i].mbo for clip in clips if clip[i].mbo is not None]))
        for word, chosen in (("mean", layers), (f"{best}, the best", [best])):
            cells = []
            for measure_name in Quality._fields:
                per_clip = [[getattr(clip[i], measure_name) for i in chosen] for clip in clips]
                cells.append(shown(bootstrap({k: [] if None in row else row for k, row in enumerate(per_clip)}), ".2f"))
            rows.append([name, word, *cells])
    return table(HEADER, rows)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights", default="", help="trained slots; default: the model's own, none: untrained")
    parser.add_argument("--groupings", default=",".join(GROUPINGS))
    parser.add_argument("--narratives", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        given = {"weights": options.weights} if options.weights else {}
        engines = {
            name: Engine.from_pretrained(options.model, "slots", grouping=name, **given)
            for name in options.groupings.split(",")
        }
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results: dict[str, list[list[Quality]]] = {name: [] for name in engines}
    for number in range(options.narratives):
        latents, truth, prompts = read(next(iter(engines.values())), FIRST_SEED + number, options.seconds)
        for name, engine in engines.items():
            labels = labels_of(engine, latents, prompts)
            results[name].append([measure(layer, truth, engine.memory.num_slots) for layer in labels])
        sys.stderr.write(f"\r{number + 1} of {options.narratives} narratives")
    sys.stderr.write("\n")
    print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
