"""The one exception for what a person can put right, always a single line.

It knows nothing of files, scripts or models: whoever finds the mistake words it.
"""

from __future__ import annotations

import difflib
import errno
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

_OS_REASONS = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EFBIG: "the file grows larger than the system allows; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EACCES: "permission denied; choose a place you may use",
    errno.EPERM: "not permitted; choose a place you may use",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "it is a folder, a file was expected",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "too many symbolic links",
    errno.EMFILE: "too many open files",
}


class InputError(ValueError):
    """A mistake in what was given, said in one line: what was given, what was expected, what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))

    @classmethod
    def from_os(cls, action: str, path: str | Path, error: OSError) -> InputError:
        """Say `cannot <action> <path>: <reason>` for an error of the operating system."""
        reason = _OS_REASONS.get(error.errno or 0) or error.strerror or str(error) or type(error).__name__
        return cls(f"cannot {action} {shorten(path, 200)}: {reason}")


def shorten(value: object, limit: int = 40) -> str:
    """Write a value in at most `limit` printable characters, so that no input floods a message."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, (list, tuple, dict, set)):
        text = f"{type(value).__name__} of {len(value)}"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        text = "a number of more than 60 digits"  # Python refuses to print very long integers
    else:
        text = value[: limit + 1] if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word that `word` most resembles, or None if none is close."""
    if not isinstance(word, str):
        return None
    found = difflib.get_close_matches(word[:80].lower(), list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown(what: str, word: object, known: Iterable[str]) -> str:
    """Word the complaint about an unknown name: `unknown option 'stpes'; did you mean 'steps'?`"""
    known = list(known)
    near = nearest(word, known)
    hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} '{shorten(word)}'; {hint}"


def need_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise InputError(f"{purpose} needs {error.name}: pip install 'slotmemory[{extra}]'") from None
