"""A little of every shot of a script, made and thrown away: how long a chunk takes and how large a run's files get.

The loaded model makes the first chunk of a shot and one more; what lies between is passed to the memory as more of the
same, so that the second chunk reads a past as the real one does. It knows no forecast made without it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from slotmemory.cli.stream import MAX_PICTURED, PER_SHOT, spread
from slotmemory.pictures import caption, filmstrip
from slotmemory.video import Fragments, read_video

if TYPE_CHECKING:
    from slotmemory.cli.prepare import Prepared

SHOTS = 8  # tried at most, evenly spread
SKIPPED = 24  # chunks at most that are passed to the memory and not made


@dataclass(frozen=True)
class Trial:
    """seconds: per chunk, made and encoded; the others: bytes of a whole run's files. state: None where the script is too
    long to be gone through."""

    seconds: float
    chunks: int  # that `seconds` was measured on
    video: int
    filmstrip: int
    trace: int
    state: int | None


def trial(prepared: Prepared) -> Trial:
    """Try a script. Its seed makes the chunks, so that the first is the run's own."""
    engine, schedule, script = prepared.engine, prepared.schedule, prepared.script
    tried = spread(len(script.shots), SHOTS)
    lengths = [len(schedule.chunks_of(shot)) for shot in tried]
    prompts, index = {}, 0
    for shot, length in zip(tried, lengths):
        prompts[index] = script.shots[shot].prompt
        index += min(length, 2)
    session = engine.session(prompts, prepared.options.seed)
    layout = engine.layout
    video = Fragments(layout.fps, layout.width, layout.height, prepared.options.scale)
    encoded = traced = gone = 0
    begun, going, fragments, counts, pictured = [], [], [], [], []

    def make():
        started = time.perf_counter()
        chunk = session.step()
        fragments.append(video.encode(chunk.frames[0], sum(counts), len(fragments)))
        counts.append(len(chunk.frames[0]))
        record = len(json.dumps(chunk.trace, separators=(",", ":"))) + 1
        return chunk, len(fragments[-1]), record, time.perf_counter() - started

    for length in lengths:
        chunk, size, record, lasted = make()
        skipped = min(length - 2, SKIPPED // len(tried))
        begun.append(lasted)
        encoded, traced, gone = encoded + size, traced + record, gone + min(length, 2)
        if skipped > 0:
            session.prefill(torch.cat([chunk.latents] * skipped, 1))
            gone += skipped
        if length > 1:
            first = record
            chunk, size, record, lasted = make()
            going.append(lasted)
            encoded, traced = encoded + size * (length - 1), traced + (first + record) * (length - 1) // 2
        last = range(sum(counts[:-1]), sum(counts))
        pictured.append([last[(2 * i + 1) * len(last) // (2 * PER_SHOT)] for i in range(PER_SHOT)])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "video.mp4").write_bytes(b"".join([video.header, *fragments]))
        wanted = sorted({frame for frames in pictured for frame in frames})
        # enlarged and encoded, as a run draws them
        images = dict(zip(wanted, read_video(folder / "video.mp4", wanted)))
        strips = [[images[frame] for frame in frames] for frames in pictured]
        filmstrip(strips, [caption(0, 0, script.shots[shot].prompt) for shot in tried], folder / "filmstrip.png")
        session.save(folder / "state")
        drawn, saved = ((folder / name).stat().st_size for name in ("filmstrip.png", "state"))
    share, times = schedule.chunks / sum(lengths), going or begun
    return Trial(
        statistics.mean(times),
        len(times),
        len(video.header) + round(encoded * share),
        round(drawn * min(len(script.shots), MAX_PICTURED) / len(tried)),
        round(traced * share),
        saved if gone == schedule.chunks else None,
    )
