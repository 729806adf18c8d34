"""SlotMemory's schedule (arXiv 2605.31033): long tuning with slots in the loop, in two stages.

L = L_DMD + memory_weight * (L_contrast + [stage 2] alpha * L_reconstruction). Stage 1 keeps grouper, initialiser and
predictor as they are and trains adapters and generator; stage 2 trains everything.

What the paper leaves open is an option here. Slots have a learning rate of their own (`memory_rate`; at the generator's,
400 updates hardly move an adapter from its random start), learn from the critic's clips too (`always`), and are kept apart
from slots of earlier streams (`queue`), because with one stream per process their mere numbers would do for a contrast.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from slotmemory.errors import InputError
from slotmemory.slots import load_slotcontrast
from slotmemory.training import long_tuning, loop
from slotmemory.training.lessons import DECODER, LessonOptions, Lessons, slot_arguments
from slotmemory.training.rollout import Clip
from slotmemory.training.student import group


class Options(long_tuning.Options, LessonOptions):
    """Which stage, and how slots learn."""

    memory: str = "slots"
    memory_rate: float = Field(30.0, gt=0, description="learning rate of the slots, in that of the generator")
    stage: Literal[1, 2] = 1
    grouper: str | None = Field(
        None, description="a SlotContrast checkpoint: grouper, initialiser and predictor to start"
    )
    always: bool = Field(True, description="slots learn from the critic's clips too, not from one clip in `ratio`")

    @model_validator(mode="after")
    def _slots(self) -> Options:
        if self.memory != "slots":
            raise ValueError(f"memory={self.memory} has no slots to train; use objective long_tuning")
        return self


class Objective(long_tuning.Objective):
    """Long tuning whose memory is taught by its own losses."""

    auxiliary = long_tuning.Objective.auxiliary | {DECODER}

    def __init__(self, options: Options, context: loop.Context):
        if options.grouper:
            given = {"attn_scale": "released", **options.memory_options}
            options = options.model_copy(update={"memory_options": given})
        super().__init__(options, context)
        if options.grouper and context.device.type != "meta":
            self.memory.grouper.load_state_dict(load_grouper(options.grouper, self.memory.num_slots).state_dict())
        if options.stage == 1:
            self.memory.grouper.requires_grad_(False)
        self.lessons = Lessons(options, self.memory, context, options.stage == 2)
        self.measured: dict[str, Tensor] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {**super().modules(), **self.lessons.modules()}

    def parameter_groups(self) -> list[dict[str, Any]]:
        o = self.options
        helpers = [group(name, module, o.memory_rate, o.memory_clip) for name, module in self.lessons.modules().items()]
        return [*super().parameter_groups(), *helpers]

    def metadata(self, module: str) -> dict[str, str]:
        return {} if module == DECODER else super().metadata(module)

    def memory_arguments(self) -> dict[str, Any]:
        return slot_arguments(self.memory)

    def trains(self, step: int) -> frozenset[str]:
        slots = {self.memory_name, *self.lessons.modules()}
        found = super().trains(step)
        return found | slots if self.options.always or self.memory_name in found else found

    def watching(self) -> AbstractContextManager:
        return self.student.constant() if self.options.always else super().watching()

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.lessons.at(step)
        self.measured = {}
        loss, terms = super().loss(step, rank, generator)
        return loss, {**terms, **self.measured}

    def clip(self, exit: int, random: torch.Generator) -> Clip:
        clip = super().clip(exit, random)
        self.measured = self.lessons.note(self.stream.session.state) or self.measured
        return clip

    def ended(self) -> None:
        self.lessons.close()

    def state(self) -> dict[str, Any] | None:
        stream = super().state()
        return stream and {**stream, "lessons": self.lessons.state()}

    def resume(self, state: dict[str, Any]) -> None:
        self.lessons.resume(state["lessons"])
        super().resume(state)


def load_grouper(path: str, slots: int):
    """Load grouper, initialiser and predictor of a SlotContrast checkpoint."""
    try:
        found = load_slotcontrast(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise InputError.from_os("read", path, error) from None
    have = found.initializer.slots.shape[1]
    if have != slots:
        raise InputError(f"{path} has {have} slots, the memory {slots}; set memory_options: {{slots: {have}}}")
    return found
