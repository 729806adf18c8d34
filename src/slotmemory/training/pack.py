"""Make a model folder of what trainings exported: `generate --model FOLDER` takes it, `assets/tiny` is one.

    python -m slotmemory.training.pack --transformer runs/tiny-transformer --codec runs/tiny-codec --out my-model

Averaged (EMA) weights are taken where they were exported, the trained ones with `--raw`. What a run says of its student
goes along: its denoising steps, and the weights of the memory it was trained with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from slotmemory.checkpoints.folder import pack, write_part
from slotmemory.codecs.base import read_tensors
from slotmemory.errors import InputError
from slotmemory.training.look import SETTINGS


def exported(source: Path, part: str, raw: bool = False) -> Path:
    """Find a part's weights: a training run's folder (averaged unless `raw`), a model folder, or the file itself."""
    kinds = ("", ".ema") if raw else (".ema", "")
    places = (
        source,
        *(source / "weights" / f"{part}{kind}.safetensors" for kind in kinds),
        source / f"{part}.safetensors",
    )
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{source} holds no {part} weights; give a training run, a model folder or a .safetensors file"
        )
    return found


def settings_of(run: Path) -> dict[str, Any]:
    """What a packed model is asked for at sampling: the embedded model's settings, with the student's steps if it has any."""
    recipe = run / "recipe.yaml"
    options = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("options", {}) if recipe.is_file() else {}
    trained = options.get("memory") is not None  # a student; other stages have steps of their own meaning
    return {**SETTINGS, "steps": options["steps"]} if trained and options.get("steps") else dict(SETTINGS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformer", type=Path, required=True, help="run that trained transformer and words")
    parser.add_argument("--codec", type=Path, required=True, help="run that trained the codec, or its weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", action="store_true", help="take the trained weights, not their average")
    given = parser.parse_args()
    run = given.transformer
    try:
        parts = {name: exported(run, name, given.raw) for name in ("transformer", "words")}
        settings = {"name": given.out.name, **settings_of(run)}
        pack(given.out, {**parts, "codec": exported(given.codec, "codec")}, settings)
        for name in sorted({".".join(path.name.split(".")[:2]) for path in run.glob("weights/memory.*.safetensors")}):
            # small, and kept exact
            write_part(given.out / f"{name}.safetensors", *read_tensors(exported(run, name, given.raw)))
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
