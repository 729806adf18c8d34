"""Does a stream move as much as its prompts ask, and only then? And is there a jolt where chunks meet?

What moves, and when, follows from the prompts: the narrative world tells them too, several times over, with other looks.
A video that freezes and one that trembles both look consistent from afar; the first has too little motion, the second
moves where the world stands still. Cuts, and the first frames of every other prompt, are left out.

Frame t + 1 minus frame t is the step t. Legend: T frames of the world's clock (16 a second, chunks of 12).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.codecs.base import num_latents
from slotmemory.errors import InputError
from slotmemory.world.clock import FPS, LATENTS_PER_CHUNK, chunk_frames, latent_frames

ROWS = 24  # of blocks in a frame: 4 x 4 pixels of the embedded model's
CHANGE = 0.045  # of full scale, mean over a block and its colours, from which it has moved: what the codec adds is less
LIVELY = 0.002  # share of blocks moving, from which on something moves: 2 of 960
FROZEN = 0.1  # of the world's motion, below which a second is frozen


class Motion(NamedTuple):
    """amount: blocks that move, in those of the world (1: as many; frozen: 0); static: share of the seconds in which the
    world moves and the video does not; unrest: share of blocks that move while the world stands still; flicker: how much
    frames change where chunks meet, in how much they do at other latents' first frames, against the same of the world
    (1: no jolt). None where the script gives nothing to measure it by."""

    amount: float | None
    static: float | None
    unrest: float | None
    flicker: float | None


def measure(video: Tensor, world: Sequence[Tensor], switches: Collection[int]) -> Motion:
    """Compare a video uint8 [T, 3, H, W] with the world's tellings of the same prompts, which begin at chunks `switches`.

    Raises InputError where the shapes differ or nothing could move."""
    shapes = {tuple(x.shape) for x in (video, *world)}
    if not world or len(shapes) > 1 or len(video) < 2:
        raise InputError(f"motion of {sorted(shapes)}: expected a video and the world's tellings, as long and as large")
    new = {chunk_frames(chunk).start for chunk in switches if chunk}
    kept = torch.tensor([t + 1 not in new for t in range(len(video) - 1)])
    own, there = moving(video), torch.stack([moving(x) for x in world])
    still = kept & (there == 0).all(0)
    return Motion(
        _ratio(float(own[kept].mean()), float(there[:, kept].mean())),
        _static(own, there.mean(0), kept),
        float(own[still].mean()) if still.any() else None,
        _flicker(video, world, new),
    )


def moving(video: Tensor) -> Tensor:
    """Share of blocks that move in every step, [T - 1]: blocks rather than pixels, so that faint noise is no motion."""
    block = max(1, video.shape[-2] // ROWS)
    # one frame after the other: a minute of differences would fill the memory
    blocks = torch.stack([F.avg_pool2d(frame.float(), block) for frame in video]) / 255
    return (blocks.diff(dim=0).abs().mean(1) > CHANGE).float().mean((1, 2))


def steps(video: Tensor) -> Tensor:
    """Mean absolute change of every step, [T - 1] in shares of full scale."""
    pairs = zip(video, video[1:])
    return torch.stack([(after.float() - before.float()).abs().mean() for before, after in pairs]) / 255


def _static(own: Tensor, there: Tensor, kept: Tensor) -> float | None:
    """Share of the lively seconds that are frozen."""
    frozen = []
    for mine, true, use in zip(own.split(FPS), there.split(FPS), kept.split(FPS)):
        if use.any() and float(true[use].mean()) >= LIVELY:
            frozen.append(float(mine[use].mean()) < FROZEN * float(true[use].mean()))
    return sum(frozen) / len(frozen) if frozen else None


def _flicker(video: Tensor, world: Sequence[Tensor], new: Collection[int]) -> float | None:
    own = _jolt(steps(video), new)
    true = [x for x in (_jolt(steps(telling), new) for telling in world) if x is not None]
    return _ratio(own, sum(true) / len(true)) if own is not None and true else None


def _jolt(change: Tensor, new: Collection[int]) -> float | None:
    """Mean change at first frames of chunks, in that at first frames of their other latents."""
    latents = range(1, num_latents(len(change) + 1))
    starts = [(latent % LATENTS_PER_CHUNK == 0, latent_frames(latent).start) for latent in latents]
    meet = [t - 1 for first, t in starts if first and t not in new]
    inside = [t - 1 for first, t in starts if not first]
    return _ratio(float(change[meet].mean()), float(change[inside].mean())) if meet and inside else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b > 0 else None
