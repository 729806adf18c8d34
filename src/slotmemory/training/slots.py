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
from torch import Tensor, distributed

from slotmemory.errors import InputError
from slotmemory.slots import load_slotcontrast
from slotmemory.slots.learning import Learning, Lesson, measures
from slotmemory.slots.losses import Direction
from slotmemory.training import long_tuning, loop
from slotmemory.training.rollout import Clip


class Options(long_tuning.Options):
    """Which stage, and how slots learn."""

    memory: str = "slots"
    memory_rate: float = Field(30.0, description="learning rate of the slots, in that of the generator")
    stage: Literal[1, 2] = 1
    grouper: str | None = Field(
        None, description="a SlotContrast checkpoint: grouper, initialiser and predictor to start"
    )
    tau: float = Field(0.1, gt=0, description="temperature of the contrast")
    direction: Direction = Field(
        "row", description="row: earlier slots pick later ones (eq. 8); col: SlotContrast; sym"
    )
    detach_earlier: bool = Field(False, description="the contrast teaches the later chunk's slots only")
    across: float = Field(0.25, ge=0, description="weight of a pair that a prompt switch parts")
    alpha: float = Field(1.0, ge=0, description="weight of the reconstruction")
    threshold: float = Field(0.5, description="confidence above which a token counts in the reconstruction")
    threshold_from: float | None = Field(None, description="where it starts; none: at `threshold`, all the time")
    threshold_steps: int = Field(500, ge=1, description="steps in which it rises from there")
    queue: int = Field(2048, ge=0, description="slots of earlier streams kept as negatives")
    always: bool = Field(True, description="slots learn from the critic's clips too, not from one clip in `ratio`")

    @model_validator(mode="after")
    def _slots(self) -> Options:
        if self.memory != "slots":
            raise ValueError(f"memory={self.memory} has no slots to train; use objective long_tuning")
        return self


class Objective(long_tuning.Objective):
    """Long tuning whose memory is taught by its own losses."""

    def __init__(self, options: Options, context: loop.Context):
        if options.grouper:
            given = {"attn_scale": "released", **options.memory_options}
            options = options.model_copy(update={"memory_options": given})
        super().__init__(options, context)
        if options.grouper:
            self.memory.grouper.load_state_dict(load_grouper(options.grouper, self.memory.num_slots).state_dict())
        if options.stage == 1:
            self.memory.grouper.requires_grad_(False)
        layers, dim = self.engine.layout.layers, self.memory.adapters.weight.shape[1]
        self.queue = torch.zeros(layers, 0, dim, device=context.device)  # slots of streams that are over
        self.waiting: list[Tensor] = []  # of the stream in progress
        self.measured: dict[str, Tensor] = {}

    def memory_arguments(self) -> dict[str, Any]:
        memory = self.memory
        shapes = {"slots": memory.num_slots, "slot_dim": memory.adapters.weight.shape[1]}
        return {**shapes, "attn_scale": memory.attn_scale}

    def trains(self, step: int) -> frozenset[str]:
        return super().trains(step) | ({self.memory_name} if self.options.always else set())

    def watching(self) -> AbstractContextManager:
        return self.student.constant() if self.options.always else super().watching()

    def learning(self, step: int) -> Learning:
        """How slots learn in a step."""
        o = self.options
        start = o.threshold if o.threshold_from is None else o.threshold_from
        threshold = start + (o.threshold - start) * min(1.0, step / o.threshold_steps)
        negatives = self.queue if self.queue.shape[1] else None
        return Learning(o.stage == 2, o.tau, o.direction, o.across, o.detach_earlier, o.alpha, threshold, negatives)

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.memory.learning, self.measured = self.learning(step), {}
        loss, terms = super().loss(step, rank, generator)
        return loss, {**terms, **self.measured}

    def clip(self, exit: int, random: torch.Generator) -> Clip:
        clip = super().clip(exit, random)
        state = self.stream.session.state
        self.waiting.append(state["running"].detach().flatten(1, 2))
        if state["lesson"]:
            lesson = {k: x.detach() if isinstance(x, Tensor) else x for k, x in state["lesson"].items()}
            self.measured = measures(Lesson(**lesson), self.memory.learning)
        return clip

    def ended(self) -> None:
        """Slots of a finished stream become negatives; before, they would push its entities away from themselves."""
        if self.waiting:
            new = torch.cat(self.waiting, 1)
            if self.context.processes > 1:  # streams are as long on every rank, so all come here together
                parts = [torch.empty_like(new) for _ in range(self.context.processes)]
                distributed.all_gather(parts, new)
                new = torch.cat(parts, 1)
            self.queue = torch.cat((self.queue, new), 1)
            self.queue = self.queue[:, max(0, self.queue.shape[1] - self.options.queue) :]
        self.waiting = []

    def state(self) -> dict[str, Any] | None:
        stream = super().state()
        return stream and {**stream, "queue": self.queue, "waiting": self.waiting}

    def resume(self, state: dict[str, Any]) -> None:
        self.queue, self.waiting = state["queue"], state["waiting"]
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
