"""Rows as a table to look at, and as JSON and CSV to go on with."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from slotmemory.bench.streams import Row
from slotmemory.errors import InputError
from slotmemory.tree import atomic_file


def table(rows: Sequence[Row], end: float) -> Table:
    """Rows for a terminal; end: seconds of video at which the last chunks were timed."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found.add_column("memory", no_wrap=True)
    costs = ("budget", "attended", "held MB", "read ms", "write ms", "update ms")
    for title in (*costs, "start s", "chunk ms then", f"chunk ms at {end:.0f} s", "growth"):
        found.add_column(title, justify="right")
    found.add_column("note", overflow="fold")
    last = None
    for row in rows:
        times = (row.read_ms, row.write_ms, row.update_ms)
        found.add_row(
            escape(row.memory) if row.memory != last else "",
            "own" if row.budget is None else str(row.budget),
            _number(row.attended, "d"),
            _number(None if row.held_bytes is None else row.held_bytes / 1e6, ".2f"),
            *(_number(value, ".2f") for value in times),
            _number(row.start_s, ".0f"),
            _number(row.start_ms, ".1f"),
            _number(row.end_ms, ".1f"),
            _number(row.growth, ".2f"),
            escape(row.note),
        )
        last = row.memory
    return found


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def write(rows: Sequence[Row], settings: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write bench.json (settings and rows) and bench.csv (rows) -> their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.to_dict() for row in rows)
    whole = json.dumps({"settings": dict(settings), "rows": [row.to_dict() for row in rows]}, indent=1) + "\n"
    made = []
    for name, text in (("bench.json", whole), ("bench.csv", lines.getvalue())):
        with atomic_file(folder / name) as file:
            file.write(text.encode())
        made.append(folder / name)
    return made


def read(folder: Path) -> tuple[list[Row], dict[str, Any]] | None:
    """Rows and settings of a bench.json; None where there is none. Raises InputError for one that is not of this version."""
    path = folder / "bench.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        rows, settings = [Row(**row) for row in whole["rows"]], whole["settings"]
        if not isinstance(settings["code"], dict):
            raise TypeError
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError.from_os("read", path, error) from error
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} was not written by this version of `slotmemory bench`; choose another --out"
        ) from None
    return rows, settings
