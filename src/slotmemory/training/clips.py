"""What a transformer is shown in flow matching: clips of chunks from encoded narratives, and who sees whom.

A clip is two distant chunks (the video's first and one that a memory might give back) and a run of consecutive ones,
some of them about somebody's return, some cut anew from scene to scene, some spliced: they go over into another narrative.
Its clean chunks are encoded once; several noisy copies of the run share them as context: [sink | memory | past chunks |
itself]. Which of these a noisy chunk may see is drawn per copy. Knows no network.

Rows of a batch are chunks (`attention.Rows`); keys are placed by role, so that distances stay small however long a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from slotmemory.sampler import FlowSchedule
from slotmemory.training.narratives import Encoded
from slotmemory.training.recipe import Frozen

SINK, MEMORY = 0, 1
DISTANT = 2
CUTS = 0.6  # how often a montage cuts where it can
THEIR_MEMORY = 0.5  # share of splices whose distant chunk is of the narrative that they go over into


class ClipOptions(Frozen):
    """How clips are drawn."""

    run: int = Field(5, description="consecutive chunks of a clip")
    copies: int = Field(2, description="noisy copies of a run")
    past: int = Field(2, description="past chunks that a chunk sees")
    far: int = Field(8, description="chunks by which a distant one precedes the run, at most")
    at_levels: float = Field(0.7, description="share of noise levels drawn from those that the few-step sampler visits")
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    context_noise: float = Field(0.2, description="largest noise level of a clean chunk")
    noised: float = Field(0.6, description="share of clean chunks that are noised")
    entity_weight: float = Field(3.0, description="weight of the loss where entities are")
    no_text: float = 0.05
    no_sink: float = Field(0.6, description="share of batches without the video's first chunk; these are cheaper")
    short: float = Field(0.6, description="share of batches in which a chunk sees one past chunk only; cheaper too")
    no_memory: float = 0.2
    no_past: float = 0.1
    alone: float = Field(0.6, description="share of the run's first chunks that see nothing at all")
    returns: float = Field(0.0, description="share of clips about a return: the distant chunk shows who comes back")
    splices: float = Field(0.0, description="share of the other clips that go over into a narrative of strangers")
    montage: float = Field(0.0, description="share of the other clips that are cut anew, from scene to scene")
    shift: float = Field(5.0, description="warp of the noise levels that are drawn evenly")


@dataclass
class Batch:
    """Rows of chunks: latents [R, F, C, h, w], frames [R, F], sigma [R], table [R, K], hidden [R, N], weight [R, N].

    labels [R, N, 5] and places [R, N, 2] say what each token shows; stand_ins: pairs (clean row, noisy row of the same
    chunk), in which the model's prediction of the latter may replace the former; twins: pairs (noisy row that sees strangers
    too, the same row without them), whose noise is to be the same."""

    latents: Tensor
    frames: Tensor
    sigma: Tensor
    table: Tensor
    hidden: Tensor
    weight: Tensor
    prompts: list[str]
    noisy: Tensor  # [R] bool
    labels: Tensor | None = None
    places: Tensor | None = None
    stand_ins: tuple[tuple[int, int], ...] = ()
    twins: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Clip:
    """What a clip shows: its run of (narrative, chunk), the distant chunk and the entity that is looked for in it or -1, the
    chunk of the run with which another narrative begins, if one does, and whether it is about a return."""

    run: list[tuple[Encoded, int]]
    far: tuple[Encoded, int]
    entity: int
    joint: int | None = None
    returns: bool = False


def columns_in_use(table: Tensor) -> Tensor:
    """Drop the columns in which no row sees anything: fewer keys to gather."""
    return table[:, (table >= 0).any(0)]


def grown(cells: Tensor) -> Tensor:
    """The cells given, [F, h, w] bool, and their neighbours."""
    return F.max_pool2d(cells[:, None].float(), 3, 1, 1)[:, 0] > 0


def returns_in(item: Encoded, past: int) -> list[tuple[int, int]]:
    """Name all returns (first chunk of a shot, entity): seen before, not in the `past` chunks before the shot, then there;
    who comes in from the side is there in the shot's second chunk."""
    found = []
    for start in item.starts:
        gap = max(0, start - past)
        before = set().union(*item.visible[:gap]) - set().union(*item.visible[gap:start])
        found += [(start, entity) for entity in sorted(before & set().union(*item.visible[start : start + 2]))]
    return found


