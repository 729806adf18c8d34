"""Distribution matching distillation of a causal student on its own rollouts (Self-Forcing, arXiv 2506.08009).

A student makes clips in few steps through the session's loop. Two scores look at them: the real one, a frozen many-step
teacher, guided; and the fake one, the critic, which learns to denoise what the student makes. The student follows their
difference. Critic updates happen in every step, generator updates in every `ratio`-th, and both are counted.

It knows no memory: any policy can be in the loop, and what it has to learn (`Memory.losses`) is added. Differences from
the published trainer, on purpose: scores and student share one table of noise levels; in a generator step the critic's
clip is made before the generator's update, not after it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from slotmemory.codecs.words import WordEncoder
from slotmemory.sampler import FlowSchedule
from slotmemory.training import loop, scores
from slotmemory.training.networks import Cast, Lines, load_transformer, open_engine
from slotmemory.training.prompts import open_source, together
from slotmemory.training.recipe import Frozen
from slotmemory.training.rollout import Clip, Rollout, engine_for

Compat = Literal["score_shift"]


class Options(Frozen):
    """Where the three networks start, how clips are made, and how they are scored."""

    student: str = Field("tiny", description="where the generator starts: a training run, a model folder or its name")
    teacher: str | None = Field(None, description="the real score, frozen; none: what the student starts from")
    critic: str | None = Field(None, description="where the fake score starts; none: the teacher's weights")
    codec: str = Field("src/slotmemory/assets/tiny/codec.safetensors", description="beside a training run's weights")
    prompts: str = Field("world", description="the narrative world's stories, or a file of prompts")
    follow: str | None = Field(None, description="a second file: line i continues line i of the first")
    memory: str = "sink"
    memory_options: dict[str, Any] = {}
    budget: int | None = Field(None, description="tokens per layer that the memory may read")
    memory_rate: float = Field(1.0, description="learning rate of the memory's weights, in that of the generator")
    memory_clip: float = Field(0.05, description="largest norm of their gradient")
    memory_weight: float = Field(0.2, description="weight of the memory's own losses beside the matching loss")
    steps: tuple[int, ...] = Field((1000, 750, 500, 250), description="the student's denoising steps")
    chunks: int = Field(7, description="chunks of a clip")
    last_step_only: bool = Field(False, description="always run all denoising steps; else a random number of them")
    score: Literal["causal", "joint"] = Field(
        "causal",
        description="scores see chunk after chunk, each with its clean past; or whole clips, all frames at once",
    )
    seen: int = Field(2, description="past chunks that a causal score sees beside the first of the stream")
    guidance: float = Field(3.0, description="real score: conditional + guidance (conditional - negative)")
    negative: str = Field("", description="the negative prompt")
    lowest: float = Field(20.0, description="smallest timestep of a score, of 1000")
    highest: float = Field(980.0, description="largest timestep of a score")
    ratio: int = Field(5, ge=1, description="critic updates per generator update")
    critic_rate: float = Field(0.2, description="the critic's learning rate, in that of the generator")
    critic_clip: float = Field(10.0, description="largest norm of the critic's gradient")
    recompute: bool = Field(False, description="recompute passes in the backward pass: less memory, more time")
    compat: tuple[Compat, ...] = Field(
        (), description="score_shift: the scores look noise levels up in a table of shift 8, as published"
    )


class Objective(loop.Objective):
    """Train generator and critic; the memory's weights go with the generator."""

    auxiliary = frozenset({"critic", "memory", "words"})

    def __init__(self, options: Options, context: loop.Context):
        self.options, self.context = options, context
        device, dtype = context.device, context.dtype
        engine = open_engine(options.student, options.codec, device, torch.float32).with_steps(options.steps)
        engine = engine.with_memory(options.memory, options.budget, **options.memory_options)
        self.codec, self.words, self.memory = engine.codec, engine.text, engine.memory.requires_grad_(True)
        self.transformer = engine.backbone.requires_grad_(True)
        teacher = load_transformer(options.teacher or options.student).to(device, dtype).eval().requires_grad_(False)
        self.critic = load_transformer(options.critic or options.teacher or options.student).to(device)
        self.generator = Cast(self.transformer, dtype, options.recompute)
        self.real, self.fake = Cast(teacher, dtype), Cast(self.critic, dtype, options.recompute)
        self.engine = engine_for(engine, backbone=self.generator)
        self.text: Lines = self.engine.text
        self.source = open_source(options.prompts, options.follow)
        self.schedule = engine.sampler.schedule
        self.looked_up = FlowSchedule(8.0) if "score_shift" in options.compat else self.schedule
        self.view: scores.View = scores.Joint()
        if options.score == "causal":
            self.view = scores.Causal(engine.layout.frames_per_chunk, options.seen, engine.context_noise)
        self.told: list[str] = []

    # what is trained

    def modules(self) -> dict[str, nn.Module]:
        found = {"transformer": self.transformer, "critic": self.critic}
        if isinstance(self.words, WordEncoder):  # frozen; exported so that the run's weights are a whole model
            found["words"] = self.words.requires_grad_(False)
        if any(True for _ in self.memory.parameters()):
            found["memory"] = self.memory
        return found

    def parameter_groups(self) -> list[dict[str, Any]]:
        o = self.options

        def group(name: str, module: nn.Module, scale: float, clip: float) -> dict[str, Any]:
            names = [f"{name}.{key}" for key, p in module.named_parameters() if p.requires_grad]
            return {"names": names, "optimizer": "adamw", "scale": scale, "clip": clip}

        return [
            group("critic", self.critic, o.critic_rate, o.critic_clip),
            group("memory", self.memory, o.memory_rate, o.memory_clip),
        ]

    def generator_step(self, step: int) -> bool:
        return step % self.options.ratio == 0

    def trains(self, step: int) -> frozenset[str]:
        return frozenset(("transformer", "memory", "critic") if self.generator_step(step) else ("critic",))

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

    # losses

    def generator_loss(self, clip: Clip, random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared distance to where the scores' difference points."""
        given, o = self.noised(clip, random), self.options
        with torch.no_grad():
            fake = self.predicted(self.fake, clip, given)
            real = self.predicted(self.real, clip, given)
            if o.guidance:
                real = scores.guide(real, self.predicted(self.real, clip, given, o.negative), o.guidance)
            gradient = scores.kl_gradient(given.rows.detach(), fake, real)
        loss = scores.matching_loss(given.rows, gradient, self.view.mask(clip)).float()
        return loss, {"matching": loss.detach(), "difference": (fake - real).abs().mean()}

    def critic_loss(self, clip: Clip, random: torch.Generator) -> Tensor:
        """Flow matching of what the generator makes."""
        given = self.noised(clip, random)
        flow = self.view.flow(self.fake, self.text, clip, given.noisy, given.timesteps, None, given.past)
        return scores.flow_loss(flow, given.rows, given.noise, self.view.mask(clip))

    def noised(self, clip: Clip, random: torch.Generator) -> scores.Noised:
        o = self.options
        return scores.noised(clip, self.view, self.schedule, random, lowest=o.lowest, highest=o.highest)

    def predicted(self, network: Cast, clip: Clip, given: scores.Noised, negative: str | None = None) -> Tensor:
        return scores.predicted(network, self.view, self.text, clip, given, self.looked_up, negative)

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.generator.refresh()
        self.fake.refresh()
        first, second = self.exits(step)
        total, terms = torch.zeros((), device=self.context.device), {}
        if self.generator_step(step):
            clip = self.clip(first, generator)
            self.told = clip.prompts[-1]
            matching, terms = self.generator_loss(clip, generator)
            total = total + matching
            for name, term in clip.losses.items():
                total = total + self.options.memory_weight * term
                terms[name] = term.detach()
        with torch.no_grad():
            clip = self.clip(second, generator)
        self.told = clip.prompts[-1]
        critic = self.critic_loss(clip, generator)
        updates = {"generator_updates": step // self.options.ratio + 1, "critic_updates": step + 1}
        counted = {name: torch.tensor(float(count)) for name, count in updates.items()}
        return total + critic, {**terms, "critic": critic.detach(), **counted}

    def about(self) -> str:
        return "; ".join(f"'{prompt[:60]}'" for prompt in self.told)

    # what is looked at

    def sample(self, step: int, folder) -> None:
        """Stream two short scripts from their text alone, and write their filmstrips."""
        from slotmemory.training.look import filmstrips

        if isinstance(self.words, WordEncoder):
            filmstrips(self, folder)

    def metadata(self, module: str) -> dict[str, str]:
        if module in ("transformer", "critic"):
            return {"config": self.transformer.config.to_json()}
        if module == "words":
            w = self.words
            return {"config": f'{{"dim": {w.dim}, "length": {w.length}, "heads": {w.heads}}}'}
        return {"memory": self.options.memory}
