"""Shots in order, and the chunks in which each shot is shown.

Pure data: it knows sizes only through Layout, and no form in which a script is written but the YAML of `to_yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from slotmemory.errors import InputError, shorten
from slotmemory.layout import Layout
from slotmemory.script import values


@dataclass(frozen=True)
class Shot:
    """One prompt and how long it is shown; white space in the prompt is normalised. place: where the prompt was written, as
    file:line, for messages."""

    prompt: str
    seconds: float
    place: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        with values.at("prompt"):
            object.__setattr__(self, "prompt", values.text(self.prompt, values.MAX_PROMPT, "a prompt"))
        with values.at("seconds"):
            object.__setattr__(self, "seconds", values.duration(self.seconds))


@dataclass(frozen=True)
class Script:
    """Shots in order; options are what the command line would set (see OPTIONS), and it overrides them."""

    shots: tuple[Shot, ...]
    seed: int | None = None
    title: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shots", tuple(self.shots))
        for number, shot in enumerate(self.shots, 1):
            if not isinstance(shot, Shot):
                raise InputError(f"shot {number}: expected a Shot, got {shorten(shot)}")
        values.check_shots(len(self.shots), self.seconds)
        with values.at("seed"):
            object.__setattr__(self, "seed", None if self.seed is None else values.seed(self.seed))
        with values.at("title"):
            object.__setattr__(
                self, "title", None if self.title is None else values.text(self.title, values.MAX_TITLE, "a title")
            )
        with values.at("options"):
            if not isinstance(self.options, Mapping):
                raise InputError(f"expected names with values, got {shorten(self.options)}")
            options = {name: values.option(name, value) for name, value in self.options.items()}
            object.__setattr__(self, "options", options)

    @property
    def seconds(self) -> float:
        return math.fsum(shot.seconds for shot in self.shots)

    def schedule(self, layout: Layout) -> Schedule:
        return Schedule.resolve(self, layout)

    def place_of(self, number: int) -> str:
        """Name the prompt of a shot (from 0), for messages: with the line it was written on, if it was read from a file."""
        place = self.shots[number].place
        return f"{place}: shots[{number + 1}].prompt" if place else f"shots[{number + 1}].prompt"

    def to_yaml(self) -> str:
        """Write the script so that `load_script` gives it back unchanged."""
        tree: dict[str, Any] = {}
        if self.title is not None:
            tree["title"] = self.title
        if self.seed is not None:
            tree["seed"] = self.seed
        if self.options:
            tree["options"] = dict(self.options)
        tree["shots"] = [{"prompt": shot.prompt, "seconds": _plain(shot.seconds)} for shot in self.shots]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)


def _plain(seconds: float) -> int | float:
    return int(seconds) if seconds == int(seconds) else seconds


# schedule


@dataclass(frozen=True)
class Switch:
    """One change of prompt: when it was asked for and the chunk that it waits for."""

    shot: int
    chunk: int
    requested_seconds: float
    applied_seconds: float
    requested_latent: float
    applied_latent: int


@dataclass(frozen=True)
class Schedule:
    """The shot of every chunk. A switch applies at the next chunk start, as in LongLive's inference."""

    script: Script
    layout: Layout
    shots: tuple[int, ...]  # per chunk, the number of its shot, from 0
    switches: tuple[Switch, ...]

    @classmethod
    def resolve(cls, script: Script, layout: Layout) -> Schedule:
        """Place the script's shots on chunks. Raises InputError for a shot too short to get one."""
        chunks = layout.chunks(script.seconds)
        switches, starts, elapsed = [], [0], []
        for number, shot in enumerate(script.shots[:-1], 1):
            elapsed.append(shot.seconds)
            seconds = math.fsum(elapsed)
            chunk = layout.chunk_from(seconds)
            starts.append(chunk)
            switches.append(
                Switch(
                    shot=number,
                    chunk=chunk,
                    requested_seconds=seconds,
                    applied_seconds=layout.chunk_start(chunk),
                    requested_latent=layout.latents_at(seconds),
                    applied_latent=layout.chunk_latents(chunk).start,
                )
            )
        ends = [*starts[1:], chunks]
        for number, (start, end) in enumerate(zip(starts, ends)):
            if start >= end:
                least = layout.frames_per_chunk / layout.latents_per_second
                raise InputError(
                    f"shots[{number + 1}].seconds: {script.shots[number].seconds:g} s is too short, no chunk starts in "
                    f"it; give it at least {least:g} s, the length of a chunk"
                )
        shots = tuple(shot for shot, (start, end) in enumerate(zip(starts, ends)) for _ in range(start, end))
        return cls(script, layout, shots, tuple(switches))

    @property
    def chunks(self) -> int:
        return len(self.shots)

    @property
    def latents(self) -> int:
        return self.chunks * self.layout.frames_per_chunk

    @property
    def frames(self) -> int:
        return self.layout.frames(self.latents)

    @property
    def seconds(self) -> float:
        return self.layout.seconds(self.chunks)

    def shot_at(self, chunk: int) -> int:
        """Number of the shot of a chunk, from 0."""
        return self.shots[chunk]

    def prompt_at(self, chunk: int) -> str:
        return self.script.shots[self.shots[chunk]].prompt

    def switched(self, chunk: int) -> bool:
        """Whether a chunk is the first of a new shot; the first chunk of all is not a switch."""
        return chunk > 0 and self.shots[chunk] != self.shots[chunk - 1]

    def chunks_of(self, shot: int) -> range:
        first = self.shots.index(shot)
        return range(first, first + self.shots.count(shot))

    def rows(self) -> list[dict[str, Any]]:
        """One row per shot, for a table: shot and chunk numbers as people count shots, from 1, chunks from 0."""
        rows = []
        for number, shot in enumerate(self.script.shots):
            chunks = self.chunks_of(number)
            start, stop = self.layout.chunk_frames(chunks.start).start, self.layout.chunk_frames(chunks.stop - 1).stop
            switch = self.switches[number - 1] if number else None
            rows.append(
                {
                    "shot": number + 1,
                    "prompt": shot.prompt,
                    "requested_seconds": switch.requested_seconds if switch else 0.0,
                    "applied_seconds": switch.applied_seconds if switch else 0.0,
                    "requested_latent": switch.requested_latent if switch else 0.0,
                    "applied_latent": switch.applied_latent if switch else 0,
                    "first_chunk": chunks.start,
                    "last_chunk": chunks.stop - 1,
                    "chunks": len(chunks),
                    "frames": stop - start,
                    "seconds": (stop - start) / self.layout.fps,
                    "tokens": len(chunks) * self.layout.tokens_per_chunk,
                }
            )
        return rows