class Levels:
    """Draws noise levels, and which prompts are emptied."""

    def __init__(self, options: ClipOptions):
        self.options = options
        self.schedule, self.even = FlowSchedule(), FlowSchedule(options.shift)
        self.steps = torch.tensor([s / 1000 for s in options.steps])

    def draw(self, count: int, random: torch.Generator) -> Tensor:
        """Draw levels to predict from: those of the few-step sampler, or any."""
        s = torch.rand(count, generator=random)
        level = self.steps[torch.randint(len(self.steps), (count,), generator=random)]
        at_level = torch.rand(count, generator=random) < self.options.at_levels
        return torch.where(at_level, self.schedule.warp(level), self.even.warp(s.clamp(min=0.004)))

    def light(self, count: int, random: torch.Generator) -> Tensor:
        """Draw levels of what is seen: none or little."""
        noised = torch.rand(count, generator=random) < self.options.noised
        return torch.rand(count, generator=random) * self.options.context_noise * noised

    def without_text(self, prompts: list[str], twins: Sequence[tuple[int, int]], random: torch.Generator) -> list[str]:
        """Empty a share of the prompts, but those of twins: what nobody has named may be anybody who is in sight."""
        drop = torch.rand(len(prompts), generator=random) < self.options.no_text
        drop[[row for pair in twins for row in pair]] = False
        return ["" if gone else prompt for prompt, gone in zip(prompts, drop.tolist())]


