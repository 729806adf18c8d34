"""Relaxed memory: sink, tail and, of a few frames between them, only the one that belongs and does not repeat.

Source: Relax Forcing (arXiv 2603.21366), training-free. With prototypes p = mean key / its length, a candidate frame h
scores r(h) = p_h . p_sink - redundancy * p_h . p_tail; the best is read. More memory is not better there: a dense past
slows motion down. Unpublished to us: the weight (reported as insensitive; 0.5 here) and how regions share a prototype
(the mean over all their tokens, all heads side by side).

Candidates enter when the tail has passed them and leave in the order they came.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories._placing import PLACINGS, check_placing, place
from slotmemory.memory import Bank, Memory, Now, State, Written


class Relaxed(Memory):
    """Reads `sink` first, `history` chosen and `tail` last latent frames; `candidates` are held to choose from.

    redundancy: weight of likeness to the tail, which speaks against a frame; placing, reach: see `_placing.py`. The
    budget pays for candidates that are held, read or not.
    """

    source = "Relax Forcing (arXiv 2603.21366)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        sink: int = 2,
        candidates: int = 4,
        history: int = 1,
        tail: int = 1,
        redundancy: float = 0.5,
        placing: str = PLACINGS[0],
        reach: int = 21,
    ):
        sizes = {"sink": sink, "candidates": candidates, "history": history, "tail": tail}
        for name, value in sizes.items():
            if value < 0:
                raise InputError(f"{name}={value} is too small; use 0 or more latent frames")
        if history > candidates:
            raise InputError(f"history={history} frames cannot be chosen from candidates={candidates}; use more")
        if budget is not None:
            frames = budget // layout.tokens_per_frame
            sink = min(sink, frames)
            tail = min(tail, frames - sink)
            candidates = min(candidates, frames - sink - tail)
        super().__init__(layout, (sink + candidates + tail) * layout.tokens_per_frame if budget is None else budget)
        self.sink, self.candidates, self.history, self.tail = sink, candidates, history, tail
        self.redundancy, self.placing, self.reach = redundancy, check_placing(placing), reach

    def start(self, batch: int) -> State:
        return {"sink": [], "candidates": [], "tail": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        if not state["sink"]:
            return []
        sink, found, tail = (state[name][layer] for name in ("sink", "candidates", "tail"))
        if found.items > self.history:
            found = found.take(found.score.topk(self.history, 1).indices.sort(1).values)
        return place([sink, found, tail], now, self.placing, self.reach)

    def write(self, state: State, written: Written) -> State:
        sinks, tails = [], []
        for layer in range(len(written.layers)):
            new = written.bank(layer)
            sink = state["sink"][layer] if state["sink"] else new.first(0)
            tail = state["tail"][layer] if state["tail"] else new.first(0)
            missing = self.sink - sink.items
            sinks.append(sink.join(new.first(missing)))
            tails.append(tail.join(new.after(missing)))
        candidates = state["candidates"] or [bank.first(0) for bank in tails]
        return {"sink": sinks, "candidates": candidates, "tail": tails}

    def update(self, state: State, written: Written) -> State:
        found, tails = [], []
        for sink, candidates, tail in zip(state["sink"], state["candidates"], state["tail"]):
            passed = tail.first(max(tail.items - self.tail, 0))
            tail = tail.last(self.tail)
            candidates = candidates.join(passed).last(self.candidates)
            found.append(replace(candidates, score=self._relevance(candidates, sink, tail)))
            tails.append(tail)
        return {**state, "candidates": found, "tail": tails}

    def _relevance(self, candidates: Bank, sink: Bank, tail: Bank) -> Tensor:
        """Score candidates against both regions; a region without frames says nothing. [B, M] fp32."""
        score = torch.zeros(candidates.born.shape, device=candidates.born.device)
        frames = prototype(candidates.keys.float().mean(2))
        for region, weight in ((sink, 1.0), (tail, -self.redundancy)):
            if region.items:
                score = score + weight * (frames * prototype(region.keys.float().mean((1, 2)))[:, None]).sum(-1)
        return score


def prototype(mean_key: Tensor) -> Tensor:
    """Mean keys [..., H, D] as vectors of length 1, heads side by side: [..., H D]."""
    return F.normalize(mean_key.flatten(-2), dim=-1)
