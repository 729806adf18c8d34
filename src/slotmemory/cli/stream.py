"""Run a session to its end into a run folder, so that whatever stops it, what was made is kept and can be gone on with.

Frames, record and snapshot of a chunk are written as one: a signal waits for all three. Knows no options, no models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotmemory.cli.progress import Progress
from slotmemory.cli.signals import Stopped, held
from slotmemory.errors import InputError, shorten
from slotmemory.pictures import caption, filmstrip, timeline
from slotmemory.run import Run
from slotmemory.script import Schedule
from slotmemory.session import Session
from slotmemory.video import read_video

if TYPE_CHECKING:
    from slotmemory.cli.prepare import Prepared

MAX_PICTURED = 24  # shots on a filmstrip
PER_SHOT = 3  # frames of each


def stream(run: Run, prepared: Prepared, resume: bool = False) -> None:
    """Make what is missing of a run; at the end the folder is complete."""
    with lock(run.folder):
        if resume:
            _rewind(run, prepared.session)
        kept = Kept(run, prepared.schedule, prepared.session.snapshot())
        try:
            with run:
                _stream(run, prepared, kept)
        except Stopped as stopped:
            stopped.message = f"stopped; {kept.leave('stopped')}"
            raise
        except InputError as error:
            raise InputError(f"{error}; {kept.leave('failed', str(error))}") from error
        except Exception as error:
            kept.leave("failed", f"{type(error).__name__}: {shorten(str(error), 300)}")
            raise


def _stream(run: Run, prepared: Prepared, kept: Kept) -> None:
    session, schedule, layout = prepared.session, prepared.schedule, prepared.engine.layout
    run.set_status("running", session.index, total=schedule.chunks)
    with run.open_video(layout.fps, layout.width, layout.height, prepared.options.scale) as video:
        with Progress(schedule, session.index) as progress:
            while not session.done:
                chunk = session.step()
                with held():
                    video.write(chunk.frames[0])
                    run.append(chunk.trace)
                    kept.snapshot = session.snapshot()
                    if session.done or session.index % prepared.options.save_every == 0:
                        kept.save()
                progress.chunk(chunk.shot, chunk.frames.shape[1])
    draw(run, schedule)
    pace = {"frames_per_second": round(progress.pace, 2)} if progress.pace else {}
    run.set_status("finished", session.index, total=schedule.chunks, **pace)


class Kept:
    """What of a stream is in its folder: the snapshot after the last chunk whose frames and record were written."""

    def __init__(self, run: Run, schedule: Schedule, snapshot: dict[str, Any]) -> None:
        self.run, self.schedule = run, schedule
        self.snapshot = snapshot
        self.saved = self.chunks  # a stream begins at what was saved before, or at nothing

    @property
    def chunks(self) -> int:
        return self.snapshot["index"]

    def save(self) -> None:
        if self.chunks > self.saved:
            self.run.save_state(self.snapshot, self.chunks)
            self.saved = self.chunks

    def leave(self, status: str, message: str | None = None) -> str:
        """Save what the disk lets be saved, and say what is kept and how to go on.

        Where it does not, the state saved before is whole and the run goes on from there."""
        more = {"total": self.schedule.chunks} | ({"message": message} if message else {})
        with suppress(Stopped), held():  # asked to stop twice: once is enough
            with suppress(InputError):
                self.save()
            with suppress(InputError):
                self.run.set_status(status, self.chunks, **more)
        made = f"{self.chunks} of {self.schedule.chunks} chunks ({self.schedule.layout.seconds(self.chunks):.1f} s of video)"
        return f"{made} are kept in {self.run.folder}; go on with `slotmemory resume {self.run.folder}`"


def _rewind(run: Run, session: Session) -> None:
    """Bring run and session to the last saved state."""
    chunks = run.rewind()
    if chunks:
        try:
            session.restore(run.load_state())
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise InputError(f"{run.state} does not fit this run ({type(error).__name__}); start a new run") from error
        if session.index != chunks:
            raise InputError(f"{run.state} is of chunk {session.index}, expected {chunks}; start a new run")


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second process from writing the same run."""
    try:
        import fcntl
    except ImportError:  # Windows; two writers there are the user's to avoid
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError.from_os("open", folder, error) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is being written by another process; wait for it or stop it") from None
        yield
    finally:
        os.close(handle)


def draw(run: Run, schedule: Schedule) -> None:
    """Draw filmstrip and timeline from the run's video and trace."""
    shots = spread(len(schedule.script.shots), MAX_PICTURED)
    spans = []  # per shot its chunks and its pixel frames
    for shot in shots:
        chunks = schedule.chunks_of(shot)
        first, last = (schedule.layout.chunk_frames(chunk) for chunk in (chunks.start, chunks.stop - 1))
        spans.append((chunks, range(first.start, last.stop)))
    chosen = [[span[(2 * i + 1) * len(span) // (2 * PER_SHOT)] for i in range(PER_SHOT)] for _, span in spans]
    wanted = sorted({frame for frames in chosen for frame in frames})
    images = dict(zip(wanted, read_video(run.video, wanted)))
    fps = schedule.layout.fps
    filmstrip(
        [[images[frame] for frame in frames] for frames in chosen],
        [
            caption(span.start / fps, span.stop / fps, schedule.script.shots[shot].prompt)
            for shot, (_, span) in zip(shots, spans)
        ],
        run.filmstrip,
    )
    middles = {chunks[len(chunks) // 2]: images[frames[PER_SHOT // 2]] for (chunks, _), frames in zip(spans, chosen)}
    timeline(run.records(), run.timeline, middles)


def spread(count: int, most: int) -> list[int]:
    """Numbers below `count`, all or `most` of them evenly spread, the first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
