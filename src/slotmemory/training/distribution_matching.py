"""Distribution matching distillation of a causal student on its own rollouts (Self-Forcing, arXiv 2506.08009).

A student makes clips in few steps through the session's loop. Two scores look at them: the real one, a frozen many-step
teacher, guided; and the fake one, the critic, which learns to denoise what the student makes. The student follows their
difference. Critic updates happen in every step, generator updates in every `ratio`-th, and both are counted.

It knows no memory: any policy can be in the loop, and what it has to learn (`Memory.losses`) is added. Differences from
the published trainer, on purpose: scores and student share one table of noise levels; in a generator step the critic's
clip is made before the generator's update, not after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from slotmemory.sampler import FlowSchedule
from slotmemory.training import loop, scores
from slotmemory.training.networks import Cast, add_lora, load_transformer
from slotmemory.training.plan import Work
from slotmemory.training.policies import InTraining
from slotmemory.training.prompts import together
from slotmemory.training.rollout import Clip, Rollout, engine_for
from slotmemory.training.student import Student, StudentOptions, group

Compat = Literal["score_shift", "null_sink", "leaking_cache", "mutated_bank"]


class Options(StudentOptions):
    """How clips are made and scored, beside what every student has."""

    critic: str | None = Field(
        None, description="where the fake score starts, as `student`; none: the teacher's weights"
    )
    memory_gradients: Literal["off", "exit_step"] = Field(
        "off",
        description="exit_step: the memory's losses reach the student, by the features of its last denoising pass",
    )
    last_step_only: bool = Field(False, description="always run all denoising steps; else a random number of them")
    score: Literal["causal", "joint"] = Field(
        "causal",
        description="scores see chunk after chunk, each with its clean past; or whole clips, all frames at once",
    )
    seen: int = Field(2, ge=0, description="past chunks that a causal score sees beside the first of the stream")
    lowest: float = Field(20.0, description="smallest timestep of a score, of 1000")
    highest: float = Field(980.0, description="largest timestep of a score")
    ratio: int = Field(5, ge=1, description="critic updates per generator update")
    critic_rate: float = Field(0.2, gt=0, description="the critic's learning rate, in that of the generator")
    critic_clip: float = Field(10.0, gt=0, description="largest norm of the critic's gradient")
    compat: tuple[Compat, ...] = Field(
        (),
        description="repeat defects of the published trainers; score_shift: scores look noise levels up in a table of shift "
        "8; for the others see training/policies.py",
    )

    @model_validator(mode="after")
    def _possible(self) -> Options:
        if "mutated_bank" in self.compat and not self.recompute:
            raise ValueError("compat=mutated_bank shows only where passes are computed again; set recompute: true")
        return self


class Objective(Student):
    """Train generator and critic; the memory's weights go with the generator."""

    auxiliary = Student.auxiliary | {"critic"}

    def __init__(self, options: Options, context: loop.Context):
        super().__init__(options, context)
        start = options.critic or options.teacher or options.student
        part = "critic" if options.critic else "transformer"
        self.critic = load_transformer(start, options.base, context.device, part)
        if options.lora:
            add_lora(self.critic, options.lora)
        self.fake = Cast(self.critic, context.dtype, options.recompute)
        layout = self.engine.layout
        through = ("hidden",) if options.memory_gradients == "exit_step" else ()
        defects = [name for name in options.compat if name != "score_shift"]
        if through or defects:
            length = options.chunks * layout.frames_per_chunk
            policy = InTraining(self.memory, self.student, through, defects, length)
            self.engine = engine_for(self.whole, backbone=self.student, memory=policy)
        self.looked_up = FlowSchedule(8.0) if "score_shift" in options.compat else self.schedule
        self.view: scores.View = scores.Joint()
        if options.score == "causal":
            self.view = scores.Causal(layout.frames_per_chunk, options.seen, self.engine.context_noise)
        self.told: list[str] = []

    # what is trained

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), "critic": self.critic}

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), self.critic]

    def parameter_groups(self) -> list[dict[str, Any]]:
        critic = group("critic", self.critic, self.options.critic_rate, self.options.critic_clip)
        return [*super().parameter_groups(), critic]

    def generator_step(self, step: int) -> bool:
        return step % self.options.ratio == 0

    def trains(self, step: int) -> frozenset[str]:
        return frozenset(("transformer", self.memory_name, "critic") if self.generator_step(step) else ("critic",))

    # clips

    def exits(self, step: int) -> list[int]:
        """The denoising step at which the generator's and the critic's clip stop: the same on all ranks."""
        count = len(self.options.steps)
        if self.options.last_step_only:
            return [count - 1] * 2
        return torch.randint(count, (2,), generator=loop.generator_for(self.context.seed, step, -1)).tolist()

    def clip(self, exit: int, random: torch.Generator) -> Clip:
        """Make a clip from the start of new streams."""
        scripts = [self.source.script(self.options.chunks, random) for _ in range(self.context.batch)]
        seeds = torch.randint(2**62, (len(scripts),), generator=random).tolist()
        return Rollout(self.engine, together(scripts), seeds).roll(self.options.chunks, exit)

    def watching(self) -> AbstractContextManager:
        """How the critic's clips are made: nobody but the critic learns from them."""
        return torch.no_grad()

    # losses

    def generator_loss(self, clip: Clip, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared distance to where the scores' difference points."""
        given = self.noised(clip, random)
        with torch.no_grad():
            fake = self.predicted(self.fake, clip, given)
            real = self.predicted(self.teacher, clip, given)
            real = scores.guide(real, *self.away(clip, given))
            gradient = scores.kl_gradient(given.rows.detach(), fake, real)
        loss = scores.matching_loss(given.rows, gradient, self.view.counts(clip)).float()
        return loss, {"matching": loss.detach(), "difference": (fake - real).abs().mean()}

    def critic_loss(self, clip: Clip, random: torch.Generator) -> Tensor:
        """Flow matching of what the generator makes."""
        given = self.noised(clip, random)
        flow = self.view.flow(self.fake, self.text, clip, given.noisy, given.timesteps, None, given.past)
        return scores.flow_loss(flow, given.rows.detach(), given.noise, self.view.counts(clip))

    def noised(self, clip: Clip, random: torch.Generator) -> scores.Noised:
        o = self.options
        return scores.noised(clip, self.view, self.schedule, random, lowest=o.lowest, highest=o.highest)

    def predicted(
        self, network: Cast, clip: Clip, given: scores.Noised, negative: Sequence[str] | None = None
    ) -> Tensor:
        return scores.predicted(network, self.view, self.text, clip, given, self.looked_up, negative)

    def away(self, clip: Clip, given: scores.Noised) -> list[tuple[float, Tensor]]:
        """What the teacher's prediction is led away from, with the scale of each (`scores.guide`)."""
        if not self.options.guidance:
            return []
        negative = [self.negative] * len(given.noisy)
        return [(self.options.guidance, self.predicted(self.teacher, clip, given, negative))]

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.student.refresh()
        self.fake.refresh()
        first, second = self.exits(step)
        total, terms = torch.zeros((), device=self.context.device), {}
        if self.generator_step(step):
            clip = self.clip(first, generator)
            self.told = clip.prompts[-1]
            matching, terms = self.generator_loss(clip, generator)
            total = total + matching + self.memory_loss(clip, terms)
        with self.watching():
            clip = self.clip(second, generator)
        self.told = clip.prompts[-1]
        critic = self.critic_loss(clip, generator)
        total = total + critic + self.memory_loss(clip, terms)
        updates = {"generator_updates": step // self.options.ratio + 1, "critic_updates": step + 1}
        counted = {name: torch.tensor(float(count)) for name, count in updates.items()}
        return total, {**terms, "critic": critic.detach(), **counted}

    def memory_loss(self, clip: Clip, terms: dict[str, Tensor]) -> Tensor | float:
        """The memory's own losses, weighed; each is noted among the terms."""
        terms.update({name: term.detach() for name, term in clip.losses.items()})
        return self.options.memory_weight * sum(clip.losses.values())

    # what it costs

    def readings(self) -> int:
        """How often the teacher is asked about a clip, at most."""
        return 2 if self.options.guidance else 1

    def chunks_per_clip(self) -> float:
        """New chunks of an average clip."""
        return self.options.chunks

    def work(self) -> list[Work]:
        o, layout, student = self.options, self.engine.layout, self.transformer.config
        made, passes = self.chunks_per_clip(), len(o.steps) if o.last_step_only else (len(o.steps) + 1) / 2
        per, read = layout.tokens_per_chunk, self.memory.budget or 0
        joint = o.score == "joint"
        tokens = o.chunks * per if joint else per
        keys = 0 if joint else (1 + o.seen) * per
        rows = 1.0 if joint else 2 * made + o.seen  # clean chunks are run beside the noised ones

        def scored(name: str, network, times: float, **how: bool) -> Work:
            return Work(name, network.config, rows, tokens, keys, times, **how)

        clips = 1 + 1 / o.ratio
        return [
            Work("rollouts", student, made, per, read, clips * (passes + 1) - 1 / o.ratio),
            Work("generator", student, made, per, read, 1 / o.ratio, backward=True, recompute=o.recompute),
            scored("real score", self.teacher, self.readings() / o.ratio),
            scored("fake score", self.fake, 1 / o.ratio),
            scored("critic", self.fake, 1.0, backward=True, recompute=o.recompute),
        ]

    def about(self) -> str:
        return "; ".join(f"'{prompt[:60]}'" for prompt in self.told)