class Clips:
    """Draws batches from encoded narratives."""

    def __init__(self, options: ClipOptions):
        self.options, self.levels = options, Levels(options)

    def clip_start(self, item: Encoded, random: torch.Generator) -> int:
        """Draw where a run begins: often a little before a new shot, so that its first chunk sees the shot before."""
        kind, pick = torch.rand(2, generator=random).tolist()
        start = item.starts[int(pick * len(item.starts))]
        latest = item.chunks - self.options.run
        if kind < 0.15:
            place = start
        elif kind < 0.45:
            place = start - 1
        elif kind < 0.75:
            place = start - 2
        else:
            place = int(pick * (latest + 1))
        return min(max(place, 0), latest)

    def clip_of_return(self, item: Encoded, random: torch.Generator) -> tuple[int, int, int] | None:
        """Draw where a run begins that shows somebody's return, an earlier chunk that showed them, and the entity."""
        pick, lead, which = torch.rand(3, generator=random).tolist()
        found = returns_in(item, self.options.past)
        if not found:
            return None
        start, entity = found[int(pick * len(found))]
        first = min(start - int(lead * (self.options.past + 1)), item.chunks - self.options.run)
        earlier = [k for k in range(first) if entity in item.visible[k]]
        return (first, earlier[int(which * len(earlier))], entity) if earlier else None

    def run_of(self, item: Encoded, random: torch.Generator) -> list[int]:
        """Draw the chunks of a run: consecutive ones, or cut anew."""
        if float(torch.rand(1, generator=random)) < self.options.montage:
            return self.recut(item, random)
        start = self.clip_start(item, random)
        return list(range(start, start + self.options.run))

    def recut(self, item: Encoded, random: torch.Generator) -> list[int]:
        """Cut a narrative anew: a run that jumps to where another scene begins wherever it likes to. After a cut nothing
        goes on, so any chunk may come before it, and one clip has several; in the narrative itself they are rare, and a
        model that hardly meets them learns to let the old cast walk through the new scene."""
        o = self.options
        chunk, *jumps = torch.rand(o.run, generator=random).tolist()
        run = [int(chunk * (item.chunks - o.run + 1))]
        for jump in jumps:
            # Breath takes two chunks, so that a chunk of the same parity would repeat half of it.
            cuts = [
                k
                for k in item.cuts
                if item.scenes[k] != item.scenes[run[-1]] and (k - run[-1]) % 2 and k + o.run - len(run) <= item.chunks
            ]
            run.append(cuts[int(jump / CUTS * len(cuts))] if cuts and jump < CUTS else run[-1] + 1)
        return run

    def memory_chunk(self, item: Encoded, run: Sequence[int], random: torch.Generator) -> tuple[int, int]:
        """Draw a chunk outside the run, mostly one that shows an entity of the run -> (chunk, entity or -1)."""
        outside = [k for k in range(item.chunks) if k not in run]
        shown = sorted(set().union(*(item.visible[k] for k in run)))
        kind, which, pick = torch.rand(3, generator=random).tolist()
        if shown and kind < 0.9:
            entity = shown[int(which * len(shown))]
            chunks = [k for k in outside if entity in item.visible[k]]
            if chunks:
                return chunks[int(pick * len(chunks))], entity
        return outside[int(pick * len(outside))], -1

    def hide(self, item: Encoded, chunk: int, entity: int, random: torch.Generator) -> Tensor:
        """Draw which tokens of a distant chunk are kept from its readers: [N] bool, for memories keep parts of chunks."""
        frames, per_frame = 3, item.labels.shape[1]
        kind, share, frame = torch.rand(3, generator=random).tolist()
        hidden = torch.zeros(frames, per_frame, dtype=torch.bool)
        if kind < 0.3:
            return hidden.flatten()
        if kind < 0.5:  # one latent frame of the three
            hidden[:] = True
            hidden[int(frame * frames)] = False
        elif kind < 0.8 and entity >= 0:  # the entity's cells and their neighbours
            cells = item.cells[entity, chunk * frames : (chunk + 1) * frames]
            hidden = ~grown(cells).flatten(1)
            if share < 0.5:  # of one latent frame only
                hidden[torch.arange(frames) != int(frame * frames)] = True
        else:
            hidden = torch.rand(hidden.shape, generator=random) < 0.3 + 0.5 * share
        return hidden.flatten()

    def clip(self, item: Encoded, others: Sequence[Encoded], random: torch.Generator) -> Clip:
        """Draw a clip of a narrative; others: narratives that it may go over into."""
        o = self.options
        returns, splice = torch.rand(2, generator=random).tolist()
        if returns < o.returns and (found := self.clip_of_return(item, random)):
            first, far, entity = found
            return Clip([(item, k) for k in range(first, first + o.run)], (item, far), entity, returns=True)
        run = self.run_of(item, random)
        if splice < o.splices and (spliced := self.splice(item, run, others, random)):
            return spliced
        far, entity = self.memory_chunk(item, run, random)
        return Clip([(item, k) for k in run], (item, far), entity)

    def splice(
        self, item: Encoded, run: Sequence[int], others: Sequence[Encoded], random: torch.Generator
    ) -> Clip | None:
        """Let a run go over into the narrative of strangers: nobody of its cast was there before, and its first scene was
        not seen before either, for scenery differs between narratives. What memory holds is theirs or the old cast's."""
        o = self.options
        where, which, theirs = torch.rand(3, generator=random).tolist()
        joint = 1 + int(where * (o.run - 1))
        before, rest = list(run[:joint]), o.run - joint
        far, entity = self.memory_chunk(item, before, random)
        scenes = {item.scenes[k] for k in (0, far, *before)}
        places = [
            (other, k)
            for other in others
            if not other.names & item.names
            for k in other.cuts
            if other.scenes[k] not in scenes and (k - before[-1]) % 2 and k + rest <= other.chunks  # parity: `recut`
        ]
        if not places:
            return None
        other, first = places[int(which * len(places))]
        after = list(range(first, first + rest))
        spliced = [(item, k) for k in before] + [(other, k) for k in after]
        if theirs < THEIR_MEMORY:
            chunk, entity = self.memory_chunk(other, after, random)
            return Clip(spliced, (other, chunk), entity, joint)
        return Clip(spliced, (item, far), entity, joint)

    def batch(self, items: Sequence[Encoded], random: torch.Generator, others: Sequence[Encoded] = ()) -> Batch:
        """Draw one clip from each narrative given; others: narratives that clips may go over into."""
        o, size = self.options, 3
        clean = o.run - 1
        per_clip = DISTANT + clean + o.copies * o.run
        tokens = items[0].labels.shape[1]
        use_sink, use_far_past = (torch.rand(2, generator=random) > torch.tensor([o.no_sink, o.short])).tolist()
        latents, frames, sigma, table, hidden, weight, prompts = [], [], [], [], [], [], []
        labels, places, stand_ins, twins = [], [], [], []
        for number, item in enumerate(items):
            base = number * per_clip
            clip = self.clip(item, others, random)
            chosen = [(item, 0), clip.far, *clip.run[:clean], *clip.run * o.copies]
            away = -size * (1 + torch.randint(o.far, (2,), generator=random))
            firsts = [*away.tolist(), *(size * j for j in range(clean)), *[size * j for j in range(o.run)] * o.copies]
            for (shown, chunk), first in zip(chosen, firsts):
                span = slice(chunk * size, (chunk + 1) * size)
                latents.append(shown.latents[span])
                weight.append(1.0 + (o.entity_weight - 1.0) * shown.cells[:, span].any(0).flatten().float())
                frames.append(torch.arange(first, first + size))
                labels.append(shown.labels[span].flatten(0, 1))
                places.append(shown.places[span].flatten(0, 1))
                prompts.append(shown.prompts[chunk])
                hidden.append(torch.zeros(size * tokens, dtype=torch.bool))
            hidden[base + MEMORY] = self.hide(*clip.far, clip.entity, random)
            drawn = self.levels.draw(o.copies * o.run, random)
            if clip.joint is not None:
                levels = drawn.view(o.copies, o.run)
                levels[1:, clip.joint :] = levels[0, clip.joint :]
                first_noisy = base + DISTANT + clean
                twins += [
                    (first_noisy + j, first_noisy + copy * o.run + j)
                    for copy in range(1, o.copies)
                    for j in range(clip.joint, o.run)
                ]
            sigma += [self.levels.light(DISTANT + clean, random), drawn]
            past = o.past if use_far_past else 1
            table += self.rows(base, use_sink and clip.run[0][1] > 0, past, random, clip)
            stand_ins += [(base + DISTANT + j, base + DISTANT + clean + j) for j in range(clean)]
        return Batch(
            torch.stack(latents),
            torch.stack(frames),
            torch.cat(sigma),
            columns_in_use(torch.tensor(table)),
            torch.stack(hidden),
            torch.stack(weight),
            self.levels.without_text(prompts, twins, random),
            (torch.arange(per_clip) >= DISTANT + clean).repeat(len(items)),
            torch.stack(labels),
            torch.stack(places),
            tuple(stand_ins),
            tuple(twins),
        )

    def rows(self, base: int, has_sink: bool, past: int, random: torch.Generator, clip: Clip) -> list[list[int]]:
        """Say which rows each row of a clip sees: [sink, memory, past chunks], -1 where it does not. In clips about a return
        the memory is always there. After a splice the first copy sees everything, its twins what is of their own narrative."""
        o, first = self.options, base + DISTANT
        none = [-1] * (DISTANT + o.past)
        table = [none, none]
        joint = o.run if clip.joint is None else clip.joint
        told_by_own = joint < o.run and clip.far[0] is clip.run[-1][0]

        def row(j: int, sink: bool, memory: bool, near: bool, since: int = 0) -> list[int]:
            before = [first + j - k if near and since <= j - k and k <= past else -1 for k in range(o.past, 0, -1)]
            return [base + SINK if sink else -1, base + MEMORY if memory else -1, *before]

        keep_memory = float(torch.rand(1, generator=random)) > o.no_memory or clip.returns
        table += [row(j, has_sink, keep_memory, True) for j in range(o.run - 1)]
        for copy in range(o.copies):
            for j in range(o.run):
                memory, near, alone = torch.rand(3, generator=random).tolist()
                if j >= joint:
                    table.append(
                        row(j, copy == 0 and has_sink, copy == 0 or told_by_own, True, 0 if copy == 0 else joint)
                    )
                elif j == 0 and alone < o.alone and not clip.returns:
                    table.append(none)
                else:
                    table.append(row(j, has_sink, memory > o.no_memory or clip.returns, near > o.no_past))
        return table
