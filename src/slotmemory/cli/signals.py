"""Ctrl-C and termination as one exception that never tears a piece of work in two.

A signal raises `Stopped` at once, or at the end of `held()` when it comes inside. Knows nothing of what is stopped.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """The user or the system asked to stop; `message` tells what was kept, in one line."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.message = "stopped before anything was made"


_depth = 0  # of nested `held()` blocks; signals belong to the process, so does this
_waiting: int | None = None


class Signals:
    """While open, SIGINT, SIGTERM and SIGHUP raise `Stopped`; those that the parent had ignored stay ignored."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        global _depth, _waiting
        if threading.current_thread() is threading.main_thread():
            _depth, _waiting = 0, None
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, _ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, action in self._before.items():
            signal.signal(number, action)


def _ask(number: int, _: Any) -> None:
    global _waiting
    if _depth:
        _waiting = number
    else:
        raise Stopped(number)


@contextmanager
def held() -> Iterator[None]:
    """Let a signal wait until this block is done."""
    global _depth, _waiting
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if not _depth and _waiting is not None:
        number, _waiting = _waiting, None
        raise Stopped(number)
