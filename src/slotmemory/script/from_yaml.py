"""A script from YAML: shots with prompt and seconds, or a title, a seed and options beside them.

What is wrong is told with its line. Anchors and aliases are not read, and entries and depth are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from slotmemory.errors import InputError, shorten, unknown
from slotmemory.script import values
from slotmemory.script.shots import Script, Shot

SCRIPT_KEYS = ("title", "seed", "options", "shots")
SHOT_KEYS = ("prompt", "seconds")

_MAX_NODES = 8 * values.MAX_SHOTS
_MAX_DEPTH = 8


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
            raise _Refused(line, f"too many entries; a script has at most {values.MAX_SHOTS} shots")
        if self.depth > _MAX_DEPTH:
            raise _Refused(line, "lists inside lists too deep; expected a list of shots with prompt and seconds")
        if isinstance(parent, yaml.SequenceNode) and index >= values.MAX_SHOTS:
            raise _Refused(line, f"more than {values.MAX_SHOTS} shots, the most that a script may have; split it")
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
                title = values.text(self.scalar(keys["title"]), values.MAX_TITLE, "a title")
        if "seed" in keys:
            with self.at(keys["seed"], "seed"):
                seed = values.seed(self.scalar(keys["seed"]))
        options = {}
        if "options" in keys:
            for key, value in self.mapping(keys["options"], "options", tuple(values.OPTIONS), "option").items():
                with self.at(value, "options"):
                    options[key] = values.option(key, self.scalar(value))
        shots = self.shots(keys["shots"])
        with self.at(keys["shots"], "shots"):
            values.check_shots(len(shots), math.fsum(shot.seconds for shot in shots))
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
                prompt = values.text(self.scalar(keys["prompt"]), values.MAX_PROMPT, "a prompt")
            with self.at(keys["seconds"], f"{where}.seconds"):
                seconds = values.duration(self.scalar(keys["seconds"]))
            shots.append(Shot(prompt, seconds, f"{self.name}:{_line(keys['prompt'])}"))
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
        with values.at(f"{self.name}:{_line(node)}" + (f": {where}" if where else "")):
            yield


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
