"""How much disk a run will take: video, filmstrip, timeline, trace and saved state.

How large pictures get depends on what they show. Without a trial (`trial.py`) they are taken to be like those of the
embedded model, which is a guess for any other; with one they are like the script's own. Frames are counted enlarged.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from slotmemory.cli.measures import size
from slotmemory.cli.stream import MAX_PICTURED, PER_SHOT
from slotmemory.cli.trial import Trial
from slotmemory.errors import InputError, shorten
from slotmemory.footprint import Footprint
from slotmemory.layout import Layout
from slotmemory.script import Schedule

VIDEO, PICTURE = 0.06, 0.88  # bytes per pixel of video and of PNG, measured on the embedded model (docs/performance.md)
CALMER = 4  # a video that shows less may be so many times smaller than that
STRIP, THUMBNAIL = 400, 200  # pixels across of frames on filmstrip and timeline
THUMBNAILS = 1600  # pixels across that all frames on a timeline share
GRAPHICS, BARS = 52_000, 400  # bytes of a timeline without frames, and more for each chunk
RECORD, ITEM = 220, 97  # bytes of a chunk's record in the trace without its prompt, and of an item in it
TEXTS = 1500  # bytes of script, recipe and status
TOKENS_PER_WORD = 1.5  # of a text encoder's embeddings that are kept


@dataclass(frozen=True)
class Disk:
    """Bytes of a finished run by part; `beside`: of the last state, which is there until the next one is whole."""

    parts: dict[str, int]
    beside: int = 0
    measured: bool = False  # whether pictures are those of a trial

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def least(self) -> int:
        """Bytes below which the run cannot end, however calm its pictures are."""
        pictures = 0 if self.measured else self.parts["video"] + self.parts["pictures"]
        return self.total + self.beside - pictures + pictures // CALMER

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(count)}" for name, count in self.parts.items() if count)
        beside = f"; {size(self.beside)} more while a state is replaced" if self.beside else ""
        source = "measured in a trial" if self.measured else "as the embedded model's, --trial measures them"
        return f"about {size(self.total)} ({parts}{beside}; pictures {source})"


def forecast_disk(
    layout: Layout,
    schedule: Schedule,
    footprint: Footprint,
    scale: int,
    save_every: int,
    embeddings: int = 0,
    trial: Trial | None = None,
) -> Disk:
    """Forecast a run's files. embeddings: bytes of a text encoder's results, which are kept beside the runs."""
    shots, chunks = len(schedule.script.shots), schedule.chunks
    drawn = min(shots, MAX_PICTURED)
    tall = layout.height / layout.width
    strip = drawn * PER_SHOT * STRIP * round(STRIP * tall)
    if trial is not None:
        video, filmstrip, trace = trial.video, trial.filmstrip, trial.trace
        state = footprint.state if trial.state is None else trial.state
    else:
        video = round(VIDEO * schedule.frames * layout.width * layout.height * scale**2)
        filmstrip, trace, state = round(PICTURE * strip), _trace(layout, schedule, footprint.tokens), footprint.state
    across = min(THUMBNAIL, THUMBNAILS // drawn)
    timeline = GRAPHICS + BARS * min(chunks, 200) + round(filmstrip / strip * drawn * across**2 * tall)
    parts = {"video": video, "state": state, "pictures": filmstrip + timeline, "trace": trace + TEXTS}
    return Disk(parts | {"embeddings": embeddings}, state if chunks > save_every else 0, trial is not None)


def _trace(layout: Layout, schedule: Schedule, tokens: int) -> int:
    """Bytes of a trace whose items are latent frames."""
    total = 0
    for shot, told in enumerate(schedule.script.shots):
        for chunk in schedule.chunks_of(shot):
            held = min(tokens, (chunk + 1) * layout.tokens_per_chunk)
            total += RECORD + len(told.prompt.encode()) + ITEM * -(-held // layout.tokens_per_frame)
    return total


def free_disk(folder: Path) -> int | None:
    """Bytes free where a folder is or will be; None where the system tells no size, as of /proc."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else None


def refuse_disk(found: Disk, folder: Path, scale: int) -> None:
    """Raise InputError for a run whose folder cannot hold it, with what would make it fit."""
    there = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    needed, free = found.least - there, free_disk(folder)
    if free is None or needed <= free:
        return
    parts = ", ".join(f"{name} {size(count)}" for name, count in found.parts.items() if count)
    raise InputError(
        f"this job needs at least {size(needed)} of disk and {size(free)} are free at {shorten(folder, 100)} ({parts}); "
        f"{advice(found, scale, free + there)}"
    )


def advice(found: Disk, scale: int, free: int) -> str:
    """What would make a run fit into so many bytes, the mildest first."""
    video, many, ways = found.parts["video"], found.least - free, []
    sure = video if found.measured else video // CALMER  # how much of it counts in `least`
    fitting = [smaller for smaller in range(1, scale) if sure * (1 - (smaller / scale) ** 2) >= many]
    if fitting:
        ways.append(f"--scale {fitting[-1]} would fit")
    elif video > found.parts["state"]:
        ways.append("make fewer seconds")
    else:
        ways.append("a memory with a smaller --budget makes a smaller state")
    return ", ".join([*ways, f"or --out on a disk with {size(found.total + found.beside)} free"])
