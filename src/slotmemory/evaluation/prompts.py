"""Does every chunk show what its prompt asks for, and does somebody stay the same while on screen?

Who is there is no matter of taste: the narrative world tells the same prompts and says who shows in which chunk. Chunks in
which somebody is half way in or out ask nothing. A chunk is right if as many are there, and a lone one has the kind and the
colour that the prompt names; the chunk a cut begins with is counted by itself, for that is where a model that has not
understood the cut shows the old cast leaving, or both. Whoever is alone must keep pattern and accessory from one chunk of a
shot in which they show to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slotmemory.errors import InputError
from slotmemory.evaluation.reader import NOBODY, ONE, SEVERAL, Reader, Reading
from slotmemory.world import Narrative, chunk_frames

FRAME_STEP = 3  # of a chunk's frames every third is read


class Followed(NamedTuple):
    """Shares of chunks, None where the script has none. at_cuts: first chunks of another scene that are right; between:
    all others; kept: chunks of a lone one that agree on pattern and accessory with the one before in their shot."""

    at_cuts: float | None
    between: float | None
    kept: float | None


@torch.no_grad()
def measure(video: Tensor, narrative: Narrative, reader: Reader) -> Followed:
    """Read a video uint8 [T, 3, H, W] of a narrative's prompts. Raises InputError where it is not as long as the narrative."""
    if len(video) != narrative.frames:
        raise InputError(f"a video of {len(video)} frames for a narrative of {narrative.frames}")
    readings = []
    for chunk in range(narrative.chunks):
        frames = chunk_frames(chunk)
        readings.append(reader.read(video[frames.start : frames.stop : FRAME_STEP]))
    return judge(readings, narrative)


def judge(readings: Sequence[Reading], narrative: Narrative) -> Followed:
    """Compare what chunks show with what the world shows in them."""
    at_cuts, between, kept = [], [], []
    before: tuple[int, Reading] | None = None  # who was last alone in this shot, and how it looked
    for chunk, reading in enumerate(readings):
        there = sure(narrative, chunk)
        if narrative.shot(chunk).start_chunk == chunk:
            before = None
        if there is None:
            continue
        right = reading.count == (NOBODY, ONE, SEVERAL)[len(there)]
        if len(there) == 1 and right:
            entity = narrative.entities[there[0]]
            right = (reading.kind, reading.colour) == (entity.kind, entity.colour)
            if before and before[0] == there[0]:
                earlier = before[1]
                kept.append((reading.pattern, reading.accessory) == (earlier.pattern, earlier.accessory))
            before = there[0], reading
        (at_cuts if chunk in narrative.cuts else between).append(right)
    return Followed(*(sum(x) / len(x) if x else None for x in (at_cuts, between, kept)))


def sure(narrative: Narrative, chunk: int) -> list[int] | None:
    """Who is fully in the picture during a chunk (indices), or None if somebody is half way."""
    frames = chunk_frames(chunk)
    visibility = narrative.truth(frames.start, frames.stop).visibility
    whole, gone = (visibility > 0.9).all(1), (visibility == 0).all(1)
    if not (whole | gone).all():
        return None
    return whole.nonzero()[0].tolist()
