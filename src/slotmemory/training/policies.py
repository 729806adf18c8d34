"""A policy in training, with somebody between it and the session.

It passes gradients on that are asked for by name, and repeats defects of the published trainers on request. It knows
policies by their interface only; the backbone's last differentiated pass comes from `networks.Cast`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from slotmemory.backbones.attention import Buffered, Pattern
from slotmemory.memory import Bank, Memory, Now, Prefix, State, Written
from slotmemory.training.networks import Cast

Defect = Literal["null_sink", "leaking_cache", "mutated_bank"]


class InTraining(Memory):
    """A policy as a rollout runs it.

    through: what a policy is written (fields of `Seen`) takes the clean pass's values and the gradients of the chunk's last
    denoising pass, so that a policy's losses reach the backbone. Defects, all absent unless named:
    null_sink: after a switch later than `clip` latent frames, the sink's keys and values are zeros (LongLive, MemFlow);
    leaking_cache: what a chunk leaves for others carries its gradients too (Self-Forcing, LongLive);
    mutated_bank: a pass that is computed again reads the memory as it is by then, where the sizes agree (MemFlow).
    """

    def __init__(
        self,
        policy: Memory,
        backbone: Cast,
        through: Sequence[str] = (),
        defects: Sequence[Defect] = (),
        clip: int = 21,
    ):
        super().__init__(policy.layout, policy.budget)
        self.policy, self.clip, self.defects = policy, clip, frozenset(defects)
        self.replays, self.called = policy.replays, policy.called
        leaks = ("keys", "values") if "leaking_cache" in self.defects else ()
        self.through = (*through, *leaks)
        self.backbone = [backbone]  # not a part of this module
        backbone.keep_seen = bool(self.through)
        self.latest: Pattern | None = None

    def start(self, batch: int) -> State:
        return self.policy.start(batch)

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return self.policy.read(state, layer, now)

    def attend(
        self, state: State, now: Now, read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]
    ) -> Pattern | None:
        pattern = self.policy.attend(state, now, read, context)
        if pattern is None and "mutated_bank" in self.defects:
            self.latest = pattern = Live(context, self)
        return pattern

    def prefix(self, state: State, written: Written) -> tuple[State, Prefix | None]:
        return self.policy.prefix(state, written)

    def write(self, state: State, written: Written) -> State:
        seen = self.backbone[0].seen
        if self.through and seen is not None and not written.now.replay:
            layers = [
                clean._replace(**{name: carrying(getattr(clean, name), getattr(last, name)) for name in self.through})
                for clean, last in zip(written.layers, seen)
            ]
            kind = Leaky if "leaking_cache" in self.defects else Written
            written = kind(**{**vars(written), "layers": layers})
        return self.policy.write(state, written)

    def update(self, state: State, written: Written) -> State:
        return self.policy.update(state, written)

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        state, replay = self.policy.switch(state, now)
        if "null_sink" in self.defects and now.frame > self.clip and state.get("sink"):
            empty = [replace(bank, keys=bank.keys * 0, values=bank.values * 0) for bank in state["sink"]]
            state = {**state, "sink": empty}
        return state, replay

    def losses(self, state: State) -> dict[str, Tensor]:
        return self.policy.losses(state)


def carrying(value: Tensor, gradient: Tensor) -> Tensor:
    """A tensor of one pass with the gradients of another's."""
    return value.detach() + (gradient - gradient.detach()).to(value.dtype)


class Leaky(Written):
    """What was seen, without the cut between chunks."""

    def bank(self, layer: int) -> Bank:
        seen = self.layers[layer]
        return Bank.of_frames(seen.keys, seen.values, self.positions, self.frames)


class Live(Buffered):
    """A chunk's pattern that reads what the latest chunk reads."""

    def __init__(self, context: Sequence[tuple[Tensor, Tensor]], memory: InTraining):
        super().__init__(context)
        self.own, self.memory = context, memory

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        latest = self.memory.latest.own
        self.context = latest if latest[layer][0].shape == self.own[layer][0].shape else self.own
        return super().joined(layer, key, value)
