"""Single values of a script - a prompt, seconds, a seed, an option - whatever form they were written in.

Each check returns the value as it is kept, or raises InputError with what was given and what was expected.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slotmemory.errors import InputError, shorten, unknown

MAX_PROMPT = 4096  # characters
MAX_TITLE = 200
MAX_SHOTS = 1000
MAX_SECONDS = 4 * 60 * 60
MAX_SEED = 2**63 - 1

OPTIONS = {
    "model": "a name or a folder",
    "memory": "a name or a file",
    "budget": "a whole number of tokens of at least 0",
    "steps": "a whole number of at least 1",
    "width": "a whole number of pixels of at least 1",
    "height": "a whole number of pixels of at least 1",
}


@contextmanager
def at(where: str) -> Iterator[None]:
    """Put the place in front of whatever is complained about inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def text(value: Any, limit: int, what: str) -> str:
    """Words with white space normalised, of at most `limit` characters as given; `what` they are, for messages."""
    if not isinstance(value, str):
        if value is None:
            raise InputError(f"expected {what} in words, got nothing")
        raise InputError(f"expected {what} in words, got {shorten(value)}; put it in quotes if that is the text")
    if len(value) > limit:
        raise InputError(f"{len(value)} characters; {what} has at most {limit}")
    words = " ".join(value.split())
    if not words:
        raise InputError(f"expected {what} in words, got only white space" if value else f"expected {what}, got ''")
    for character in words:
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise InputError(f"the character U+{ord(character):04X} is not text")
    return words


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?\.?(inf|infinity|nan)", re.IGNORECASE | re.ASCII)


def duration(value: Any) -> float:
    """Seconds above 0, as a number or as its text."""
    if isinstance(value, str) and len(value) < 40 and _NUMBER.fullmatch(value.strip()):
        value = float(value.strip().lower().replace(".inf", "inf").replace(".nan", "nan"))  # YAML 1.1 reads 1e3 as text
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"expected a number of seconds such as 10, got {quoted(value)}")
    if not value > 0:  # nan included
        raise InputError(f"expected more than 0 seconds, got {shorten(value)}")
    if value > MAX_SECONDS:
        raise InputError(f"expected at most {MAX_SECONDS} seconds (4 hours), got {shorten(value)}")
    return float(value)


def seed(value: Any) -> int:
    """A whole number from 0 to MAX_SEED."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise InputError(f"expected a whole number from 0 to 2^63 - 1, got {quoted(value)}")
    return value


def option(name: Any, value: Any) -> Any:
    """The value of an option that OPTIONS names."""
    if name not in OPTIONS:
        raise InputError(unknown("option", name, OPTIONS))
    if name in ("model", "memory"):
        with at(name):
            return text(value, MAX_TITLE, OPTIONS[name])
    least = 0 if name == "budget" else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**31:
        raise InputError(f"{name}: expected {OPTIONS[name]}, got {quoted(value)}")
    return value


def check_shots(count: int, seconds: float) -> None:
    """Refuse no shots, too many, and too long a script."""
    if count == 0:
        raise InputError("no shots; expected at least one, with prompt and seconds")
    if count > MAX_SHOTS:
        raise InputError(f"{count} shots; a script has at most {MAX_SHOTS}, split it")
    if seconds > MAX_SECONDS:
        raise InputError(f"{seconds:g} s in all; a script lasts at most {MAX_SECONDS} s (4 hours), shorten or split it")


def quoted(value: Any) -> str:
    """A value for a message, text in quotes."""
    if value is None:
        return "nothing"
    return f"'{shorten(value)}'" if isinstance(value, str) else shorten(value)
