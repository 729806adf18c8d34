"""The session as a differentiable rollout: the one loop over chunks, stopped at a random denoising step.

Gradients run through the last pass of each chunk and no further: earlier denoising steps, clean passes and what a chunk
leaves for the next are constants (Self-Forcing, arXiv 2506.08009), except what a memory makes with weights of its own.
A rollout goes on from its own earlier state, cut from the graph, for as long as it is wanted (LongLive's streaming tuning).
It knows no loss.

Legend: B streams, F latent frames, C channels, h, w latent size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slotmemory.engine import Engine
from slotmemory.sampler import Draw, FewStep, Predict, add_noise, flow_to_x0
from slotmemory.session import Session
from slotmemory.training.networks import Lines, Undecoded


class ExitStep:
    """A few-step sampler that stops at step number `exit` and returns what that step predicts.

    Only that step records gradients; `exit` is set before every rollout.
    """

    def __init__(self, sampler: FewStep):
        if not isinstance(sampler, FewStep):
            raise TypeError("distilled students are sampled in few steps; give the engine a list of steps")
        self.sampler, self.schedule = sampler, sampler.schedule
        self.exit = len(sampler.timesteps) - 1

    @property
    def timesteps(self) -> list[float]:
        return self.sampler.timesteps

    def denoise(self, predict: Predict, noise: Tensor, draw: Draw) -> Tensor:
        x, recording = noise, torch.is_grad_enabled()
        for i, t in enumerate(self.timesteps[: self.exit + 1]):
            sigma = self.schedule.sigma(t)
            if i:
                x = add_noise(x, draw(), sigma)
            with torch.set_grad_enabled(recording and i == self.exit):
                x = flow_to_x0(predict(x, t), x, sigma)
        return x


@dataclass(frozen=True)
class Clip:
    """What a rollout made, with some of what came before it.

    latents [B, F, C, h, w]: `past` latent frames that are constants, then the new ones, with gradients if recorded;
    start: the stream's latent frame at which they begin; first [B, 3, C, h, w] and opening: the stream's first chunk and
    its prompts; prompts: per chunk of the clip one for each row; losses: of the memory, by name, mean over the new chunks.
    reminders: per row, for chunks of the clip by number, an earlier chunk [3, C, h, w] that a score may see, and its prompt.
    """

    latents: Tensor
    past: int
    start: int
    first: Tensor
    opening: list[str]
    prompts: list[list[str]]
    losses: dict[str, Tensor] = field(default_factory=dict)
    reminders: list[dict[int, tuple[Tensor, str]]] = field(default_factory=list)

    @property
    def new(self) -> Tensor:
        return self.latents[:, self.past :]


class Rollout:
    """Streams of one engine in training, one per script, all switching by chunk number.

    script: prompts by the chunk at which any row changes, one for each row; keep: latent frames of the past that a clip
    shows; keep_all: all chunks stay in `made`. The engine's sampler must be an `ExitStep` (`engine_for`).
    """

    def __init__(
        self,
        engine: Engine,
        script: Mapping[int, Sequence[str]],
        seeds: Sequence[int],
        keep: int = 0,
        keep_all: bool = False,
    ):
        prompts = {chunk: "\n".join(rows) for chunk, rows in script.items()}
        self.session = Session(engine, prompts, None, seeds)
        self.session.differentiable = True
        self.keep, self.keep_all = keep, keep_all
        self.made: list[Tensor] = []  # [B, F, C, h, w] each
        self.past: Tensor | None = None
        self.first: Tensor | None = None

    @property
    def frame(self) -> int:
        """Latent frames made so far."""
        return self.session.frame

    def told(self) -> list[list[str]]:
        """The prompts of all chunks made so far, per chunk one for each row."""
        return [self.session.prompt_at(chunk)[1].split("\n") for chunk in range(self.session.index)]

    def roll(self, chunks: int, exit: int) -> Clip:
        """Make the next chunks, stopping at denoising step number `exit`; gradients are recorded if the caller does."""
        session, memory = self.session, self.session.engine.memory
        session.engine.sampler.exit = exit
        # weights have changed since: cut from their graph, and told its prompt by the present ones
        session.restore(cut(session.snapshot()))
        length = session.engine.layout.frames_per_chunk
        past = 0 if self.past is None else self.past.shape[1]
        start = session.frame - past
        made, terms = [], []
        for _ in range(chunks):
            made.append(session.step().latents)
            if torch.is_grad_enabled():
                terms.append(memory.losses(session.state))
        latents = torch.cat(made if self.past is None else [self.past, *made], 1)
        if self.first is None:
            self.first = made[0].detach()
        self.past = latents[:, max(0, latents.shape[1] - self.keep) :].detach() if self.keep else None
        if self.keep_all:
            self.made += [latents.detach() for latents in made]
        told = self.told()
        return Clip(latents, past, start, self.first, told[0], told[start // length :], mean_of(terms))

    def state(self) -> dict[str, Any]:
        """Everything that changes, as a plain tree."""
        session = cut(self.session.snapshot())
        return {"session": session, "past": self.past, "first": self.first, "made": self.made}

    @classmethod
    def from_state(cls, engine: Engine, state: dict[str, Any], keep: int = 0, keep_all: bool = False) -> Rollout:
        """Go on from `state`."""
        saved = state["session"]
        rollout = cls(engine, {0: [""]}, [0] * len(saved["noise"]), keep, keep_all)
        rollout.session.restore(saved)
        rollout.past, rollout.first, rollout.made = state["past"], state["first"], state["made"]
        return rollout


def engine_for(engine: Engine, **parts: Any) -> Engine:
    """Make an engine that rolls out: latents are not decoded, prompts are told by line, the sampler can be stopped.

    parts: what else replaces the engine's own, such as backbone and memory; a sampler among them stays as it is."""
    engine = replace(engine, **parts)
    text = engine.text if isinstance(engine.text, Lines) else Lines(engine.text)
    sampler = engine.sampler if "sampler" in parts else ExitStep(engine.sampler)
    return replace(engine, codec=Undecoded(engine.dtype), text=text, sampler=sampler)


def cut(tree: Any) -> Any:
    """Detach every tensor of a plain tree."""
    if isinstance(tree, Tensor):
        return tree.detach()
    if isinstance(tree, dict):
        return {k: cut(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(cut(v) for v in tree)
    return tree


def mean_of(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average losses by name over the chunks that had them."""
    names = dict.fromkeys(name for each in terms for name in each)
    return {name: torch.stack([each[name] for each in terms if name in each]).mean() for name in names}
