"""Make a model folder of what trainings exported: `generate --model FOLDER` takes it, `assets/tiny` is one.

    python -m slotmemory.training.pack --transformer runs/tiny-transformer --codec runs/tiny-codec --out my-model

Averaged (EMA) weights are taken where they were exported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slotmemory.checkpoints.folder import pack
from slotmemory.errors import InputError
from slotmemory.training.look import SETTINGS


def exported(source: Path, part: str) -> Path:
    """Find a part's weights: a training run's folder, a model folder, or the file itself."""
    places = (source, source / "weights" / f"{part}.ema.safetensors", source / f"{part}.safetensors")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{source} holds no {part} weights; give a training run, a model folder or a .safetensors file"
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformer", type=Path, required=True, help="run that trained transformer and words")
    parser.add_argument("--codec", type=Path, required=True, help="run that trained the codec, or its weights")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    try:
        parts = {name: exported(given.transformer, name) for name in ("transformer", "words")}
        pack(given.out, {**parts, "codec": exported(given.codec, "codec")}, {"name": given.out.name, **SETTINGS})
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
