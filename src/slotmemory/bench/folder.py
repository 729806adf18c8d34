"""A folder of finished races: bench.json, .csv and .png, written anew after each, so that a bench can go on.

A race is all memories at one budget, taking turns. Rows share a folder only where all that changes figures was the same:
the settings, and the code of each memory. Knows no engine.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slotmemory import memory as memories
from slotmemory.bench.picture import plot
from slotmemory.bench.report import read, write
from slotmemory.bench.streams import Row
from slotmemory.checkpoints.files import fingerprint
from slotmemory.errors import InputError, shorten


@dataclass
class Folder:
    """settings: plain values; code: a fingerprint per memory, in the order of the rows; rows: of finished races."""

    path: Path
    settings: Mapping[str, Any]
    code: dict[str, str]
    rows: list[Row]

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], names: Sequence[str]) -> Folder:
        """What is there already, or nothing yet. Raises InputError where it was measured in another way than this."""
        code = {name: code_of(name) for name in names}
        found = read(path)
        if found is None:
            return cls(path, settings, code, [])
        rows, before = found
        known = before.pop("code")
        now = dict(settings)
        changed = [
            f"{key} {shorten(str(before.get(key)))} (now {shorten(str(now.get(key)))})"
            for key in before | now
            if before.get(key) != now.get(key)
        ]
        changed += [f"the code of {name}" for name, digest in code.items() if known.get(name, digest) != digest]
        if changed:
            raise InputError(
                f"{path} holds races measured with other settings: {', '.join(changed)}; their figures would not compare: "
                f"go on with the same settings, choose another --out, or remove {path / 'bench.json'} to begin anew"
            )
        return cls(path, settings, code | known, rows)

    def race(self, budget: int | None) -> list[Row]:
        return [row for row in self.rows if row.budget == budget]

    def lacks(self, budget: int | None, names: Sequence[str]) -> bool:
        """Whether these memories have yet to race at this budget; those of an earlier race among them do so again.

        Raises InputError where the new race would replace that of a memory which does not take part."""
        there = [row.memory for row in self.race(budget)]
        if set(names) <= set(there):
            return False
        if not set(there) <= set(names):
            together = ",".join(dict.fromkeys([*there, *names]))
            at = "own budgets" if budget is None else f"budget {budget}"
            raise InputError(
                f"{self.path} holds a race of {', '.join(there)} at {at}, and memories compare only within a race; "
                f"measure them together, --memories {together}, or choose another --out"
            )
        return True

    def add(self, rows: Sequence[Row]) -> None:
        """Take in a race's rows in place of those of an earlier race at its budget, and write all files."""
        budgets, order = {row.budget for row in rows}, list(self.code)
        kept = [row for row in self.rows if row.budget not in budgets]
        self.rows = sorted(
            [*kept, *rows], key=lambda row: (order.index(row.memory), row.budget is None, row.budget or 0)
        )
        self.write()

    def write(self) -> list[Path]:
        """Write bench.json, .csv and .png -> their paths."""
        picture = self.path / "bench.png"
        made = write(self.rows, {**self.settings, "code": self.code}, self.path)
        plot(self.rows, picture)
        return [*made, picture]


def code_of(name: str) -> str:
    """A fingerprint of the files that a memory's class and its parents are written in."""
    policies = [cls for cls in memories.find(name).__mro__ if issubclass(cls, memories.Memory)]
    return fingerprint(Path(inspect.getfile(cls)) for cls in policies if cls is not memories.Memory)
