"""What streams are told in data-free training: scripts of prompts, drawn by a generator.

A source is "world" (stories of the narrative world, switches included) or a file: one prompt per line (the layout of
extended VidProM), with `follow` a second file whose line i continues line i (LongLive's switch pairs), or JSON lines with
a list of `prompts`. It knows no model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from slotmemory.errors import InputError
from slotmemory.world.clock import FPS, FRAMES_PER_CHUNK
from slotmemory.world.grammar import parse, sample_story

log = logging.getLogger(__name__)

Script = dict[int, str]  # prompts by the chunk at which each starts; the first at 0


class Source(Protocol):
    def script(self, chunks: int, random: torch.Generator, switch: int | None = None) -> Script:
        """Draw a script of so many chunks; switch: the chunk at which a second prompt starts, where there is a choice."""
        ...


class Stories:
    """The narrative world's stories: their switches come where the story has them, entities leave and return."""

    def script(self, chunks: int, random: torch.Generator, switch: int | None = None) -> Script:
        seed = int(torch.randint(2**31, (), generator=random))
        story = sample_story(np.random.default_rng([seed, 4000]), chunks * FRAMES_PER_CHUNK / FPS)
        if switch is None:
            return {start: prompt for prompt, start in story}
        told = [prompt for prompt, _ in story]
        return {0: told[0], **({switch: told[1 % len(told)]} if switch < chunks else {})}


class PromptFile:
    """Prompts of a file, or several: a line is skipped with its number if it is blank or damaged, and counted."""

    def __init__(self, path: Path, follow: Path | None = None):
        lines = _lines(path)
        if path.suffix == ".jsonl":
            if follow is not None:
                raise InputError(f"{path} tells its own follow-ups; leave {follow} out")
            found = [_told(line, path, number) for number, line in enumerate(lines, 1)]
        elif follow is not None:
            after = _lines(follow)
            if len(after) != len(lines):
                raise InputError(f"{follow} has {len(after)} lines, {path} {len(lines)}; line i must follow line i")
            found = [[first, second] if first and second else None for first, second in zip(lines, after)]
        else:
            found = [[line] if line else None for line in lines]
        self.told = [prompts for prompts in found if prompts]
        self.skipped = len(found) - len(self.told)
        if self.skipped:
            log.warning("%s: %d of %d lines were skipped", path, self.skipped, len(found))
        if not self.told:
            raise InputError(f"{path} holds no prompt; expected one per line")

    def script(self, chunks: int, random: torch.Generator, switch: int | None = None) -> Script:
        told = self.told[int(torch.randint(len(self.told), (), generator=random))]
        if switch is None or switch >= chunks or len(told) == 1:
            return {0: told[0]}
        return {0: told[0], switch: told[1]}


def open_source(name: str, follow: str | None = None) -> Source:
    """Open a source by what a recipe calls it: "world" or the path of a prompt file."""
    if name == "world":
        return Stories()
    return PromptFile(Path(name), None if follow is None else Path(follow))


def together(scripts: Sequence[Script]) -> dict[int, list[str]]:
    """Tell several streams at once: at every chunk where one of them changes, the prompts of all."""

    def at(script: Mapping[int, str], chunk: int) -> str:
        return script[max(start for start in script if start <= chunk)]

    return {chunk: [at(script, chunk) for script in scripts] for chunk in sorted(set().union(*scripts))}


def reminder(prompts: Sequence[str], chunk: int, seen: int, lasts: int = 2) -> int | None:
    """The last chunk that showed somebody who returned with `chunk` or at most lasts - 1 chunks before it, for who comes
    in from the side shows in the second: the `seen` chunks before the return do not name them. None where nobody did.
    Prompts of the narrative world, one per chunk."""
    cast = [{role.identity for role in parse(prompt).roles} for prompt in prompts[: chunk + 1]]
    for start in range(chunk, max(-1, chunk - lasts), -1):
        gap = max(0, start - seen)
        back = set.intersection(*cast[start:]) - set().union(*cast[gap:start])
        found = next((k for k in range(gap - 1, -1, -1) if cast[k] & back), None)
        if found is not None:
            return found
    return None


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError.from_os("read", path, error) from None
    return [line.strip() for line in text.splitlines()]


def _told(line: str, path: Path, number: int) -> list[str] | None:
    try:
        prompts = json.loads(line)["prompts"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s line %d has no list of prompts; skipped", path, number)
        return None
    good = isinstance(prompts, list) and prompts and all(isinstance(p, str) and p.strip() for p in prompts)
    return [" ".join(p.split()) for p in prompts] if good else None
