"""Tell a whole video: shots in, pixels and truth of any span out.

Knows how grammar, looks, motion and drawing fit together; an individual keeps its looks for the whole narrative.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slotmemory.world.clock import chunk_frames, chunk_of, chunks_in, num_frames
from slotmemory.world.entities import Entity, entity_of
from slotmemory.world.grammar import Role, ShotSpec, compose, parse, sample_story
from slotmemory.world.motion import choreograph
from slotmemory.world.renderer import Stage, Truth, WorldSize
from slotmemory.world.scenery import paint_scene

WELL_VISIBLE = 0.6


@dataclass(frozen=True)
class Shot:
    """One prompt, what it says, and the chunk it starts at."""

    prompt: str
    spec: ShotSpec
    start_chunk: int


class Narrative:
    """A seeded video of so many chunks; the same arguments always give the same pixels.
    shots: (prompt or ShotSpec, start chunk) in order, the first at chunk 0. `.cuts` are the chunks that another scene begins
    with, `.entities` all individuals in order of first mention; the unstated looks of each depend on the seed and its
    (colour, kind) alone."""

    def __init__(
        self, shots: Sequence[tuple[ShotSpec | str, int]], chunks: int, seed: int, size: WorldSize | None = None
    ):
        _check_starts([start for _, start in shots], chunks)
        self.chunks, self.seed, self.size = chunks, seed, size or WorldSize()
        self.frames = num_frames(chunks)
        rng = np.random.default_rng([seed, 3000])
        self.shots: list[Shot] = []
        for told, start in shots:
            spec = parse(told) if isinstance(told, str) else told
            prompt = told if isinstance(told, str) else compose(spec, rng)
            self.shots.append(Shot(prompt, spec, start))

        cast = list(dict.fromkeys(role.identity for shot in self.shots for role in shot.spec.roles))
        self.entities: list[Entity] = [entity_of(seed, colour, kind) for colour, kind in cast]
        directions = [(shot.spec, shot.start_chunk) for shot in self.shots]
        self._stage = Stage(self.entities, choreograph(directions, cast, chunks, self.size.units_wide), self.size)
        self._backgrounds: dict[str, np.ndarray] = {}
        self._shot_of_chunk = np.searchsorted([shot.start_chunk for shot in self.shots], np.arange(chunks), "right") - 1
        self.cuts: list[int] = [
            shot.start_chunk for before, shot in zip(self.shots, self.shots[1:]) if shot.spec.scene != before.spec.scene
        ]
        self._cut_frames = {chunk_frames(chunk).start for chunk in self.cuts}

    @classmethod
    def random(cls, seed: int, seconds: float, size: WorldSize | None = None) -> "Narrative":
        """Roll a narrative of about so many seconds; seed settles the story and all looks."""
        story = sample_story(np.random.default_rng([seed, 4000]), seconds)
        return cls(story, chunks_in(seconds), seed, size)

    @classmethod
    def from_prompts(
        cls, prompts: Sequence[str], seed: int, chunks_per_shot: int = 4, size: WorldSize | None = None
    ) -> "Narrative":
        """Tell prompts one after the other, each for the same number of chunks."""
        shots = [(prompt, index * chunks_per_shot) for index, prompt in enumerate(prompts)]
        return cls(shots, len(prompts) * chunks_per_shot, seed, size)

    def shot(self, chunk: int) -> Shot:
        """Give the shot a chunk belongs to."""
        if not 0 <= chunk < self.chunks:
            raise ValueError(f"chunk={chunk} is outside this narrative; it has chunks 0..{self.chunks - 1}")
        return self.shots[self._shot_of_chunk[chunk]]

    def prompt(self, chunk: int) -> str:
        """Give the prompt in force during a chunk."""
        return self.shot(chunk).prompt

    def roles(self, chunk: int) -> tuple[Role, ...]:
        """Give who the prompt of a chunk asks for, the first-named first."""
        return self.shot(chunk).spec.roles

    def cast(self, chunk: int) -> tuple[int, ...]:
        """Give the same as indices into `.entities`."""
        identities = [entity.identity for entity in self.entities]
        return tuple(identities.index(role.identity) for role in self.roles(chunk))

    def render(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Draw pixel frames first..last-1 -> [T, 3, H, W] uint8; any span gives the same pixels as the whole."""
        frames = self._span(first, last)
        pixels = np.empty((len(frames), 3, self.size.height, self.size.width), dtype=np.uint8)
        for t, frame in enumerate(frames):
            pixels[t] = self._background(self.shot(chunk_of(frame)).spec.scene)
        self._stage.draw(pixels, frames)
        return pixels

    def truth(self, first: int = 0, last: int | None = None) -> Truth:
        """Measure boxes, visibility, masks and flow of pixel frames first..last-1."""
        return self._stage.truth(self._span(first, last), self._cut_frames)

    def visible(self, chunk: int) -> set[int]:
        """Name the entities (indices) of which at least 60 % shows for more than half of a chunk."""
        frames = chunk_frames(chunk)
        well = self.truth(frames.start, frames.stop).visibility >= WELL_VISIBLE
        return set(np.flatnonzero(well.mean(axis=1) > 0.5).tolist())

    def _span(self, first: int, last: int | None) -> range:
        last = self.frames if last is None else last
        if not 0 <= first <= last <= self.frames:
            raise ValueError(f"frames {first}..{last} are outside this narrative; it has frames 0..{self.frames}")
        return range(first, last)

    def _background(self, scene: str) -> np.ndarray:
        if scene not in self._backgrounds:
            self._backgrounds[scene] = paint_scene(scene, self.seed, self.size.width, self.size.height)
        return self._backgrounds[scene]


def _check_starts(starts: list[int], chunks: int) -> None:
    if not starts or starts[0] != 0:
        raise ValueError(f"shots start at chunks {starts}; the first must start at 0")
    if any(after <= before for before, after in zip(starts, starts[1:])) or starts[-1] >= chunks:
        raise ValueError(f"shots start at chunks {starts}; starts must rise and stay below chunks={chunks}")
