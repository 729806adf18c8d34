"""Streaming long tuning: distribution matching on clip after clip of long streams with prompt switches (LongLive).

Every clip goes on from the model's own earlier ones, whose state is cut from the graph, so that the student learns under
the errors and the memory it will have when it streams. The first clip of a stream has `chunks` chunks, later ones `new`
more; a stream that cannot take another clip within `length` makes room for a new one. Generator and critic steps consume
clips of the same stream in turn.

Differences from the published trainers: the sink outlives switches here as it does when streaming (theirs is zeroed, see
`compat: [null_sink]`), and what is cut from the graph is cut everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slotmemory.errors import InputError
from slotmemory.training import distribution_matching, loop, scores
from slotmemory.training.prompts import reminder, together
from slotmemory.training.rollout import Clip, Rollout


class Options(distribution_matching.Options):
    """How long streams are, where their prompts switch, and what scores are shown of the past."""

    new: int = Field(6, ge=1, description="chunks that a later clip adds")
    length: int = Field(240, description="latent frames of a stream, at most")
    switches: tuple[int, ...] = Field(
        (21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201),
        description="latent frames, one of which is drawn for each stream's prompt switch; (): where the source has them",
    )
    opening: bool = Field(
        True, description="joint scores: a later clip's first latent frame is encoded anew as an image"
    )
    reminders: bool = Field(
        False,
        description="causal scores: the first two chunks of a returning entity see the last that showed it (narrative world)",
    )
    reminder_guidance: float = Field(
        0.0,
        ge=0,
        description="teacher: reminder_guidance (conditional - the same without its reminder) beside guidance",
    )
    switch_guidance: float = Field(
        0.0, ge=0, description="teacher: switch_guidance (conditional - the same under the prompt before a switch), too"
    )
    reminder_weight: float = Field(
        1.0, gt=0, description="how often a chunk with a reminder counts, for generator and critic"
    )

    @model_validator(mode="after")
    def _fits(self) -> Options:
        if self.new > self.chunks:
            raise ValueError(f"new={self.new} is more than a clip's chunks={self.chunks}")
        if self.reminder_guidance and not (self.reminders and self.score == "causal"):
            raise ValueError("reminder_guidance needs reminders=true and score=causal; else nothing reminds a score")
        if self.switch_guidance and self.score != "causal":
            raise ValueError("switch_guidance needs score=causal; a joint score has one prompt for a whole clip")
        return self


class Objective(distribution_matching.Objective):
    """Train on one stream per batch row at a time, continued from step to step."""

    def __init__(self, options: Options, context: loop.Context):
        super().__init__(options, context)
        self.size = self.engine.layout.frames_per_chunk
        self.stream: Rollout | None = None
        if isinstance(self.view, scores.Causal):
            self.view = replace(self.view, reminder_weight=options.reminder_weight)
        for switch in options.switches:
            if switch % self.size:
                raise InputError(f"switches: {switch} is not a multiple of {self.size}, the latent frames of a chunk")

    @property
    def keep(self) -> int:
        """Latent frames of the past that a clip needs."""
        if self.options.score == "joint":
            return self.options.chunks * self.size
        return self.options.seen * self.size

    def clip(self, exit: int, random: torch.Generator) -> Clip:
        o = self.options
        if self.stream is None or self.stream.frame + o.new * self.size > o.length:
            self.ended()
            self.stream = self.begin(random)
        clip = self.stream.roll(o.new if self.stream.frame else o.chunks, exit)
        if o.score == "joint":
            return self.last_chunks(clip)
        return self.reminded(clip) if o.reminders else clip

    def begin(self, random: torch.Generator) -> Rollout:
        """Open a stream per batch row; their prompts switch at the same chunk."""
        o, switch = self.options, None
        if o.switches:
            drawn = int(torch.randint(len(o.switches), (), generator=random))
            switch = o.switches[self.context.agreed(drawn)] // self.size
        chunks = o.length // self.size
        scripts = [self.source.script(chunks, random, switch) for _ in range(self.context.batch)]
        seeds = torch.randint(2**62, (len(scripts),), generator=random).tolist()
        return Rollout(self.engine, self.in_step(together(scripts)), seeds, self.keep, self.options.reminders)

    def in_step(self, script: dict[int, list[str]]) -> dict[int, list[str]]:
        """Prompts that change on all processes or on none where a change takes passes that all must make."""
        told = [script[chunk] for chunk in sorted(script)]
        changes = len(told) == 2 and told[0] != told[1]
        return script if not self.context.in_step or self.context.agreed_all(changes) else {0: told[0]}

    def readings(self) -> int:
        return super().readings() + bool(self.options.reminder_guidance) + bool(self.options.switch_guidance)

    def chunks_per_clip(self) -> float:
        o = self.options
        later = max(0, o.length // self.size - o.chunks) // o.new
        return (o.chunks + later * o.new) / (1 + later)

    def ended(self) -> None:
        """Called when a stream is over."""

    def last_chunks(self, clip: Clip) -> Clip:
        """A clip's last `chunks` chunks, as a network that sees whole clips was trained on them."""
        surplus = clip.latents.shape[1] - self.options.chunks * self.size
        if surplus <= 0:
            return clip
        latents = clip.latents[:, surplus:]
        if self.options.opening:  # a video's first latent frame is an image; inside a stream it is four frames
            with torch.no_grad():
                shown = self.codec.decode(clip.latents[:, : surplus + 1].detach().to(self.codec.dtype))
                image = self.codec.encode(shown[:, -1:])
            latents = torch.cat((image.to(latents.dtype), latents[:, 1:]), 1)
        prompts = clip.prompts[surplus // self.size :]
        return replace(clip, latents=latents, past=clip.past - surplus, start=clip.start + surplus, prompts=prompts)

    def reminded(self, clip: Clip) -> Clip:
        """Name for every new chunk the earlier one that its score may see, where an entity of its prompt returns."""
        told, first = self.stream.told(), clip.start // self.size
        found: list[dict[int, tuple[Tensor, str]]] = []
        for row in range(len(clip.latents)):
            prompts = [lines[row] for lines in told]
            chunks = {}
            for chunk in range(first + clip.past // self.size, len(prompts)):
                back = reminder(prompts, chunk, self.options.seen)
                if back is not None:
                    chunks[chunk - first] = (self.stream.made[back][row], prompts[back])
            found.append(chunks)
        return replace(clip, reminders=found)

    def away(self, clip: Clip, given: scores.Noised) -> list[tuple[float, Tensor]]:
        found = super().away(clip, given)
        if self.options.reminder_guidance and any(clip.reminders):
            alone = replace(clip, reminders=[])
            past = given.past[: self.view.past_shape(alone)[0]]  # noise of reminders comes last
            forgetful = self.predicted(self.teacher, alone, replace(given, past=past))
            found.append((self.options.reminder_guidance, forgetful))
        if self.options.switch_guidance:
            before = self.view.prompts_before(clip)
            if before != self.view.prompts(clip):
                late = self.predicted(self.teacher, clip, given, before)
                found.append((self.options.switch_guidance, late))
        return found

    # what outlives a step

    def state(self) -> dict[str, Any] | None:
        # with several processes all begin new streams together: only one of them writes the checkpoint
        if self.stream is None or self.context.processes > 1:
            return None
        return {"stream": self.stream.state()}

    def resume(self, state: dict[str, Any]) -> None:
        self.student.refresh()
        self.stream = Rollout.from_state(self.engine, state["stream"], self.keep, self.options.reminders)
