"""Results of a benchmark on disk, one line at a time, and in tables of words; and how a benchmark ends."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slotmemory.errors import InputError
from slotmemory.evaluation.returning import Interval


class Lines:
    """The lines made so far, in a folder that belongs to one setting: a stopped benchmark goes on where it was."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Raises InputError for a folder of other settings."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "results.jsonl"
        known = folder / "settings.json"
        if not known.exists():
            known.write_text(json.dumps(settings))
        elif json.loads(known.read_text()) != settings:
            raise InputError(
                f"{folder} holds results of {known.read_text()}; those asked for are {settings}; use another --out"
            )
        self.lines: list[dict[str, Any]] = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:  # half a line, written when the run was stopped
                    continue
            self.path.write_text("".join(json.dumps(line) + "\n" for line in self.lines))

    def of(self, **which: Any) -> list[dict[str, Any]]:
        """The lines with these values."""
        return [line for line in self.lines if all(line[name] == value for name, value in which.items())]

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)


def shown(x: Interval, form: str, scale: float = 1.0) -> str:
    """A mean with its interval, both times `scale`; a dash where there is none."""
    if math.isnan(x.mean):
        return "-"
    return f"{scale * x.mean:{form}} ({scale * x.low:{form}} to {scale * x.high:{form}})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def status_of(work: Callable[[], None], keeps: bool = True) -> int:
    """Do the work of a benchmark -> exit status; one line for bad input, and one if it is stopped. keeps: its results."""
    try:
        work()
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"stopped; the same command {'goes on from here' if keeps else 'starts again'}\n")
        return 130
    return 0
