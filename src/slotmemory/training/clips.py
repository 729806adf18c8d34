"""What a transformer is shown in flow matching: clips of chunks from encoded narratives, and who sees whom.

A clip is two distant chunks (the video's first and one that a memory might give back) and a run of consecutive ones,
some of them about somebody's return, some cut anew from scene to scene. Its clean chunks are encoded once; several noisy
copies of the run share them as context: [sink | memory | past chunks | itself]. Which of these a noisy chunk may see is
drawn per copy. Knows no network.

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
RECALLED = 4  # noisy latent frames beside a clean one
STRANGERS = 2  # of these, without the entity that the clean one shows
RECALLED_PARTS = 0.5  # share of these clean ones of which only the entity shows


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
    montage: float = Field(0.0, description="share of the other clips that are cut anew, from scene to scene")
    shift: float = Field(5.0, description="warp of the noise levels that are drawn evenly")


@dataclass
class Batch:
    """Rows of chunks: latents [R, F, C, h, w], frames [R, F], sigma [R], table [R, K], hidden [R, N], weight [R, N].

    labels [R, N, 5] and places [R, N, 2] say what each token shows; stand_ins: pairs (clean row, noisy row of the same
    chunk), in which the model's prediction of the latter may replace the former."""

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


class Clips:
    """Draws batches from encoded narratives."""

    def __init__(self, options: ClipOptions):
        self.options = options
        self.schedule, self.even = FlowSchedule(), FlowSchedule(options.shift)
        self.levels = torch.tensor([s / 1000 for s in options.steps])

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

    def draw_sigma(self, count: int, random: torch.Generator) -> Tensor:
        s = torch.rand(count, generator=random)
        level = self.levels[torch.randint(len(self.levels), (count,), generator=random)]
        at_level = torch.rand(count, generator=random) < self.options.at_levels
        return torch.where(at_level, self.schedule.warp(level), self.even.warp(s.clamp(min=0.004)))

    def batch(self, items: list[Encoded], random: torch.Generator) -> Batch:
        """Draw one clip from each narrative given."""
        o, size = self.options, 3
        clean = o.run - 1
        per_clip = DISTANT + clean + o.copies * o.run
        tokens = items[0].labels.shape[1]
        use_sink, use_far_past = (torch.rand(2, generator=random) > torch.tensor([o.no_sink, o.short])).tolist()
        latents, frames, sigma, table, hidden, weight, prompts = [], [], [], [], [], [], []
        labels, places, stand_ins = [], [], []
        for number, item in enumerate(items):
            base = number * per_clip
            returns = float(torch.rand(1, generator=random)) < o.returns and self.clip_of_return(item, random)
            if returns:
                start, far, entity = returns
                run = list(range(start, start + o.run))
            else:
                run = self.run_of(item, random)
                far, entity = self.memory_chunk(item, run, random)
            chosen = [0, far, *run[:clean], *run * o.copies]
            away = -size * (1 + torch.randint(o.far, (2,), generator=random))
            firsts = [*away.tolist(), *(size * j for j in range(clean)), *[size * j for j in range(o.run)] * o.copies]
            for chunk, first in zip(chosen, firsts):
                latents.append(item.latents[chunk * size : (chunk + 1) * size])
                shown = item.cells[:, chunk * size : (chunk + 1) * size].any(0)
                weight.append(1.0 + (o.entity_weight - 1.0) * shown.flatten().float())
                frames.append(torch.arange(first, first + size))
                labels.append(item.labels[chunk * size : (chunk + 1) * size].flatten(0, 1))
                places.append(item.places[chunk * size : (chunk + 1) * size].flatten(0, 1))
                prompts.append(item.prompts[chunk])
                hidden.append(torch.zeros(size * tokens, dtype=torch.bool))
            hidden[base + MEMORY] = self.hide(item, far, entity, random)
            noised = torch.rand(DISTANT + clean, generator=random) < o.noised
            sigma.append(torch.rand(DISTANT + clean, generator=random) * o.context_noise * noised)
            sigma.append(self.draw_sigma(o.copies * o.run, random))
            table += self.rows(base, use_sink and run[0] > 0, o.past if use_far_past else 1, random, bool(returns))
            stand_ins += [(base + DISTANT + j, base + DISTANT + clean + j) for j in range(clean)]
        sigma_all = torch.cat(sigma)
        noisy = torch.arange(per_clip) >= DISTANT + clean
        drop = torch.rand(len(prompts), generator=random) < o.no_text
        return Batch(
            torch.stack(latents),
            torch.stack(frames),
            sigma_all,
            columns_in_use(torch.tensor(table)),
            torch.stack(hidden),
            torch.stack(weight),
            ["" if gone else prompt for prompt, gone in zip(prompts, drop.tolist())],
            noisy.repeat(len(items)),
            torch.stack(labels),
            torch.stack(places),
            tuple(stand_ins),
        )

    def stills(self, items: list[Encoded], rows: int, random: torch.Generator) -> Batch:
        """Draw so many single latent frames from all narratives given; each sees itself and its prompt."""
        which = torch.randint(len(items), (rows,), generator=random).tolist()
        shares = torch.rand(rows, generator=random).tolist()
        picked = [(items[i], int(share * len(items[i].latents))) for i, share in zip(which, shares)]
        tokens = picked[0][0].labels.shape[1]
        return self.of_frames(
            picked,
            torch.zeros(rows, dtype=torch.long),
            self.draw_sigma(rows, random),
            torch.zeros(rows, 0, dtype=torch.long),
            torch.zeros(rows, tokens, dtype=torch.bool),
            torch.ones(rows, dtype=torch.bool),
            random,
        )

    def recalls(self, items: list[Encoded], rows: int, random: torch.Generator) -> Batch:
        """Draw single latent frames that see another one of their narrative, or of it only one entity: again and again a
        clean frame and RECALLED noisy ones that show the same entity. As cheap as stills, and each of them is about what
        a memory is for. STRANGERS of the noisy ones show others instead, where there are any: who has only ever seen the
        right memory lends everybody the looks of whoever is in it."""
        group = 1 + RECALLED
        count = max(1, rows // group)
        peopled = [item for item in items if item.cells.any()]
        picked: list[tuple[Encoded, int]] = []
        hidden = []
        for i in torch.randint(len(peopled), (count,), generator=random).tolist():
            item = peopled[i]
            draws = torch.rand(2 + RECALLED, generator=random).tolist()
            cast = [e for e in range(len(item.cells)) if item.cells[e].any()]
            entity = cast[int(draws.pop() * len(cast))]
            shown = item.cells.flatten(2).any(2)  # [E, L]
            frames = shown[entity].nonzero()[:, 0].tolist()
            others = (shown.any(0) & ~shown[entity]).nonzero()[:, 0].tolist() or frames
            sources = [frames] * (group - STRANGERS) + [others] * STRANGERS
            picked += [(item, source[int(draw * len(source))]) for source, draw in zip(sources, draws)]
            seen = picked[-group][1]
            part = float(torch.rand(1, generator=random)) < RECALLED_PARTS
            around = ~grown(item.cells[entity, seen : seen + 1]).flatten()
            hidden += [around if part else torch.zeros_like(around)]
            hidden += [torch.zeros_like(around)] * RECALLED
        clean = torch.arange(count * group) % group == 0
        noised = torch.rand(count * group, generator=random) < self.options.noised
        light = torch.rand(count * group, generator=random) * self.options.context_noise * noised
        away = -1 - torch.randint(3 * self.options.far, (count * group,), generator=random)
        sees = torch.arange(count * group) // group * group
        return self.of_frames(
            picked,
            away * clean,
            torch.where(clean, light, self.draw_sigma(count * group, random)),
            torch.where(clean, -1, sees)[:, None],
            torch.stack(hidden),
            ~clean,
            random,
        )

    def of_frames(
        self,
        picked: list[tuple[Encoded, int]],
        frames: Tensor,
        sigma: Tensor,
        table: Tensor,
        hidden: Tensor,
        noisy: Tensor,
        random: torch.Generator,
    ) -> Batch:
        """A batch whose rows are single latent frames (narrative, number): frames, sigma and noisy [R], the rest as in
        `Batch`."""
        cells = torch.stack([item.cells[:, f].any(0).flatten() for item, f in picked])
        drop = torch.rand(len(picked), generator=random) < self.options.no_text
        return Batch(
            torch.stack([item.latents[f : f + 1] for item, f in picked]),
            frames[:, None],
            sigma,
            table,
            hidden,
            1.0 + (self.options.entity_weight - 1.0) * cells.float(),
            ["" if gone else item.prompts[f // 3] for (item, f), gone in zip(picked, drop.tolist())],
            noisy,
            torch.stack([item.labels[f] for item, f in picked]),
            torch.stack([item.places[f] for item, f in picked]),
        )

    def rows(
        self, base: int, has_sink: bool, past: int, random: torch.Generator, returns: bool = False
    ) -> list[list[int]]:
        """Say which rows each row of a clip sees: [sink, memory, past chunks], -1 where it does not; returns: the memory
        is always there."""
        o, first = self.options, base + DISTANT
        none = [-1] * (DISTANT + o.past)
        table = [none, none]

        def row(j: int, memory: bool, near: bool) -> list[int]:
            before = [first + j - k if near and k <= min(j, past) else -1 for k in range(o.past, 0, -1)]
            return [base + SINK if has_sink else -1, base + MEMORY if memory else -1, *before]

        keep_memory = float(torch.rand(1, generator=random)) > o.no_memory or returns
        table += [row(j, keep_memory, True) for j in range(o.run - 1)]
        for _ in range(o.copies):
            for j in range(o.run):
                memory, near, alone = torch.rand(3, generator=random).tolist()
                if j == 0 and alone < o.alone and not returns:
                    table.append(none)
                else:
                    table.append(row(j, memory > o.no_memory or returns, near > o.no_past))
        return table
