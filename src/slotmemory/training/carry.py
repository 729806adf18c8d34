"""Carry a student over to a teacher that has learnt more: new teacher + share x (student - its own teacher), weight by weight.

    python -m slotmemory.training.carry --student runs/slots --teacher runs/old --onto runs/new --share 0.25 --out runs/carried

Task arithmetic (arXiv 2212.04089): what distillation changed is added to what the teacher has become, so that a student need
not be distilled anew. The critic is carried likewise; words are the new teacher's, all other parts the student's. The result
is a training run's folder: `pack` makes a model of it, and later stages may start from it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from torch import Tensor

from slotmemory.checkpoints.folder import SETTINGS, write_part, write_settings
from slotmemory.codecs.base import read_tensors
from slotmemory.errors import InputError
from slotmemory.training.pack import exported, settings_of

CARRIED = ("transformer", "critic")


def carried(
    student: dict[str, Tensor], teacher: dict[str, Tensor], onto: dict[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Add what distillation changed, onto + share (student - teacher), in fp32. InputError unless all have the same weights."""
    for name, others in (("teacher", teacher), ("new teacher", onto)):
        if {k: t.shape for k, t in others.items()} != {k: t.shape for k, t in student.items()}:
            raise InputError(
                f"the {name}'s weights have other names or shapes than the student's; give its own teacher"
            )
    return {k: onto[k].float() + share * (x.float() - teacher[k].float()) for k, x in student.items()}


def carry(student: Path, teacher: Path, onto: Path, share: float, out: Path, raw: bool = False) -> None:
    """Write the run's folder; student, teacher and onto are training runs or model folders."""
    weights = out / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    before, now = (read_tensors(exported(source, "transformer"))[0] for source in (teacher, onto))
    for part in parts_of(student):
        tensors, told = read_tensors(exported(student, part, raw))
        if part in CARRIED:
            tensors = carried(tensors, before, now, share)
        elif part == "words":
            tensors, told = read_tensors(exported(onto, part))
        write_part(weights / f"{part}.safetensors", tensors, told)
    write_settings(out, {"name": out.name, **settings_of(student)})
    recipe = {"objective": "flow", "options": {"settings": str(out / SETTINGS)}}
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def parts_of(run: Path) -> list[str]:
    """Names of the parts that a training run exported, or that a model folder holds, but for its codec."""
    files = sorted({*run.glob("weights/*.safetensors"), *run.glob("*.safetensors")})
    names = {path.name.removesuffix(".safetensors").removesuffix(".ema") for path in files} - {"codec"}
    if "transformer" not in names:
        raise InputError(f"{run} holds no transformer weights; give a training run or a model folder")
    return sorted(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, required=True, help="run or model that was distilled")
    parser.add_argument("--teacher", type=Path, required=True, help="its teacher, as it was then")
    parser.add_argument("--onto", type=Path, required=True, help="the teacher as it is now")
    parser.add_argument("--share", type=float, default=1.0, help="of what distillation changed (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", action="store_true", help="take the student's trained weights, not their average")
    given = parser.parse_args()
    try:
        carry(given.student, given.teacher, given.onto, given.share, given.out, given.raw)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
