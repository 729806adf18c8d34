"""A policy outside the package, as a user would write one: every second latent frame of the recent past.

With `from __future__ import annotations` and a dataclass, since both are what people write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slotmemory.layout import Layout
from slotmemory.memory import Bank, Memory, Now, State, Written


@dataclass
class Stride:
    step: int
    frames: int


class EveryOther(Memory):
    """Keeps `frames` latent frames, each `step` apart."""

    def __init__(self, layout: Layout, budget: int | None = None, *, step: int = 2, frames: int = 4):
        super().__init__(layout, frames * layout.tokens_per_frame if budget is None else budget)
        self.stride = Stride(step, min(frames, self.budget // layout.tokens_per_frame))

    def start(self, batch: int) -> State:
        return {"bank": [], "seen": (0,)}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return [state["bank"][layer]] if state["bank"] else []

    def write(self, state: State, written: Written) -> State:
        seen = state["seen"][0]
        keep = torch.tensor([i for i in range(written.frames) if (seen + i) % self.stride.step == 0], dtype=torch.long)
        new = []
        for layer in range(len(written.layers)):
            bank = written.bank(layer)
            picked = bank.take(keep.expand(len(bank.born), -1))
            new.append(state["bank"][layer].join(picked) if state["bank"] else picked)
        return {"bank": new, "seen": (seen + written.frames,)}

    def update(self, state: State, written: Written) -> State:
        return {**state, "bank": [bank.last(self.stride.frames) for bank in state["bank"]]}
