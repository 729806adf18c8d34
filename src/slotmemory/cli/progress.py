"""Show how far a stream is: a bar on a terminal, a line now and then elsewhere. On stderr; results go to stdout."""

from __future__ import annotations

import time
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from slotmemory.script import Schedule

QUIET_SECONDS = 10.0  # between plain lines
S = TypeVar("S", bound="Shown")


class Shown:
    """A line of text about how much of a whole is done: under a bar on a terminal, by itself now and then elsewhere."""

    def __init__(
        self, total: float, done: float, waiting: str, quiet: float = QUIET_SECONDS, console: Console | None = None
    ) -> None:
        """waiting: the bar's line until there is another; quiet: seconds between plain lines."""
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.told = time.monotonic()
        self.bar: Bar | None = None
        if self.console.is_terminal:
            line = Column(no_wrap=True, overflow="ellipsis")
            columns = (BarColumn(bar_width=30), TextColumn("{task.description}", table_column=line))
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task(waiting, total=total, completed=done)

    def __enter__(self: S) -> S:
        if self.bar is not None:
            self.bar.start()
        self.told = time.monotonic()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def tell(self, done: float, line: str, aside: str = "", at_once: bool = False) -> None:
        """aside: what only the bar has room for."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, completed=done, description=f"{line}{aside}")
        elif at_once or now - self.told >= self.quiet:
            self.told = now
            self.console.print(line, highlight=False, soft_wrap=True)


class Progress(Shown):
    """Reports chunk, shot, frames per second and time left; `pace` is the frames per second of this process."""

    def __init__(self, schedule: Schedule, done: int, console: Console | None = None) -> None:
        super().__init__(schedule.chunks, done, "the first chunk is being made ...", console=console)
        self.schedule, self.done, self.first = schedule, done, done
        self.frames = 0
        self.pace: float | None = None
        self.started = time.monotonic()

    def __enter__(self) -> Progress:
        self.started = time.monotonic()
        return super().__enter__()

    def chunk(self, shot: int, frames: int) -> None:
        """Count one more chunk."""
        self.done += 1
        self.frames += frames
        self.pace = self.frames / max(time.monotonic() - self.started, 1e-6)
        ends = self.done in (self.first + 1, self.schedule.chunks)
        self.tell(self.done, self.line(shot), f"  [dim]{escape(self.schedule.script.shots[shot].prompt)}", ends)

    def line(self, shot: int) -> str:
        left = (self.schedule.frames - self.schedule.layout.chunk_frames(self.done).start) / self.pace
        return (
            f"chunk {self.done}/{self.schedule.chunks}  shot {shot + 1}/{len(self.schedule.script.shots)}  "
            f"{self.pace:.1f} frames/s  {clock(left)} left"
        )


def clock(seconds: float) -> str:
    """Write a duration as people do: 0:42, 12:05, 1:02:30."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
