"""Scripts from JSON Lines, as LongLive and MemFlow have them: one per line, prompts with or without switches."""

from __future__ import annotations

import json
from typing import Any

from slotmemory.errors import InputError, shorten, unknown
from slotmemory.script import values
from slotmemory.script.shots import Script, Shot

LINE_KEYS = ("prompts", "switch_frame_indices", "seconds", "title", "seed", "options")

# A line of JSON Lines carries no durations: LongLive and MemFlow show each prompt for 10 s.
LINE_SECONDS = 10
# switch_frame_indices count latent frames of Wan's 16 frames/s, 4 frames each.
LINE_LATENTS_PER_SECOND = 4


def parse_lines(text: str, name: str) -> dict[int, Script]:
    """Read scripts by line number, from 1; `name` stands for the file in messages."""
    scripts = {}
    # split on line feeds only: str.splitlines would also split inside strings, at U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with values.at(f"{name}:{number}"):
                scripts[number] = _parse_line(line)
    if not scripts:
        raise InputError(f'{name} is empty; expected one script per line, such as {{"prompts": ["A red cat walks."]}}')
    return scripts


def _parse_line(line: str) -> Script:
    try:
        tree = json.loads(line, object_pairs_hook=_no_duplicates)
    except InputError:
        raise
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON: {shorten(str(error), 80)}") from error
    if not isinstance(tree, dict):
        raise InputError(f'expected {{"prompts": [...]}}, got {shorten(tree)}')
    for key in tree:
        if key not in LINE_KEYS:
            raise InputError(unknown("key", key, LINE_KEYS))
    prompts = tree.get("prompts")
    if not isinstance(prompts, list):
        raise InputError(f"prompts: expected a list of texts, got {'nothing' if prompts is None else shorten(prompts)}")
    values.check_shots(len(prompts), 0)
    with values.at("seconds"):
        seconds = values.duration(tree.get("seconds", LINE_SECONDS))
    durations = [seconds] * len(prompts)
    if tree.get("switch_frame_indices") is not None:
        with values.at("switch_frame_indices"):
            durations = _durations(tree["switch_frame_indices"], len(prompts), seconds)
    shots = []
    for number, (prompt, duration) in enumerate(zip(prompts, durations), 1):
        with values.at(f"prompts[{number}]"):
            shots.append(Shot(values.text(prompt, values.MAX_PROMPT, "a prompt"), duration))
    options = tree.get("options")
    return Script(
        tuple(shots), seed=tree.get("seed"), title=tree.get("title"), options={} if options is None else options
    )


def _durations(indices: Any, count: int, last: float) -> list[float]:
    """Seconds between switches given in latent frames; the last prompt gets `last` seconds."""
    if not isinstance(indices, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise InputError(f"expected a list of latent frames such as [40, 80], got {shorten(indices)}")
    if len(indices) != count - 1:
        raise InputError(f"{len(indices)} switches for {count} prompts; expected {count - 1}, one less than prompts")
    edges = [0, *indices]
    for before, after in zip(edges, indices):
        if after <= before:
            raise InputError(f"{shorten(after)} does not come after {shorten(before)}; expected rising numbers above 0")
    most = values.MAX_SECONDS * LINE_LATENTS_PER_SECOND
    if edges[-1] > most:
        raise InputError(f"{shorten(edges[-1])} is beyond latent frame {most}, {values.MAX_SECONDS // 3600} hours")
    return [(after - before) / LINE_LATENTS_PER_SECOND for before, after in zip(edges, indices)] + [last]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"'{shorten(key)}' is given twice; keep one")
        found[key] = value
    return found
