"""Scripts: what to show, as shots in order, and the chunks in which each shot is shown.

Pure data plus parsing of YAML and of the JSON Lines that LongLive and MemFlow use. It knows sizes only through
Layout, and neither models nor vocabularies: any text is a prompt here.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError, shorten, unknown
from .layout import Layout

MAX_PROMPT = 4096  # characters
MAX_TITLE = 200
MAX_SHOTS = 1000
MAX_SECONDS = 4 * 60 * 60
MAX_SEED = 2**63 - 1
MAX_BYTES = {".yaml": 1 << 20, ".yml": 1 << 20, ".jsonl": 16 << 20}

SCRIPT_KEYS = ("title", "seed", "options", "shots")
SHOT_KEYS = ("prompt", "seconds")
LINE_KEYS = ("prompts", "switch_frame_indices", "seconds", "title", "seed", "options")
OPTIONS = {
    "model": "a name or a folder",
    "memory": "a name or a file",
    "budget": "a whole number of tokens of at least 0",
    "steps": "a whole number of at least 1",
    "width": "a whole number of pixels of at least 1",
    "height": "a whole number of pixels of at least 1",
}

# A line of JSON Lines carries no durations: LongLive and MemFlow show each prompt for 10 s.
LINE_SECONDS = 10
# switch_frame_indices count latent frames of Wan's 16 frames/s, 4 frames each.
LINE_LATENTS_PER_SECOND = 4

_MAX_NODES = 8 * MAX_SHOTS
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Shot:
    """One prompt and how long it is shown; white space in the prompt is normalised."""

    prompt: str
    seconds: float

    def __post_init__(self) -> None:
        with _at("prompt"):
            object.__setattr__(self, "prompt", _text(self.prompt, MAX_PROMPT, "a prompt"))
        with _at("seconds"):
            object.__setattr__(self, "seconds", _duration(self.seconds))


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
        _check_shots(len(self.shots), self.seconds)
        with _at("seed"):
            object.__setattr__(self, "seed", None if self.seed is None else _seed(self.seed))
        with _at("title"):
            object.__setattr__(self, "title", None if self.title is None else _text(self.title, MAX_TITLE, "a title"))
        with _at("options"):
            if not isinstance(self.options, Mapping):
                raise InputError(f"expected names with values, got {shorten(self.options)}")
            options = {name: _option(name, value) for name, value in self.options.items()}
            object.__setattr__(self, "options", options)

    @property
    def seconds(self) -> float:
        return math.fsum(shot.seconds for shot in self.shots)

    def schedule(self, layout: Layout) -> Schedule:
        return Schedule.resolve(self, layout)

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


# files


def load_script(path: str | Path, line: int | None = None) -> Script:
    """Read one script; `line` chooses one of a .jsonl file that holds several, counted from 1."""
    scripts = _read(Path(path))
    if line is None:
        if len(scripts) > 1:
            lines = list(scripts)
            raise InputError(f"{_name(path)} holds {len(scripts)} scripts; choose a line, {lines[0]} to {lines[-1]}")
        return next(iter(scripts.values()))
    if line not in scripts:
        lines = list(scripts)
        raise InputError(f"{_name(path)} has no script on line {shorten(line)}; lines {lines[0]} to {lines[-1]} have")
    return scripts[line]


def load_scripts(path: str | Path) -> list[Script]:
    """Read every script of a file: one of a .yaml file, one per line of a .jsonl file."""
    return list(_read(Path(path)).values())


def _read(path: Path) -> dict[int, Script]:
    """Scripts by line number."""
    text = _read_text(path)
    if path.suffix.lower() == ".jsonl":
        return _parse_lines(text, _name(path))
    return {1: parse_yaml(text, _name(path))}


def _name(path: str | Path) -> str:
    return shorten(str(path), 120)


def _read_text(path: Path) -> str:
    name = _name(path)
    suffix = path.suffix.lower()
    limit = MAX_BYTES.get(suffix, max(MAX_BYTES.values()))
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InputError.from_os("read the script", path, error) from error
    except ValueError as error:  # a NUL character in the path
        raise InputError(f"cannot read the script {name}: {error}") from error
    if b"\0" in data[:8192]:
        raise InputError(f"{name} is a binary file; expected a script as text that ends in .yaml, .yml or .jsonl")
    if suffix not in MAX_BYTES:
        raise InputError(f"{name} ends in '{shorten(suffix)}'; expected a script that ends in .yaml, .yml or .jsonl")
    if len(data) > limit:
        raise InputError(
            f"{name} is larger than {limit >> 20} MB; a script has at most {MAX_SHOTS} shots, "
            f"a prompt at most {MAX_PROMPT} characters"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: expected text in UTF-8, got the byte 0x{data[error.start]:02x}") from error


# YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader without anchors and aliases, bounded in nodes and in depth."""

    nodes = 0
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        line = event.start_mark.line + 1
        if getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise _Refused(line, f"anchors and aliases ('{sign}{shorten(event.anchor)}') are not read; write it out")
        self.nodes += 1
        self.depth += 1
        if self.nodes > _MAX_NODES:
            raise _Refused(line, f"too many entries; a script has at most {MAX_SHOTS} shots")
        if self.depth > _MAX_DEPTH:
            raise _Refused(line, "lists inside lists too deep; expected a list of shots with prompt and seconds")
        if isinstance(parent, yaml.SequenceNode) and index >= MAX_SHOTS:
            raise _Refused(line, f"more than {MAX_SHOTS} shots, the most that a script may have; split it")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Refused(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def parse_yaml(text: str, name: str = "script") -> Script:
    """Read a script from YAML text; `name` stands for the file in messages."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise InputError(f"{name} is empty; expected shots, each with prompt and seconds")
        return _Yaml(loader, name).script(node)
    except _Refused as error:
        raise InputError(f"{name}:{error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = shorten(error.problem or error.context or "", 120)
        raise InputError(f"{name}:{line}: not valid YAML: {problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{name}:{line}: the character U+{int(error.character):04X} is not allowed") from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        # PyYAML's scanner lets others out, such as the OverflowError of an escape beyond Unicode.
        line = loader.line + 1 if loader else 1
        raise InputError(f"{name}:{line}: not valid YAML: {shorten(str(error), 120)}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Yaml:
    """Turns YAML nodes into a script, with the line of whatever is wrong."""

    def __init__(self, loader: _Loader, name: str) -> None:
        self.loader = loader
        self.name = name

    def script(self, node: yaml.Node) -> Script:
        keys = {"shots": node} if isinstance(node, yaml.SequenceNode) else self.mapping(node, "", SCRIPT_KEYS, "key")
        if "shots" not in keys:
            raise InputError(f"{self.name}:{_line(node)}: 'shots' is missing; expected a list of prompt and seconds")
        title = seed = None
        if "title" in keys:
            with self.at(keys["title"], "title"):
                title = _text(self.scalar(keys["title"]), MAX_TITLE, "a title")
        if "seed" in keys:
            with self.at(keys["seed"], "seed"):
                seed = _seed(self.scalar(keys["seed"]))
        options = {}
        if "options" in keys:
            for key, value in self.mapping(keys["options"], "options", tuple(OPTIONS), "option").items():
                with self.at(value, "options"):
                    options[key] = _option(key, self.scalar(value))
        shots = self.shots(keys["shots"])
        with self.at(keys["shots"], "shots"):
            _check_shots(len(shots), math.fsum(shot.seconds for shot in shots))
        return Script(shots, seed=seed, title=title, options=options)

    def shots(self, node: yaml.Node) -> tuple[Shot, ...]:
        if not isinstance(node, yaml.SequenceNode):
            with self.at(node, "shots"):
                raise InputError(f"expected a list of shots, each with prompt and seconds, got {self.kind(node)}")
        shots = []
        for number, item in enumerate(node.value, 1):
            where = f"shots[{number}]"
            keys = self.mapping(item, where, SHOT_KEYS, "key")
            for key in SHOT_KEYS:
                if key not in keys:
                    example = 'prompt: "A red cat walks in the meadow."' if key == "prompt" else "seconds: 10"
                    with self.at(item, where):
                        raise InputError(f"'{key}' is missing; write for example {example}")
            with self.at(keys["prompt"], f"{where}.prompt"):
                prompt = _text(self.scalar(keys["prompt"]), MAX_PROMPT, "a prompt")
            with self.at(keys["seconds"], f"{where}.seconds"):
                seconds = _duration(self.scalar(keys["seconds"]))
            shots.append(Shot(prompt, seconds))
        return tuple(shots)

    def mapping(self, node: yaml.Node, where: str, known: tuple[str, ...], what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            with self.at(node, where):
                raise InputError(f"expected names with values ({', '.join(known)}), got {self.kind(node)}")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else self.kind(key_node)
            with self.at(key_node, where):
                if key not in known:
                    raise InputError(unknown(what, key, known))
                if key in found:
                    raise InputError(f"'{key}' is given twice, first on line {_line(found[key])}; keep one")
            found[key] = value
        return found

    def scalar(self, node: yaml.Node) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            raise InputError(f"expected a single value, got {self.kind(node)}")
        try:
            return self.loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, OverflowError):
            # YAML 1.1 takes 2001-99-99 for a date, 0b for a number and so on: what is not one is text.
            return node.value

    def kind(self, node: yaml.Node) -> str:
        if isinstance(node, yaml.SequenceNode):
            return f"a list of {len(node.value)}"
        if isinstance(node, yaml.MappingNode):
            return f"names with values ({shorten(', '.join(str(k.value) for k, _ in node.value[:5]))})"
        return f"'{shorten(node.value)}'" if node.value else "nothing"

    @contextmanager
    def at(self, node: yaml.Node, where: str) -> Iterator[None]:
        with _at(f"{self.name}:{_line(node)}" + (f": {where}" if where else "")):
            yield


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


# JSON Lines


def _parse_lines(text: str, name: str) -> dict[int, Script]:
    scripts = {}
    # split on line feeds only: str.splitlines would also split inside strings, at U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            with _at(f"{name}:{number}"):
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
    _check_shots(len(prompts), 0)
    with _at("seconds"):
        seconds = _duration(tree.get("seconds", LINE_SECONDS))
    durations = [seconds] * len(prompts)
    if tree.get("switch_frame_indices") is not None:
        with _at("switch_frame_indices"):
            durations = _durations(tree["switch_frame_indices"], len(prompts), seconds)
    shots = []
    for number, (prompt, duration) in enumerate(zip(prompts, durations), 1):
        with _at(f"prompts[{number}]"):
            shots.append(Shot(_text(prompt, MAX_PROMPT, "a prompt"), duration))
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
    most = MAX_SECONDS * LINE_LATENTS_PER_SECOND
    if edges[-1] > most:
        raise InputError(f"{shorten(edges[-1])} is beyond latent frame {most}, {MAX_SECONDS // 3600} hours")
    return [(after - before) / LINE_LATENTS_PER_SECOND for before, after in zip(edges, indices)] + [last]


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"'{shorten(key)}' is given twice; keep one")
        found[key] = value
    return found


# single values


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Put the place in front of whatever is complained about inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _text(value: Any, limit: int, what: str) -> str:
    if not isinstance(value, str):
        if value is None:
            raise InputError(f"expected {what} in words, got nothing")
        raise InputError(f"expected {what} in words, got {shorten(value)}; put it in quotes if that is the text")
    if len(value) > limit:
        raise InputError(f"{len(value)} characters; {what} has at most {limit}")
    text = " ".join(value.split())
    if not text:
        raise InputError(f"expected {what} in words, got only white space" if value else f"expected {what}, got ''")
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise InputError(f"the character U+{ord(character):04X} is not text")
    return text


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?\.?(inf|infinity|nan)", re.IGNORECASE | re.ASCII)


def _duration(value: Any) -> float:
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value.strip()):
        value = float(value.strip().lower().replace(".inf", "inf").replace(".nan", "nan"))  # YAML 1.1 reads 1e3 as text
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"expected a number of seconds such as 10, got {_quoted(value)}")
    if not value > 0:  # nan included
        raise InputError(f"expected more than 0 seconds, got {shorten(value)}")
    if value > MAX_SECONDS:
        raise InputError(f"expected at most {MAX_SECONDS} seconds (4 hours), got {shorten(value)}")
    return float(value)


def _seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise InputError(f"expected a whole number from 0 to 2^63 - 1, got {_quoted(value)}")
    return value


def _option(name: Any, value: Any) -> Any:
    if name not in OPTIONS:
        raise InputError(unknown("option", name, OPTIONS))
    if name in ("model", "memory"):
        with _at(name):
            return _text(value, MAX_TITLE, OPTIONS[name])
    least = 0 if name == "budget" else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**31:
        raise InputError(f"{name}: expected {OPTIONS[name]}, got {_quoted(value)}")
    return value


def _check_shots(count: int, seconds: float) -> None:
    if count == 0:
        raise InputError("no shots; expected at least one, with prompt and seconds")
    if count > MAX_SHOTS:
        raise InputError(f"{count} shots; a script has at most {MAX_SHOTS}, split it")
    if seconds > MAX_SECONDS:
        raise InputError(f"{seconds:g} s in all; a script lasts at most {MAX_SECONDS} s (4 hours), shorten or split it")


def _quoted(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"'{shorten(value)}'" if isinstance(value, str) else shorten(value)


def _plain(seconds: float) -> int | float:
    return int(seconds) if seconds == int(seconds) else seconds
