"""What checks are made of: a policy on trial, streams of it, somebody watching, and ways to compare what came out.

It knows no policy by name and no test framework; streams run through the one session loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slotmemory import memory as memories
from slotmemory.backbones.attention import Dense
from slotmemory.contract.toys import toy
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.memory import Bank, Memory, Now, Prefix, State, Written
from slotmemory.session import SeededNoise, Session

ONE_PROMPT = {0: "a red cat walks"}
TWO_PROMPTS = {0: "a red cat walks", 4: "the blue dog sleeps in the sun"}
# Batched and single products round differently; wrong keys, values or places move the toy's latents by 1e-2 and more.
CLOSE = 2e-4


class DoesNotApply(Exception):
    """The policy does not claim what the check asks."""


@dataclass(frozen=True)
class Trial:
    """A policy, how to build it and what to run it on; `chunks` is the length of a stream, enough for evictions."""

    policy: type[Memory]
    engine: Engine = field(default_factory=toy)
    options: Mapping[str, Any] = field(default_factory=dict)
    chunks: int = 6

    @property
    def name(self) -> str:
        return f"memory '{self.policy.called()}'"

    def knows(self, argument: str) -> bool:
        return argument in memories.arguments(self.policy)

    def memory(self, budget: int | None = None, **changes: Any) -> Memory:
        """Build the policy anew; arguments it does not have are left out of the changes."""
        known = memories.arguments(self.policy)
        defaults = self.engine.trained_for(self.policy)
        changes = {k: v for k, v in changes.items() if k in known}
        policy = self.policy(self.engine.layout, budget, **{**defaults, **self.options, **changes})
        policy.adopt(*self.engine.patch)
        return policy.to(self.engine.device).eval().requires_grad_(False)

    def session(
        self,
        memory: Memory | None = None,
        prompts: Mapping[int, str] | None = None,
        seeds: Sequence[int] = (7,),
        engine: Engine | None = None,
    ) -> Session:
        engine = replace(engine or self.engine, memory=memory or self.memory())
        return Session(engine, dict(prompts or TWO_PROMPTS), self.chunks, seeds)

    def run(self, *given: Any, **options: Any) -> Tensor:
        """Make a whole stream; arguments of `session`. Latents [B, F, C, h, w]."""
        return latents_of(self.session(*given, **options))


def latents_of(session: Session) -> Tensor:
    """Make what is left of a stream."""
    return torch.cat([chunk.latents for chunk in session], 1)


class Watched(Memory):
    """A policy with somebody looking over its shoulder: `around(call, policy's method, arguments)` makes every call."""

    def __init__(self, policy: Memory, around: Callable[[str, Callable, tuple], Any]):
        super().__init__(policy.layout, policy.budget)
        self.policy, self.around = policy, around
        self.replays, self.called = policy.replays, policy.called

    def start(self, batch: int) -> State:
        return self.policy.start(batch)

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return self.around("read", self.policy.read, (state, layer, now))

    def attend(self, state: State, now: Now, read: list[list[Bank]], context: list[tuple[Tensor, Tensor]]) -> Any:
        return self.around("attend", self.policy.attend, (state, now, read, context))

    def prefix(self, state: State, written: Written) -> tuple[State, Prefix | None]:
        return self.around("prefix", self.policy.prefix, (state, written))

    def write(self, state: State, written: Written) -> State:
        return self.around("write", self.policy.write, (state, written))

    def update(self, state: State, written: Written) -> State:
        return self.around("update", self.policy.update, (state, written))

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        return self.around("switch", self.policy.switch, (state, now))


def moment(call: str, given: tuple) -> str:
    """Say in which layer and chunk a call was made, from its arguments: " in layer 1 at chunk 3"."""
    now = given[1] if call in ("attend", "switch") else given[-1]
    layer = f" in layer {given[1]}" if call == "read" else ""
    return f"{layer} at chunk {getattr(now, 'now', now).chunk}"


def tokens_of(found: Iterable[Bank]) -> int:
    return sum(bank.tokens for bank in found)


class Broken(InputError):
    """The policy does not keep the contract; an InputError, so that the watched loop lets it pass as it is."""


def demand(holds: bool, sentence: str) -> None:
    if not holds:
        raise Broken(sentence)


def demand_close(trial: Trial, found: Tensor, expected: Tensor, limit: float, what: str, first: int = 0) -> None:
    """Demand equal latents from chunk `first` on, to the bit where the limit is 0; the complaint names the first chunk
    that differs."""
    apart = (found.float() - expected.float()).abs()
    frame = int((apart.amax((0, 2, 3, 4)) > limit).float().argmax())
    chunk, most = first + frame // trial.engine.layout.frames_per_chunk, float(apart.max())
    demand(most <= limit, f"{trial.name} {what}: from chunk {chunk} on, by up to {most:.2g}")


def difference(a: Any, b: Any, where: str) -> str | None:
    """Where two trees of tensors, banks and plain values first differ; None if nowhere."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
        return None if same else where
    if type(a) is not type(b):
        return where
    if is_dataclass(a):
        return difference({f.name: getattr(a, f.name) for f in fields(a)}, vars(b), where)
    if isinstance(a, dict):
        if set(a) != set(b):
            return where
        return next((d for key in a if (d := difference(a[key], b[key], f"{where}[{key!r}]"))), None)
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return where
        return next((d for i, (x, y) in enumerate(zip(a, b)) if (d := difference(x, y, f"{where}[{i}]"))), None)
    return None if a == b else where


def dense(engine: Engine, prompt: str, chunks: int, seeds: Sequence[int], past: bool) -> Tensor:
    """The reference: every chunk made together with its clean past under a mask, or alone. No memory is involved."""
    layout, noise = engine.layout, SeededNoise(seeds)
    shape = (len(seeds), layout.frames_per_chunk, layout.latent_channels, layout.latent_height, layout.latent_width)
    embeddings, _ = engine.text.encode([prompt] * len(seeds))
    text = engine.backbone.text_keys(embeddings)
    made: list[Tensor] = []

    def next_chunk(chunk: int, before: list[Tensor]) -> Tensor:
        frames = torch.arange((chunk - len(before)) * shape[1], (chunk + 1) * shape[1], device=engine.device)
        block = frames // shape[1]
        pattern = Dense(block[None] <= block[:, None])

        def predict(noisy: Tensor, t: float) -> Tensor:
            steps = torch.zeros(len(seeds), len(frames), device=engine.device)
            steps[:, -shape[1] :] = t
            flow, _ = engine.backbone(torch.cat((*before, noisy), 1), steps, text, frames, pattern)
            return flow[:, -shape[1] :]

        def draw() -> Tensor:
            return noise.fresh(shape).to(engine.device)

        return engine.sampler.denoise(predict, noise.first(shape).to(engine.device), draw)

    for chunk in range(chunks):
        made.append(next_chunk(chunk, made if past else []))
    return torch.cat(made, 1)
