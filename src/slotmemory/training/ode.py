"""ODE initialisation: a causal student learns to land where a many-step teacher lands (CausVid, arXiv 2412.07772).

The teacher streams clips in many guided Euler steps through the session's loop. Of every chunk are kept the states at the
levels the student's sampler visits, and where it ended. The student predicts the end from one of the states, drawn for
each chunk, while it reads its own memory of the teacher's past chunks. Trajectories are made when they are needed, a
sliding set of them at a time, and kept as files where `pairs` names a folder.

The published pairs come from a table of shift 8 and are told to be at the levels of shift 5; here they are made and told
at the same levels (`compat: [mislabelled]` repeats it). Their student reads noised chunks as its past, ours clean ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slotmemory.backbones.guided import Guided
from slotmemory.sampler import Draw, Euler, FlowSchedule, Predict, euler_step, flow_to_x0
from slotmemory.training import loop
from slotmemory.training.narratives import Pool, PoolSize, Refresh
from slotmemory.training.plan import Work
from slotmemory.training.prompts import together
from slotmemory.training.rollout import Rollout, engine_for
from slotmemory.training.student import Student, StudentOptions
from slotmemory.tree import tree_from_file, tree_to_file

Pair = dict[str, Any]  # script: [[chunk, prompt]], chunks: [[states [steps, F, C, h, w], end [F, C, h, w]]]


class Options(StudentOptions):
    """How the teacher's trajectories are made and kept."""

    teacher_steps: int = Field(48, ge=1, description="Euler steps of the teacher")
    pool: PoolSize = 16
    refresh: Refresh = 10
    pairs: str | None = Field(None, description="a folder that keeps the teacher's trajectories")
    compat: tuple[Literal["mislabelled"], ...] = Field(
        (), description="pairs made at shift 8, told as the sampler's levels"
    )


class Trajectory:
    """A many-step sampler that notes where it is at given timesteps, and where it ends."""

    def __init__(self, count: int, schedule: FlowSchedule, levels: Sequence[float]):
        self.schedule, self.levels = schedule, list(levels)
        even = Euler(count, schedule).timesteps
        apart = [t for t in even if min(abs(t - level) for level in levels) > 1e-3]
        self.timesteps = sorted([*apart, *levels], reverse=True)
        self.noted: list[tuple[Tensor, Tensor]] = []  # per chunk: states [B, steps, F, C, h, w] and end [B, F, C, h, w]

    def denoise(self, predict: Predict, noise: Tensor, draw: Draw) -> Tensor:
        x, states = noise, {}
        for t, following in zip(self.timesteps, [*self.timesteps[1:], 0.0]):
            if t in self.levels:
                states[t] = x
            x = euler_step(predict(x, t), x, t / 1000, following / 1000)
        self.noted.append((torch.stack([states[t] for t in self.levels], 1), x))
        return x


class Forced:
    """A sampler that predicts a chunk's end from one state of a trajectory, and leaves the end itself to the stream."""

    def __init__(self, schedule: FlowSchedule, levels: Sequence[float], chunks: Sequence[tuple[Tensor, Tensor]]):
        """chunks: in order, states [B, steps, F, C, h, w] and end [B, F, C, h, w]."""
        self.schedule, self.levels, self.chunks = schedule, list(levels), list(chunks)
        self.draws: list[int] = []  # the level of each chunk
        self.predicted: list[Tensor] = []
        self.exit = 0

    def denoise(self, predict: Predict, noise: Tensor, draw: Draw) -> Tensor:
        number = len(self.predicted)
        states, end = self.chunks[number]
        x, t = states[:, self.draws[number]], self.levels[self.draws[number]]
        self.predicted.append(flow_to_x0(predict(x, t), x, self.schedule.sigma(t)))
        return end


class Objective(Student):
    """Regress the teacher's ends."""

    def __init__(self, options: Options, context: loop.Context):
        super().__init__(options, context)
        self.levels = self.schedule.few_step(options.steps)
        made_on = FlowSchedule(8.0) if "mislabelled" in options.compat else self.schedule
        self.trajectory = Trajectory(options.teacher_steps, made_on, made_on.few_step(options.steps))
        backbone = self.teacher
        if options.guidance:
            backbone = Guided(backbone, lambda: self.text.embed([self.negative])[0], options.guidance)
        self.streaming = replace(engine_for(self.whole, backbone=backbone, text=self.text), sampler=self.trajectory)
        self.pool = Pool(self.make, options.pool, options.refresh, context.seed, context.rank)
        self.told: list[str] = []

    @torch.no_grad()
    def make(self, seed: int) -> Pair:
        """Stream one clip with the teacher, or read it from its file."""
        path = Path(self.options.pairs) / f"{seed:010d}.safetensors" if self.options.pairs else None
        if path is not None and self.context.agreed_all(path.is_file()):
            return tree_from_file(path)
        random = torch.Generator().manual_seed(seed)
        script = self.source.script(self.options.chunks, random)
        self.trajectory.noted = []
        Rollout(self.streaming, together([script]), [seed]).roll(self.options.chunks, 0)
        chunks = [[states[0], end[0]] for states, end in self.trajectory.noted]
        pair = {"script": [[chunk, prompt] for chunk, prompt in script.items()], "chunks": chunks}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            tree_to_file(pair, path)
        return pair

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.student.refresh()
        pool = self.pool.at(step)
        chosen = [pool[i] for i in torch.randint(len(pool), (self.context.batch,), generator=generator).tolist()]
        scripts = [{chunk: prompt for chunk, prompt in pair["script"]} for pair in chosen]
        self.told = [script[0] for script in scripts]
        device = self.context.device
        chunks = [
            tuple(torch.stack([pair["chunks"][k][part] for pair in chosen]).to(device) for part in (0, 1))
            for k in range(self.options.chunks)
        ]
        sampler = Forced(self.schedule, self.levels, chunks)
        sampler.draws = torch.randint(len(self.levels), (len(chunks),), generator=generator).tolist()
        seeds = torch.randint(2**62, (len(chosen),), generator=generator).tolist()
        clip = Rollout(replace(self.engine, sampler=sampler), together(scripts), seeds).roll(len(chunks), 0)
        errors = [(x - end).float().square().mean() for x, (_, end) in zip(sampler.predicted, chunks)]
        ends = torch.stack(errors).mean()
        terms = {"ends": ends.detach(), **{name: term.detach() for name, term in clip.losses.items()}}
        return ends + self.options.memory_weight * sum(clip.losses.values()), terms

    def work(self) -> list[Work]:
        o, layout = self.options, self.engine.layout
        per, read = layout.tokens_per_chunk, self.memory.budget or 0
        passes = len(self.trajectory.timesteps) * (2 if o.guidance else 1) + 1
        student = self.transformer.config
        return [
            Work("trajectories", self.teacher.config, o.chunks, per, read, passes / o.refresh / self.context.batch),
            Work("clean passes", student, o.chunks, per, read, 1.0),
            Work("student", student, o.chunks, per, read, 1.0, backward=True, recompute=o.recompute),
        ]

    def about(self) -> str:
        return "; ".join(f"'{prompt[:60]}'" for prompt in self.told)
