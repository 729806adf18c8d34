"""Infinity-RoPE: a short window seen from block-relative positions, flushed at a prompt switch, cut where a scene cuts.

Source: Infinity-RoPE (arXiv 2511.20649), read from its program. However long the video, keys stand directly before the
chunk in the order they are read: the sink always looks as old as the window is long, and no position table ends.
KV flush: a prompt switch keeps the sink and the last `flush` latent frames, so that the new prompt takes over at once;
nothing is recomputed. RoPE cut: the first chunk of a cut scene stands `cut` latent frames after the start of its window,
and what it reads stays there: it looks long past.

Different from the published program: a flushed window of more than 6 frames misplaces its queries against their own
keys there; here a chunk always stands right behind what it reads. The program cuts at the scene after the marked one, its
documentation says at the marked one; here the shot named is the shot whose first chunk is cut off from the past.
"""

from __future__ import annotations

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State

PUBLISHED_CUT = 45


class Infinity(Sink):
    """Sink and window at positions counted from the chunk (placing: relative); `window` counts as in `sink`.

    flush: latent frames of the window that a prompt switch keeps; cuts: the shots that start with a cut, "all", a number
    or several ("1 3", the first shot is 0); cut: distance in latent frames from the oldest key to a chunk after a cut (45,
    or the window where that is longer).
    """

    source = "Infinity-RoPE (arXiv 2511.20649)"
    positions = "block-relative: sink and window directly before the chunk"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        sink: int = 1,
        window: int = 6,
        flush: int = 2,
        cuts: int | str | None = None,
        cut: int | None = None,
    ):
        super().__init__(layout, budget, sink=sink, window=window, placing="relative")
        if flush < 0:
            raise InputError(f"flush={flush} is negative; use a number of latent frames, 0 or more")
        cut = max(PUBLISHED_CUT, self.window) if cut is None else cut
        if cut < self.window:
            raise InputError(f"cut={cut} is nearer than a window of {self.window} latent frames; use a longer distance")
        self.flush, self.cut, self.cuts = flush, cut, _shots(cuts)

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        found = super().read(state, layer, now)
        if not (now.switched and (self.cuts is None or now.shot in self.cuts)):
            return found
        gap = self.cut - sum(bank.items for bank in found)
        return [bank.at(bank.positions[..., 0] - gap) for bank in found]

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        return {**state, "window": [bank.last(self.flush) for bank in state["window"]]}, 0


def _shots(cuts: int | str | None) -> set[int] | None:
    """Read the argument `cuts`: shot numbers, None for all of them."""
    if cuts == "all":
        return None
    try:
        return {int(part) for part in str("" if cuts is None else cuts).replace(",", " ").split()}
    except ValueError:
        raise InputError(f"cuts={cuts!r} is neither 'all' nor shot numbers such as 2 or '1 3'") from None
