"""Fresh narratives as latents: what a transformer of the narrative world is trained on.

Renders, encodes and keeps a sliding set of narratives. Narrative number i of a rank is a function of (seed, rank, i) and
the set at a step a function of the step, so a resumed run sees what an uninterrupted one would have seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from slotmemory.codecs.base import Codec, to_float
from slotmemory.training.loop import seed_for
from slotmemory.training.shown import labels_of
from slotmemory.world.narrative import Narrative

HELD_OUT = 2**31  # validation narratives have seeds from here on; a pool's are below
CELL_SHARE = 0.15  # a cell belongs to an entity that covers at least this share of its pixels

# options `seconds`, `pool` and `refresh` of every objective that draws from a pool, each with defaults of its own
Seconds = Annotated[float, Field(gt=0, description="length of a narrative")]
PoolSize = Annotated[int, Field(ge=1, description="narratives, or what is made of them, kept per process")]
Refresh = Annotated[int, Field(ge=1, description="steps after which one of them is replaced")]


@dataclass(frozen=True)
class Encoded:
    """One narrative: latents [L, C, h p, w p] and, per token of p x p latent cells, whose it is: cells [E, L, h, w] bool,
    labels [L, h w, 5] and places [L, h w, 2] (`shown.labels_of`); per chunk its prompt and who is visible."""

    latents: Tensor
    cells: Tensor
    labels: Tensor
    places: Tensor
    prompts: list[str]
    visible: list[frozenset[int]]
    starts: list[int]  # chunks at which a shot begins, 0 included
    cuts: list[int]  # chunks at which another scene begins, with everybody in place
    scenes: list[str]  # of every chunk
    names: frozenset[tuple[str, str]]  # of everybody, as prompts have them: (colour, kind)

    @property
    def chunks(self) -> int:
        return len(self.prompts)


@torch.no_grad()
def latents_of(narrative: Narrative, codec: Codec) -> Tensor:
    """Render and encode a whole narrative: latents [L, C, h, w] fp32."""
    pixels = to_float(torch.from_numpy(narrative.render()))[None]
    return codec.encode(pixels.to(codec.dtype))[0].float()


def encode(narrative: Narrative, codec: Codec, frames_per_chunk: int = 3, patch: int = 1) -> Encoded:
    """Render and encode a whole narrative for tokens of `patch` x `patch` latent cells."""
    latents = latents_of(narrative, codec)
    chunks = len(latents) // frames_per_chunk
    prompts = [narrative.prompt(k) for k in range(chunks)]
    truth = narrative.truth()
    stride = narrative.size.width // latents.shape[-1] * patch
    height, width = (x // patch for x in latents.shape[-2:])
    shares = torch.zeros(len(narrative.entities), len(latents), height, width)
    for entity in range(len(narrative.entities)):
        covered = torch.from_numpy(truth.masks == entity + 1).float()
        covered = torch.nn.functional.avg_pool2d(covered[:, None], stride)[:, 0]  # [T, h, w]
        shares[entity] = torch.cat((covered[:1], covered[1:].unflatten(0, (-1, 4)).mean(1)))
    shares *= shares > CELL_SHARE
    labels, places = labels_of(narrative, truth, shares, frames_per_chunk)
    return Encoded(
        latents,
        shares > 0,
        labels,
        places,
        prompts,
        [frozenset(narrative.visible(k)) for k in range(chunks)],
        [k for k in range(chunks) if k == 0 or prompts[k] != prompts[k - 1]],
        narrative.cuts,
        [narrative.shot(k).spec.scene for k in range(chunks)],
        frozenset(entity.identity for entity in narrative.entities),
    )


class Pool:
    """A sliding set of `size` narratives, of which one is replaced every `refresh` steps."""

    def __init__(self, make: Callable[[int], Encoded], size: int, refresh: int, seed: int, rank: int):
        self.make, self.size, self.refresh = make, size, refresh
        self.seed, self.rank = seed, rank
        self.kept: dict[int, Encoded] = {}

    def at(self, step: int) -> list[Encoded]:
        first = step // self.refresh
        wanted = range(first, first + self.size)
        self.kept = {i: self.kept[i] if i in self.kept else self.make(self.seed_of(i)) for i in wanted}
        return list(self.kept.values())

    def seed_of(self, number: int) -> int:
        return seed_for(self.seed, self.rank, number) % HELD_OUT
