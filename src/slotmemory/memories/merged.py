"""Merged summaries: frames that leave the window live on in two running means of their un-rotated keys and values.

Sources: MemRoPE (arXiv 2603.12513): a slow and a fast exponential mean beside sink and window, keys kept un-rotated,
positions counted through the cache. EMA sink (Reward Forcing, arXiv 2512.04678): one mean, no fixed sink; here
`sink=0, short=0`. A mean of rotated keys would mix the phases of different moments.

One step per chunk: m <- (1 - a) m + a e, with e the mean of the frames that leave; the first frames to leave are taken
as they are. Means are kept in fp32: a step of 0.01 is below bf16's resolution.
"""

from __future__ import annotations

from dataclasses import replace

from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._placing import place
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State, Written

POOLS = ("position", "frame")


class Merged(Sink):
    """Reads sink, long mean, short mean and window, in this order and without gaps before the chunk.

    sink, window: latent frames as in `sink`, the means come on top; long, short: the share `a` that a chunk's leaving
    frames take of each mean, 0 for none. pool: "position" keeps a mean per place in the picture (the paper's formula);
    "frame" one vector per head for all of them (the published program's configuration).
    """

    source = "MemRoPE (arXiv 2603.12513), EMA sink of Reward Forcing (arXiv 2512.04678)"
    positions = "block-relative: sink, means and window directly before the chunk"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        sink: int = 3,
        window: int = 10,
        long: float = 0.01,
        short: float = 0.1,
        pool: str = POOLS[0],
    ):
        for name, rate in (("long", long), ("short", short)):
            if not 0 <= rate <= 1:
                raise InputError(f"{name}={rate} is no share of a mean; use a number from 0 (no mean) to 1")
        if pool not in POOLS:
            raise InputError(unknown("pool", pool, POOLS))
        per_frame = layout.tokens_per_frame
        rates = {name: rate for name, rate in (("long", long), ("short", short)) if rate}
        if budget is None:
            super().__init__(layout, sink=sink, window=window)
            self.budget += len(rates) * per_frame
        else:  # it buys the sink first, then the means, then the window
            afford = max(budget // per_frame - sink, 0)
            rates = dict(list(rates.items())[:afford])
            super().__init__(layout, budget - len(rates) * per_frame, sink=sink, window=window)
            self.budget = budget
        self.rates, self.pool = rates, pool

    def start(self, batch: int) -> State:
        return {"sink": [], **{name: [] for name in self.rates}, "window": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        kept = [state[name][layer] for name in ("sink", *self.rates, "window") if state[name]]
        if kept:
            like = kept[-1].keys.dtype  # the window's: the model's own
            kept = [replace(bank, keys=bank.keys.to(like), values=bank.values.to(like)) for bank in kept]
        return place(kept, now, "relative", 0)

    def update(self, state: State, written: Written) -> State:
        leaving = [bank.first(max(bank.items - self.past, 0)) for bank in state["window"]]
        state = super().update(state, written)
        if not leaving[0].items:
            return state
        means = {}
        for name, rate in self.rates.items():
            new = [self._mean(bank) for bank in leaving]
            means[name] = [blend(a, b, rate) for a, b in zip(state[name], new)] if state[name] else new
        return {**state, **means}

    def _mean(self, frames: Bank) -> Bank:
        """One item in fp32 for several frames, born with the first of them and standing where the last stood."""

        def mean(x):
            x = x.float().mean(1, keepdim=True)
            return x if self.pool == "position" else x.mean(2, keepdim=True).expand_as(x).contiguous()

        last = frames.last(1)
        return replace(last, keys=mean(frames.keys), values=mean(frames.values), born=frames.born[:, :1])


def blend(old: Bank, new: Bank, rate: float) -> Bank:
    """Move a mean towards a new item by `rate`; it keeps its birth and takes the new item's place."""
    return replace(new, keys=old.keys.lerp(new.keys, rate), values=old.values.lerp(new.values, rate), born=old.born)
