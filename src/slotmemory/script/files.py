"""Scripts from files, by how a file's name ends."""

from __future__ import annotations

from pathlib import Path

from slotmemory.errors import InputError, shorten
from slotmemory.script import values
from slotmemory.script.from_lines import parse_lines
from slotmemory.script.from_yaml import parse_yaml
from slotmemory.script.shots import Script

MAX_BYTES = {".yaml": 1 << 20, ".yml": 1 << 20, ".jsonl": 16 << 20}


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
        return parse_lines(text, _name(path))
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
            f"{name} is larger than {limit >> 20} MB; a script has at most {values.MAX_SHOTS} shots, "
            f"a prompt at most {values.MAX_PROMPT} characters"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{name}:{line}: expected text in UTF-8, got the byte 0x{data[error.start]:02x}") from error
