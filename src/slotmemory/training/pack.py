"""Make a model folder of what trainings exported: `generate --model FOLDER` takes it, `assets/tiny` is one.

    python -m slotmemory.training.pack --transformer runs/tiny-transformer --codec runs/tiny-codec --out my-model

Averaged (EMA) weights are taken where they were exported, the trained ones with `--raw`. What a run says goes along: the
settings that its recipe names, a student's noise levels, and the weights of the memory it was trained with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from slotmemory.checkpoints import folder
from slotmemory.checkpoints.folder import pack, write_part
from slotmemory.codecs.base import read_tensors
from slotmemory.errors import InputError
from slotmemory.models import embedded, find

# options that say whose settings a run goes with; one that has none of them trained the embedded model
NAMING = ("settings", "base", "student")
EMBEDDED = "tiny"
LEVELS = ("steps", "shift")  # where a student was trained with levels of its own


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


def settings_of(source: str | Path, named: str | None = None) -> dict[str, Any]:
    """What a model is asked for at sampling and its memories' defaults: its model.json, but for name and adapters.

    source: a model's name or folder, a model.json, or a training run, whose recipe names another of these or started from
    one; named: in place of what it says. A student's noise levels are its own. InputError where there are none."""
    place = Path(source)
    recipe = place / "recipe.yaml"
    if str(source) in embedded():
        found = find(str(source)).settings
    elif recipe.is_file():
        options = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("options", {})
        trained = options.get("memory") is not None  # a student; other stages have steps and shifts of another meaning
        own = {name: options[name] for name in LEVELS if trained and options.get(name)}
        whose = named or next((options[name] for name in NAMING if options.get(name)), EMBEDDED)
        return settings_of(whose) | own
    elif named is not None:
        return settings_of(named)
    elif place.is_file() or (place / folder.SETTINGS).is_file():
        found = folder.settings_of(place)
    else:
        raise InputError(
            f"{source} tells no settings: no model, {folder.SETTINGS} or training run is there; where what a run started "
            "from is gone, pack the run with --settings MODEL"
        )
    return {name: value for name, value in found.items() if name not in ("name", "adapters")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformer", type=Path, required=True, help="run that trained transformer and words")
    parser.add_argument("--codec", type=Path, required=True, help="run that trained the codec, or its weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", action="store_true", help="take the trained weights, not their average")
    parser.add_argument("--settings", help="a model or a model.json, in place of the settings that the run names")
    given = parser.parse_args()
    run = given.transformer
    try:
        parts = {name: exported(run, name, given.raw) for name in ("transformer", "words")}
        settings = {"name": given.out.name, **settings_of(run, given.settings)}
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
