"""A warm-up for slots: bind what a fixed transformer shows of whole videos, before slots take part in any rollout.

Each step shows the memory clips chunk by chunk, one clean pass each (`Session.prefill`), and teaches it by its own losses,
contrast and reconstruction. Nothing else learns. `on: world` shows narratives, `on: own` what the model makes itself, and
any other name is a folder of video files (`training/videos.py`). With `record` a video passes through the transformer once,
as it joins the pool, and steps see its features alone: the transformer does not change, and slots are small beside it.
Slots that come from elsewhere (SlotContrast) do not need it; slots that start at random would be frozen at random in
SlotMemory's first stage without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from slotmemory.memory import State, Written
from slotmemory.session import Session
from slotmemory.training import loop
from slotmemory.training.lessons import DECODER, LessonOptions, Lessons, slot_arguments
from slotmemory.training.narratives import Encoded, Pool, PoolSize, Refresh, Seconds, encode
from slotmemory.training.policies import InTraining
from slotmemory.training.prompts import together
from slotmemory.training.rollout import Rollout, mean_of
from slotmemory.training.student import Student, StudentOptions
from slotmemory.training.videos import Shown, Videos
from slotmemory.world.narrative import Narrative
from slotmemory.world.renderer import WorldSize


class Options(StudentOptions, LessonOptions):
    """What is shown, and how slots learn from it."""

    memory: Literal["slots"] = "slots"
    on: str = Field("world", description="the narrative world, the model's own streams, or a folder of videos")
    seconds: Seconds = 24.0
    pool: PoolSize = 16
    refresh: Refresh = 5
    record: bool = Field(False, description="keep each one's features in memory, so that a step costs slots alone")

    @model_validator(mode="after")
    def _possible(self) -> Options:
        if self.record and self.on == "own":
            raise ValueError(
                "record=true with on=own: what the model makes is new in every step; use on=world or a folder"
            )
        return self


@dataclass(frozen=True)
class Recorded:
    """A video as slots see it: per chunk the features [L, N, W] of its clean pass, and whether its prompt was new."""

    hidden: list[Tensor]
    switched: list[bool]

    @property
    def chunks(self) -> int:
        return len(self.hidden)


class Recording(InTraining):
    """A policy that leaves beside its own state what the clean pass showed it: `seen`, of a stream of one row."""

    def write(self, state: State, written: Written) -> State:
        seen = torch.stack([layer.hidden[0] for layer in written.layers]).to(torch.bfloat16)
        return {**super().write(state, written), "seen": Recorded([seen], [written.now.switched])}


class Objective(Student):
    """Train the slots of a memory and nothing else."""

    auxiliary = Student.auxiliary | {DECODER}

    def __init__(self, options: Options, context: loop.Context):
        super().__init__(options, context)
        self.transformer.requires_grad_(False)
        self.lessons = Lessons(options, self.memory, context, reconstruct=True)
        self.videos = None if options.on in ("world", "own") else Videos(options.on, self.engine.layout)
        self.pool = Pool(self.make, options.pool, options.refresh, context.seed, context.rank)

    def modules(self) -> dict[str, nn.Module]:
        return {self.memory_name: self.memory, **self.lessons.modules()}

    def networks(self) -> list[nn.Module]:
        return []  # videos that differ in length take different passes

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    def metadata(self, module: str) -> dict[str, str]:
        return {} if module == DECODER else super().metadata(module)

    def memory_arguments(self) -> dict[str, Any]:
        return slot_arguments(self.memory)

    def make(self, seed: int) -> Encoded | Shown | Recorded:
        video = self.video(seed)
        return self.recorded(video) if self.options.record else video

    @torch.no_grad()
    def recorded(self, video: Encoded | Shown) -> Recorded:
        """Pass a video through the transformer, once; without a bank, whose items would depend on what slots have learnt."""
        o = self.options
        bare = self.whole.with_memory("slots", o.budget, **{**self.memory_given, "bank": 0}).memory
        engine = replace(self.engine, memory=Recording(bare, self.student))
        session = Rollout(engine, {0: [""]}, [0]).session
        seen = [self.prefill(session, [video], [chunk])["seen"] for chunk in range(video.chunks)]
        return Recorded([x.hidden[0] for x in seen], [x.switched[0] for x in seen])

    def video(self, seed: int) -> Encoded | Shown:
        layout = self.engine.layout
        if self.videos is not None:
            to = {"device": self.context.device, "dtype": self.codec.dtype}
            return self.videos.encoded(seed, self.options.chunks, lambda pixels: self.codec.encode(pixels.to(**to)))
        return encode(Narrative.random(seed, self.options.seconds, WorldSize(layout.width, layout.height)), self.codec)

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.lessons.at(step)
        show = self.own if self.options.on == "own" else self.replay if self.options.record else self.shown
        losses, state = show(step, generator)
        measured = self.lessons.note(state)
        self.lessons.close()  # every step shows other streams
        terms = {name: term.detach() for name, term in losses.items()}
        return sum(losses.values()), {**terms, **measured}

    def clips(self, step: int, random: torch.Generator) -> tuple[list[Any], list[list[int]]]:
        """Draw a video per row, and the places in it of the chunks that are shown, [chunks][rows]."""
        pool = self.pool.at(step)
        chosen = [pool[i] for i in torch.randint(len(pool), (self.context.batch,), generator=random).tolist()]
        picks = torch.rand(len(chosen), generator=random).tolist()
        starts = [int(pick * max(1, item.chunks - self.options.chunks + 1)) for item, pick in zip(chosen, picks)]
        length = min(self.options.chunks, *(item.chunks for item in chosen))
        return chosen, [[start + chunk for start in starts] for chunk in range(length)]

    def prefill(self, session: Session, chosen: list[Encoded | Shown], places: list[int]) -> State:
        """Give a stream one chunk of each of its rows' videos as its past."""
        size = self.engine.layout.frames_per_chunk
        session.prompts[session.index] = "\n".join(item.prompts[k] for item, k in zip(chosen, places))
        latents = torch.stack([item.latents[k * size : (k + 1) * size] for item, k in zip(chosen, places)])
        session.prefill(latents.to(self.context.device))
        return session.state

    def shown(self, step: int, random: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Show a clip of a narrative or a video per row."""
        chosen, places = self.clips(step, random)
        seeds = torch.randint(2**62, (len(chosen),), generator=random).tolist()
        session = Rollout(self.engine, {0: [""] * len(chosen)}, seeds).session
        terms = [self.memory.losses(self.prefill(session, chosen, row)) for row in places]
        return mean_of(terms), session.state

    def replay(self, step: int, random: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Show recorded features of a clip per row."""
        chosen, places = self.clips(step, random)
        state, terms = {"running": None, "mass": None}, []
        for row in places:
            hidden = torch.stack([item.hidden[k] for item, k in zip(chosen, row)], 1).float()
            switched = any(item.switched[k] for item, k in zip(chosen, row))
            _, lesson = self.memory.bind(state["running"], state["mass"], hidden, switched)
            state = {"running": lesson.slots, "mass": lesson.mass.detach(), "lesson": vars(lesson)}
            terms.append(self.memory.losses(state))
        return mean_of(terms), state

    def own(self, step: int, random: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Show what the model makes."""
        scripts = [self.source.script(self.options.chunks, random) for _ in range(self.context.batch)]
        seeds = torch.randint(2**62, (len(scripts),), generator=random).tolist()
        rollout = Rollout(self.engine, together(scripts), seeds)
        return rollout.roll(self.options.chunks, len(self.options.steps) - 1).losses, rollout.session.state

    def sample(self, step: int, folder) -> None:
        """Nothing that is seen has changed."""

    def state(self) -> dict[str, Any] | None:
        return self.lessons.state() if self.context.processes == 1 else None

    def resume(self, state: dict[str, Any]) -> None:
        self.lessons.resume(state)
