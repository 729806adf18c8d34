"""How slots are taught, whatever they are taught on: a schedule for their losses, and slots to keep away from.

It knows the memory's slots and their state, no generator and no clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from slotmemory.backbones.sequence import gather
from slotmemory.codecs.base import check_tensors, read_tensors
from slotmemory.memories.slots import Slots
from slotmemory.slots import LayerDecoders
from slotmemory.slots.learning import Learning, Lesson, measures
from slotmemory.slots.losses import Direction
from slotmemory.training import loop
from slotmemory.training.pack import exported
from slotmemory.training.recipe import Frozen

DECODER = "slot_decoder"


class LessonOptions(Frozen):
    """What SlotMemory (arXiv 2605.31033) leaves open in its slot losses."""

    tau: float = Field(0.1, gt=0, description="temperature of the contrast")
    direction: Direction = Field(
        "row", description="row: earlier slots pick later ones (eq. 8); col: SlotContrast; sym"
    )
    detach_earlier: bool = Field(False, description="the contrast teaches the later chunk's slots only")
    across: float = Field(0.25, ge=0, description="weight of a pair that a prompt switch parts")
    alpha: float = Field(1.0, ge=0, description="weight of the reconstruction")
    features: float = Field(
        0.0, ge=0, description="weight of a third loss: slots, decoded, tell the features themselves (SlotContrast's)"
    )
    decoder: str | None = Field(
        None, description="an earlier run of slots, whose decoder of features is where this starts"
    )
    threshold: float = Field(0.5, description="confidence above which a token counts in the reconstruction")
    threshold_from: float | None = Field(None, description="where it starts; none: at `threshold`, all the time")
    threshold_steps: int = Field(500, ge=1, description="steps in which it rises from there")
    gathered: bool = Field(False, description="slots of all processes are contrasted together, chunk by chunk")
    queue: int = Field(2048, ge=0, description="slots of earlier streams kept as negatives, those of all processes")

    @model_validator(mode="after")
    def _decoder_is_used(self) -> LessonOptions:
        if self.decoder and not self.features:
            raise ValueError(
                f"decoder={self.decoder} without features: there is no decoder to start from it; "
                "set features above 0, or decoder to null"
            )
        return self


class Lessons:
    """The schedule of a memory's learning, and the queue of slots of streams that are over."""

    def __init__(self, options: LessonOptions, memory: Slots, context: loop.Context, reconstruct: bool):
        self.options, self.memory, self.context, self.reconstruct = options, memory, context, reconstruct
        weight = memory.adapters.weight  # [layers, C, width]
        self.queue = torch.zeros(weight.shape[0], 0, weight.shape[1], device=context.device)
        self.waiting: list[Tensor] = []  # slots of streams in progress
        self.decoder = None
        if options.features:
            width = weight.shape[2]
            self.decoder = LayerDecoders(weight.shape[0], weight.shape[1], width).to(context.device)
            if options.decoder and context.device.type != "meta":
                path = exported(Path(options.decoder), DECODER)
                tensors, _ = read_tensors(path)
                check_tensors(tensors, self.decoder.state_dict(), path)
                self.decoder.load_state_dict(tensors)

    def modules(self) -> dict[str, nn.Module]:
        """What learns beside the slots, so that they do."""
        return {DECODER: self.decoder} if self.decoder else {}

    def at(self, step: int) -> None:
        """Tell the memory how to learn in a step."""
        o = self.options
        start = o.threshold if o.threshold_from is None else o.threshold_from
        threshold = start + (o.threshold - start) * min(1.0, step / o.threshold_steps)
        self.memory.learning = Learning(
            reconstruct=self.reconstruct,
            tau=o.tau,
            direction=o.direction,
            across=o.across,
            detach_earlier=o.detach_earlier,
            alpha=o.alpha,
            threshold=threshold,
            negatives=self.queue if self.queue.shape[1] else None,
            gather=self.gathered if o.gathered and self.context.processes > 1 else None,
            decode=self.decoder,
            features=o.features,
        )

    def gathered(self, x: Tensor) -> Tensor:
        """What the processes with other samples have, side by side: [L, N, ...] -> [L, P N, ...]."""
        return gather(x, self.context.group).movedim(0, 1).flatten(1, 2)

    def note(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Note where a stream's slots are at the end of a clip; return how they do, if they learnt from its last chunk."""
        self.waiting.append(state["running"].detach().flatten(1, 2))
        if not state["lesson"]:
            return {}
        lesson = {name: x.detach() if isinstance(x, Tensor) else x for name, x in state["lesson"].items()}
        return measures(Lesson(**lesson), self.memory.learning)

    def close(self) -> None:
        """Slots of finished streams become negatives; sooner, they would push their own entities away.

        With several processes all must come here in the same step."""
        if not self.waiting:
            return
        new = torch.cat(self.waiting, 1)
        if self.context.processes > 1:
            new = self.gathered(new)
        self.queue = torch.cat((self.queue, new), 1)
        self.queue = self.queue[:, max(0, self.queue.shape[1] - self.options.queue) :]
        self.waiting = []

    def state(self) -> dict[str, Any]:
        return {"queue": self.queue, "waiting": self.waiting}

    def resume(self, state: dict[str, Any]) -> None:
        self.queue, self.waiting = state["queue"], state["waiting"]


def slot_arguments(memory: Slots) -> dict[str, Any]:
    """The arguments that a file of slot weights cannot do without."""
    shapes = {"slots": memory.num_slots, "slot_dim": memory.adapters.weight.shape[1]}
    return {**shapes, "attn_scale": memory.attn_scale}
