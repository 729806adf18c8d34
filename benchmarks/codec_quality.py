"""What does a codec lose of things that move? PSNR in their boxes, by what they do.

    python benchmarks/codec_quality.py --model tiny --narratives 16

Held-out narratives of the world are encoded and decoded. A row is an action in two scenes with a cut between them
("enters": from the side, into an empty scene); frames in which nobody shows count for the whole picture only.
Intervals: bootstrap over narratives.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from slotmemory.codecs.base import to_float
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.evaluation.results import shown, table
from slotmemory.evaluation.returning import bootstrap
from slotmemory.training.codec import in_boxes, psnr
from slotmemory.training.narratives import HELD_OUT
from slotmemory.world import ACTIONS, COLOURS, KINDS, SCENES, Narrative, WorldSize

FIRST_SEED = HELD_OUT + 20_000  # beyond what trainings learn from and validate on
ENTERS = "enters"
CHUNKS_PER_SHOT = 3


def prompts_of(action: str, random: np.random.Generator) -> list[str]:
    """Two shots about one individual: its action in two scenes, or how it comes into the second half of one."""
    colour, kind = (str(random.choice(words)) for words in (list(COLOURS), KINDS))
    first, second = (f"the {scene}" for scene in random.choice(list(SCENES), 2, replace=False))
    if action == ENTERS:
        return [f"In {first} it is empty.", f"In {first}, a {colour} {kind} waits."]
    return [f"In {scene}, a {colour} {kind} {action}." for scene in (first, second)]


@torch.no_grad()
def measure(engine: Engine, action: str, number: int) -> tuple[float, float]:
    """PSNR in dB of one held-out narrative through the codec: of whole pictures, and in boxes."""
    size, random = WorldSize(engine.layout.width, engine.layout.height), np.random.default_rng([FIRST_SEED, number])
    told = prompts_of(action, random)
    narrative = Narrative.from_prompts(told, FIRST_SEED + number, CHUNKS_PER_SHOT, size)
    pixels = to_float(torch.from_numpy(narrative.render()))[None].to(engine.codec.dtype)
    squared = (engine.codec.decode(engine.codec.encode(pixels)).clamp(-1, 1) - pixels)[0].float().square().mean(1)
    masks = torch.from_numpy(narrative.truth().masks > 0)
    return psnr(squared.mean()), psnr(squared[in_boxes(masks)].mean())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--narratives", type=int, default=16)
    options = parser.parse_args(arguments)
    try:
        engine = Engine.from_pretrained(options.model)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    rows = []
    for action in (*ACTIONS, ENTERS):
        found = [measure(engine, action, number) for number in range(options.narratives)]
        both = (bootstrap({n: [value] for n, value in enumerate(values)}) for values in zip(*found))
        rows.append([action, *(shown(x, ".1f") for x in both)])
    print(table(("action", "PSNR, dB", "in boxes, dB"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
