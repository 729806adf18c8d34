"""A causal few-step student in training: its networks, the memory it streams with, and what it is told.

What all objectives that train one share; it knows no loss. The student starts from a causal transformer, makes chunks
through the session's loop with any memory, and leaves weights that `generate` takes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from slotmemory.checkpoints.presets import find as preset
from slotmemory.checkpoints.presets import names as preset_names
from slotmemory.codecs.words import WordEncoder
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.sampler import FewStep, FlowSchedule
from slotmemory.training import loop
from slotmemory.training.networks import Cast, Lines, add_lora, load_transformer, merged, open_engine
from slotmemory.training.plan import Work
from slotmemory.training.prompts import open_source
from slotmemory.training.recipe import Frozen
from slotmemory.training.rollout import engine_for


class StudentOptions(Frozen):
    """Where student and teacher start, what the student streams with, and what it is told."""

    student: str = Field("tiny", description="where the student starts: a training run, a model folder or its name")
    teacher: str | None = Field(
        None, description="a frozen many-step teacher, likewise; none: what the student starts from"
    )
    base: str | None = Field(
        None,
        description="the model whose codec, text encoder and settings a training run's weights go with; none: see codec",
    )
    codec: str = Field(
        "src/slotmemory/assets/tiny/codec.safetensors",
        description="beside the weights of an embedded model's training run",
    )
    prompts: str = Field("world", description="the narrative world's stories, or a file of prompts")
    follow: str | None = Field(None, description="a second file: line i continues line i of the first")
    memory: str = "sink"
    memory_options: dict[str, Any] = {}
    budget: int | None = Field(None, description="tokens per layer that the memory may read")
    memory_rate: float = Field(1.0, gt=0, description="learning rate of the memory's weights, in that of the student")
    memory_clip: float = Field(0.05, gt=0, description="largest norm of their gradient")
    memory_weight: float = Field(0.2, ge=0, description="weight of the memory's own losses")
    lora: int = Field(0, ge=0, description="rank of low-rank adapters trained in place of whole networks; 0: none")
    steps: tuple[int, ...] = Field((1000, 750, 500, 250), description="the student's denoising steps")
    shift: float | None = Field(None, gt=0, description="warp of its noise levels; none: the model's own")
    chunks: int = Field(7, ge=1, description="chunks of a clip")
    guidance: float = Field(3.0, ge=0, description="teacher: conditional + guidance (conditional - negative)")
    negative: str | None = Field(
        None, description="the negative prompt; none: that of the teacher's preset, else nothing"
    )
    recompute: bool = Field(False, description="recompute passes in the backward pass: less memory, more time")


class Student(loop.Objective):
    """Train a transformer, and the weights of the memory that it streams with."""

    auxiliary = frozenset({"words"})

    def __init__(self, options: StudentOptions, context: loop.Context):
        self.options, self.context = options, context
        if context.in_step and options.prompts == "world" and not getattr(options, "switches", ()):
            raise InputError(
                "shard: the world's stories change their prompts at other chunks in every process; give a file of prompts"
            )
        engine = open_engine(options.student, options.base, options.codec, context.device)
        shift = engine.sampler.schedule.shift if options.shift is None else options.shift
        sampler = engine.sampler if options.steps is None else FewStep(options.steps)
        engine = replace(engine, sampler=replace(sampler, schedule=FlowSchedule(shift)))
        planned = context.device.type == "meta"  # nothing is read that may not exist yet
        given = {k: v for k, v in options.memory_options.items() if not (planned and k == "weights")}
        self.memory_given = engine.defaults_for(options.memory, given)
        self.whole = engine.with_memory(options.memory, options.budget, **given)
        self.codec, self.words, self.memory = engine.codec, engine.text, self.whole.memory.requires_grad_(True)
        self.transformer = engine.backbone.requires_grad_(True)
        if options.lora:
            add_lora(self.transformer, options.lora)
        self.student = Cast(self.transformer, context.dtype, options.recompute)
        teacher = load_transformer(options.teacher or options.student, options.base, context.device)
        self.teacher = Cast(teacher.to(context.dtype).eval().requires_grad_(False), context.dtype)
        self.engine = self.in_loop()
        self.text: Lines = self.engine.text
        self.auxiliary = self.auxiliary | {self.memory_name}
        self.source = None if planned else open_source(options.prompts, options.follow)
        self.schedule = engine.sampler.schedule
        self.negative = options.negative
        if self.negative is None:
            own = options.teacher or options.student
            self.negative = preset(own).negative if own in preset_names() else ""

    def in_loop(self) -> Engine:
        """The engine that training streams with."""
        return engine_for(self.whole, backbone=self.student)

    @property
    def memory_name(self) -> str:
        """What the memory's weights are called in a model folder."""
        return f"memory.{self.memory.called()}"

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"transformer": self.transformer}
        if isinstance(self.words, WordEncoder):  # fixed; exported so that the run's weights make a whole model
            found["words"] = self.words.requires_grad_(False)
        if any(True for _ in self.memory.parameters()):
            found[self.memory_name] = self.memory
        return found

    def networks(self) -> list[nn.Module]:
        return [self.transformer, self.teacher.module]

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group(self.memory_name, self.memory, self.options.memory_rate, self.options.memory_clip)]

    def work(self) -> list[Work]:
        """The arithmetic of an average step (`training/plan.py`); none where nobody has counted it."""
        return []

    def sample(self, step: int, folder: Path) -> None:
        """Stream short scripts from their text alone, and write their filmstrips."""
        from slotmemory.training.look import film

        if isinstance(self.words, WordEncoder):
            self.student.refresh()  # the weights at hand are the averaged ones
            film(replace(self.whole, backbone=self.student), folder)

    def metadata(self, module: str) -> dict[str, str]:
        if module == "words":
            words = self.words
            return {"config": json.dumps({"dim": words.dim, "length": words.length, "heads": words.heads})}
        if module == self.memory_name:
            return {"config": json.dumps(self.memory_arguments())}
        return {"config": self.transformer.config.to_json()}

    def memory_arguments(self) -> dict[str, Any]:
        """The arguments without which the memory's weights make no sense: all that it was given but the weights."""
        return {name: value for name, value in self.memory_given.items() if name != "weights"}

    def exported(self, module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return merged(tensors)


def group(name: str, module: nn.Module, scale: float, clip: float) -> dict[str, Any]:
    """An optimiser group of a module's trained weights, clipped apart."""
    names = [f"{name}.{key}" for key, p in module.named_parameters() if p.requires_grad]
    return {"names": names, "optimizer": "adamw", "scale": scale, "clip": clip}
