"""Write the world's truth of a script as oracle masks: who every token shows, latent frame by latent frame.

    python benchmarks/oracle_masks.py story.yaml --model tiny --out masks.npz
    slotmemory generate story.yaml -m grouping=oracle -m masks=masks.npz

With several seeds the file has an axis of batch rows, in their order. See `slotmemory.world.masks` for what it means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from slotmemory.layout import Layout
from slotmemory.memories._masks import save_masks
from slotmemory.models import load
from slotmemory.script import Script, load_script
from slotmemory.world.masks import token_masks
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize


def narrative_of(script: Script, layout: Layout, seed: int) -> Narrative:
    """The rendered video of a script, as long and as large as a model would make it."""
    schedule = script.schedule(layout)
    shots = [(shot.prompt, schedule.chunks_of(i).start) for i, shot in enumerate(script.shots)]
    return Narrative(shots, schedule.chunks, seed, WorldSize(layout.width, layout.height))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path)
    parser.add_argument("--model", default="tiny", help="whose grid of tokens counts")
    parser.add_argument("--seeds", type=int, nargs="+", help="one per batch row; without: the script's, else 0")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        script, layout = load_script(options.script), load(options.model, torch.device("meta")).layout
        seeds = options.seeds or [script.seed or 0]
        rows = [token_masks(narrative_of(script, layout, seed), layout.grid) for seed in seeds]
        save_masks(options.out, rows)
    except ValueError as error:  # what a person can put right: a script, a word of it, a grid
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.out}: {script.schedule(layout).chunks * layout.frames_per_chunk} latent frames, {len(seeds)} row(s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
