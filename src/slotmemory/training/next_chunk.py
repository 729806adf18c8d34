"""The next chunk by what a memory reads of the true past: for memories that learn inside attention (`decoupled`).

Clips of narratives go through the session's own loop, chunk after chunk, as a stream has them: read, attend, clean pass,
write, update. Only what is made is the truth (`TeacherForcing`), and the last chunks of a clip are asked for on the way: noised
to drawn levels and denoised in one pass with what the memory reads. The flow error of that pass reaches whatever the
memory weighs what it reads by (DecMem's gate), tokens it makes itself (`Memory.prefix`), and with `tune` the transformer.
What a memory keeps of clean passes is constant, and so is a choice of tokens or blocks: a transformer that is tuned
learns from those chosen.

Most clips put a return where asking begins: an entity that was out of sight, and was shown earlier in the clip. There a
window has nothing to offer. Measured on held-out returns: the error on the returning entity with the memory as it is, as it
started, and with `window` of the same budget, which keeps the gate from being judged by what the transformer alone can do.

Legend: B clips, T latent frames, F latent frames of a chunk, r, c rows and columns of tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.memory import Memory
from slotmemory.sampler import Draw, FlowSchedule, Predict, add_noise
from slotmemory.training import loop
from slotmemory.training.narratives import HELD_OUT, Encoded, Pool, PoolSize, Refresh, Seconds, encode
from slotmemory.training.plan import Work
from slotmemory.training.rollout import Rollout, engine_for, mean_of
from slotmemory.training.student import Student, StudentOptions
from slotmemory.world.clock import chunks_in
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize

log = logging.getLogger(__name__)

MEASURED = (0.9, 0.75, 0.5)  # even times of the noise levels that validation asks at; a memory matters at high noise


class Options(StudentOptions):
    """The memory, the transformer that reads it, and what is asked for."""

    memory: str = "decoupled"
    tune: bool = Field(False, description="train the transformer too")
    steps: tuple[int, ...] | None = Field(None, description="of a distilled student; none: the model samples as before")
    chunks: int = Field(14, ge=3, description="chunks of a clip, at most: a past, and those asked for")
    asked: int = Field(2, ge=1, description="last chunks of a clip, which are asked for")
    levels: int = Field(2, ge=1, description="noise levels at which each of them is")
    returns: float = Field(0.7, ge=0, le=1, description="share of clips in which an entity returns as asking begins")
    away: int = Field(2, ge=1, description="chunks for which it was out of sight, at least")
    entity_weight: float = Field(3.0, ge=1, description="weight of the loss where entities are")
    seconds: Seconds = 24.0
    pool: PoolSize = 16
    refresh: Refresh = 2
    held_out: int = Field(8, ge=1, description="returns that are measured")


@dataclass(frozen=True)
class Pick:
    """A clip of a narrative: its first chunk, and the entity that returns as asking begins (-1: nobody)."""

    item: Encoded
    start: int
    entity: int = -1


@dataclass(frozen=True)
class Clip:
    """Clips of equal length: latents [B, T, C, h, w], prompts by chunk one for each row; entities and returning
    [B, T, r, c] bool: tokens of anybody, and of who returns."""

    latents: Tensor
    prompts: list[list[str]]
    entities: Tensor
    returning: Tensor


class TeacherForcing:
    """Stands in for a sampler: what it makes is the truth, and on the way it asks for it.

    asks: noise levels and noises like `truth`, for one pass each; errors: the squared flow error of each, [B, F, h, w]."""

    def __init__(self, schedule: FlowSchedule):
        self.schedule = schedule
        self.truth: Tensor
        self.asks: Sequence[tuple[float, Tensor]] = ()
        self.errors: list[Tensor] = []

    def denoise(self, predict: Predict, noise: Tensor, draw: Draw) -> Tensor:
        self.errors = []
        for sigma, drawn in self.asks:
            flow = predict(add_noise(self.truth, drawn, sigma), 1000 * sigma)
            self.errors.append((flow.float() - (drawn - self.truth)).square().mean(2))
        return self.truth


def returns(item: Encoded, past: int, asked: int, away: int) -> list[Pick]:
    """List the clips of `past` chunks and `asked` more in which somebody returns who was shown in that past."""
    found = []
    for chunk in range(past, item.chunks - asked + 1):
        before = range(chunk - past, chunk)
        for entity in sorted(item.visible[chunk]):
            last = max((k for k in before if entity in item.visible[k]), default=chunk)
            if chunk - last > away:
                found.append(Pick(item, chunk - past, entity))
    return found


class Objective(Student):
    """Train a memory's weights, and the transformer if told so, by the next chunk's flow error."""

    def __init__(self, options: Options, context: loop.Context):
        if chunks_in(options.seconds) < options.chunks:
            raise InputError(
                f"seconds={options.seconds:g} is {chunks_in(options.seconds)} chunks; a clip has chunks={options.chunks}"
            )
        if options.chunks < options.asked + options.away + 1:
            raise InputError(
                f"chunks={options.chunks} leaves no past for a return: expected asked + away + 1 = "
                f"{options.asked + options.away + 1} or more"
            )
        if options.lora and not options.tune:
            raise InputError(f"lora={options.lora} adapts the transformer, which is only trained with tune=true")
        super().__init__(options, context)
        if not options.tune and not any(True for _ in self.memory.parameters()):
            raise InputError(
                f"memory '{self.memory.called()}' has no weights to train; set tune=true to train the transformer with it, "
                "or name a memory that has, such as decoupled"
            )
        if not options.tune:
            self.transformer.requires_grad_(False)
        self.codec.to(context.dtype)  # it draws every narrative
        self.patch = self.transformer.config.patch[1]
        self.untrained = copy.deepcopy(self.memory)
        self.pool = Pool(self.make, options.pool, options.refresh, context.seed, context.rank)
        self.held_out: Clip | None = None
        self.known: dict[str, float] = {}  # what is measured and does not change
        self.asked_of: list[str] = []

    def in_loop(self) -> Engine:
        return engine_for(self.whole, backbone=self.student, sampler=TeacherForcing(self.whole.sampler.schedule))

    def networks(self) -> list[nn.Module]:
        return []  # prompts change at other chunks in every process: they take different passes

    def parameter_groups(self) -> list[dict[str, Any]]:
        return super().parameter_groups() if self.options.tune else []

    def make(self, seed: int) -> Encoded:
        layout = self.engine.layout
        story = Narrative.random(seed, self.options.seconds, WorldSize(layout.width, layout.height))
        return encode(story, self.codec, layout.frames_per_chunk, self.patch)

    # clips

    def draw(self, pool: Sequence[Encoded], past: int, random: torch.Generator) -> Pick:
        """Draw a clip with so many chunks before asking begins."""
        kind, pick, place = torch.rand(3, generator=random).tolist()
        if kind < self.options.returns:
            found = [each for item in pool for each in returns(item, past, self.options.asked, self.options.away)]
            if found:
                return found[int(pick * len(found))]
        item = pool[int(pick * len(pool))]
        return Pick(item, int(place * (item.chunks - past - self.options.asked + 1)))

    def cut(self, picks: Sequence[Pick], chunks: int) -> Clip:
        """Put the chosen clips, of so many chunks, side by side."""
        size, device = self.engine.layout.frames_per_chunk, self.context.device
        spans = [(pick, slice(pick.start * size, (pick.start + chunks) * size)) for pick in picks]
        cells = [pick.item.cells[:, span] for pick, span in spans]
        nobody = torch.zeros_like(cells[0][0])
        back = [nobody if pick.entity < 0 else each[pick.entity] for pick, each in zip(picks, cells)]
        return Clip(
            torch.stack([pick.item.latents[span] for pick, span in spans]).to(device),
            [[pick.item.prompts[pick.start + k] for pick in picks] for k in range(chunks)],
            torch.stack([each.any(0) for each in cells]).to(device),
            torch.stack(back).to(device),
        )

    def stream(
        self, engine: Engine, clip: Clip, asks: Mapping[int, Sequence[tuple[float, Tensor]]], seeds: Sequence[int]
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """Stream clips through the loop, asking for the chunks in `asks` as it says.

        -> errors by chunk [asks, B, F, r, c], and the memory's own losses, mean over the chunks (with gradients only)."""
        told, size, sampler = clip.prompts, engine.layout.frames_per_chunk, engine.sampler
        script = {k: rows for k, rows in enumerate(told) if k == 0 or rows != told[k - 1]}
        session = Rollout(engine, script, seeds).session
        errors, terms = {}, []
        for chunk, truth in enumerate(clip.latents.split(size, 1)):
            sampler.truth, sampler.asks = truth, asks.get(chunk, ())
            session.step()
            if sampler.errors:
                errors[chunk] = F.avg_pool2d(torch.stack(sampler.errors).flatten(0, 2), self.patch).unflatten(
                    0, (len(sampler.errors), *truth.shape[:2])
                )
            if torch.is_grad_enabled():
                terms.append(engine.memory.losses(session.state))
        return errors, mean_of(terms)

    # the loss

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        o, size = self.options, self.engine.layout.frames_per_chunk
        self.student.refresh()
        # of one length in all processes, as they wait for the slowest
        shared = loop.generator_for(self.context.seed, step, -1)
        past = int(torch.randint(o.away + 1, o.chunks - o.asked + 1, (), generator=shared))
        pool = self.pool.at(step)
        clip = self.cut([self.draw(pool, past, generator) for _ in range(self.context.batch)], past + o.asked)
        self.asked_of = clip.prompts[past]
        chunks = range(past, past + o.asked)
        asks = {chunk: [self.ask(clip, generator) for _ in range(o.levels)] for chunk in chunks}
        seeds = torch.randint(2**62, (self.context.batch,), generator=generator).tolist()
        errors, own = self.stream(self.engine, clip, asks, seeds)
        asked = torch.stack([errors[chunk] for chunk in chunks])  # [asked, levels, B, F, r, c]
        entities = torch.stack([clip.entities[:, k * size : (k + 1) * size] for k in chunks])[:, None]
        weight = (1 + (o.entity_weight - 1) * entities.float()).expand_as(asked)
        loss = (asked * weight).sum() / weight.sum() + o.memory_weight * sum(own.values())
        if not loss.requires_grad:
            raise InputError(
                f"memory '{self.memory.called()}' with memory_options={o.memory_options} has weights that no gradient of "
                "the next chunk's error reaches; give it other options, or set tune=true"
            )
        on = asked.detach()[entities.expand_as(asked)]
        told = {"plain": asked.detach().mean(), "entity": on.mean() if len(on) else torch.zeros(())}
        return loss, told | {name: term.detach() for name, term in own.items()}

    def ask(self, clip: Clip, random: torch.Generator) -> tuple[float, Tensor]:
        """Draw a noise level, even before the warp, and the noise of a chunk."""
        sigma = float(self.schedule.warp(torch.rand((), generator=random)))
        return sigma, self.noise(clip, random)

    def noise(self, clip: Clip, random: torch.Generator) -> Tensor:
        shape = clip.latents[:, : self.engine.layout.frames_per_chunk].shape
        return torch.randn(shape, generator=random).to(clip.latents)

    def about(self) -> str:
        return "; ".join(f"'{prompt[:60]}'" for prompt in self.asked_of)

    def work(self) -> list[Work]:
        o, config, per = self.options, self.transformer.config, self.engine.layout.tokens_per_chunk
        chunks = (o.away + 1 + o.chunks + o.asked) / 2  # of an average clip
        read = int(per * chunks / 2) if self.memory.budget is None else self.memory.budget
        return [
            Work("clean passes", config, chunks, per, read, 1.0),
            Work("asking", config, o.asked, per, read, float(o.levels), backward=True, recompute=o.recompute),
        ]

    # what is measured

    def window(self) -> Memory:
        """A window of as many tokens as the memory may read, at the same places; of a whole clip, if it may read all."""
        layout, budget = self.engine.layout, self.memory.budget
        whole = self.options.chunks * layout.frames_per_chunk
        frames = whole if budget is None else min(budget // layout.tokens_per_frame, whole)
        places = {name: getattr(self.memory, name) for name in ("placing", "reach") if hasattr(self.memory, name)}
        window = frames + layout.frames_per_chunk
        return self.whole.with_memory("window", frames * layout.tokens_per_frame, window=window, **places).memory

    def measured(self) -> Clip | None:
        """Returns of held-out narratives, each after as long a past as clips have."""
        o, found, number = self.options, [], 0
        while len(found) < o.held_out and number < 8 * o.held_out:
            found += returns(self.make(HELD_OUT + number), o.chunks - 1, 1, o.away)[:1]
            number += 1
        if not found:
            log.warning(
                "no held-out narrative of %g s has a return after %d chunks; nothing is measured",
                o.seconds,
                o.chunks - 1,
            )
        return self.cut(found, o.chunks) if found else None

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Flow error of held-out returns on who returns (`return`) and everywhere (`plain`): with the memory as it is, with
        it untrained, and with a window of its budget."""
        self.student.refresh()
        self.held_out = self.held_out or self.measured()
        if self.held_out is None:
            return {}
        memories = {"": self.memory, "_window": self.window()}
        if any(True for _ in self.memory.parameters()):
            memories["_untrained"] = self.untrained.to(self.context.device)
        found = {}
        for name, memory in memories.items():
            if f"return{name}" not in self.known:
                found |= self.measure(name, replace(self.engine, memory=memory), self.held_out)
        if not self.options.tune:
            self.known |= {name: value for name, value in found.items() if name not in ("return", "plain")}
        return found | self.known

    def measure(self, name: str, engine: Engine, clip: Clip) -> dict[str, float]:
        random, size, last = torch.Generator().manual_seed(0), engine.layout.frames_per_chunk, self.options.chunks - 1
        levels = self.schedule.warp(torch.tensor(MEASURED)).tolist()
        asks = {last: [(sigma, self.noise(clip, random)) for sigma in levels]}
        errors = self.stream(engine, clip, asks, range(len(clip.latents)))[0][last]
        back = clip.returning[:, -size:].expand_as(errors)
        return {f"return{name}": float(errors[back].mean()), f"plain{name}": float(errors.mean())}
