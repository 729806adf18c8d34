"""Rolling sink: the first seconds of the video are played forwards and backwards as an endless past.

Source: Rolling Sink (arXiv 2602.07775), training-free on Self-Forcing: a cache of K blocks of which S are sink. Sink
block l of chunk i stands at block i - K + l (sliding indices) and shows what an endless past would hold there: block
l mod K of the first K if floor(l / K) is even, else block K - 1 - (l mod K) with its frames reversed (sliding
semantics). Counted in frames here, which is the same mirror. The last K - S blocks are the real past.

Made for one shot: a prompt switch changes nothing.
"""

from __future__ import annotations

import torch

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memory import Bank, Memory, Now, State, Written


class RollingSink(Memory):
    """Reads `window` latent frames with the chunk itself: a rolling sink, then the `recent` last frames.

    window: also how many first frames are kept, less the chunk (18 of 21, K = 6 blocks); recent: real past in latent
    frames (3, S = 5). roll: False keeps the first frames in the sink for good and only slides their positions. What is
    held is `recent` frames more than what is read; the budget pays for what is held.
    """

    source = "Rolling Sink (arXiv 2602.07775)"
    positions = "its own: an endless past without gaps before the chunk"

    def __init__(
        self, layout: Layout, budget: int | None = None, *, window: int = 21, recent: int = 3, roll: bool = True
    ):
        chunk, per_frame = layout.frames_per_chunk, layout.tokens_per_frame
        if budget is not None:
            recent = min(recent, budget // per_frame // 3)  # the sink stays the larger part
            window = min(window, budget // per_frame - recent + chunk)
        first = window - chunk
        if recent < 0 or first < recent:
            raise InputError(
                f"window={window} cannot hold recent={recent} and a chunk of {chunk} latent frames; "
                f"use window >= {max(recent, 0) + chunk}"
            )
        super().__init__(layout, (first + recent) * per_frame if budget is None else budget)
        self.first, self.recent, self.roll = first, recent, roll

    def start(self, batch: int) -> State:
        return {"first": [], "recent": [], "start": None}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        if not state["first"]:
            return []
        first, recent = state["first"][layer], state["recent"][layer]
        made = now.frame - state["start"]
        if made <= self.first:
            return [first]
        places = torch.arange(made - self.first, made - self.recent, device=first.born.device)
        source = mirror(places, self.first) if self.roll else torch.arange(len(places), device=places.device)
        sink = first.map(lambda x: x[:, source])  # all rows roll together
        return [sink.at((places + state["start"]).expand_as(sink.born)), recent]

    def write(self, state: State, written: Written) -> State:
        firsts, recents = [], []
        for layer in range(len(written.layers)):
            new = written.bank(layer)
            first = state["first"][layer] if state["first"] else new.first(0)
            recent = state["recent"][layer] if state["recent"] else new.first(0)
            firsts.append(first.join(new.first(self.first - first.items)))
            recents.append(recent.join(new))
        start = written.now.frame if state["start"] is None else state["start"]
        return {"first": firsts, "recent": recents, "start": start}

    def update(self, state: State, written: Written) -> State:
        return {**state, "recent": [bank.last(self.recent) for bank in state["recent"]]}


def mirror(places: torch.Tensor, period: int) -> torch.Tensor:
    """Which of the first `period` frames stands at each place of the endless past: 0 1 2 2 1 0 0 1 2 for a period of 3."""
    lap, at = places // period, places % period
    return torch.where(lap % 2 == 0, at, period - 1 - at)
