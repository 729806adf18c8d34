"""Anchored memory: beside sink and window, the first chunk made under the last prompt stays as a bridge between shots.

Source: Anchor Forcing (arXiv 2603.13405) and its program: a junction cache of the first chunk under every new prompt and
of the one before it, window recached under the new prompt with the sink protected, and three regions of positions
inside the trained 21 latent frames: sink 0-2, junction 6-8, window and chunk 12-20. Positions here are the same
distances: a region stands at its own frames until these are too far, then at its place before the chunk.

The junction is read once it is older than the window (published: switch + window - sink < chunk); until then the
junction of the prompt before is. That one has to be older than the window too, here: the published program reads it
beside its own copy in the window when prompts follow each other quickly.
"""

from __future__ import annotations

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State, Written

SHARE = 5  # of a full cache of 15 frames, a junction takes 3


class Anchored(Sink):
    """Reads sink, junction and window; `sink`, `window` and `recache` as in `sink`.

    junction: latent frames kept of the first chunk under a prompt; two of them are held, one is read. trained: how many
    latent frames the model saw at once in training, which the three regions share.
    """

    source = "Anchor Forcing (arXiv 2603.13405)"
    positions = "three regions: sink, junction and window, within the trained range"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        sink: int = 3,
        window: int = 12,
        junction: int = 3,
        recache: bool = True,
        trained: int = 21,
    ):
        chunk, per_frame = layout.frames_per_chunk, layout.tokens_per_frame
        if not 0 <= junction <= chunk:
            raise InputError(f"junction={junction} is not part of a chunk; use 0 to {chunk} latent frames")
        if budget is None:
            super().__init__(layout, sink=sink, window=window, recache=recache)
            self.budget += 2 * junction * per_frame
        else:
            junction = min(junction, budget // per_frame // SHARE)
            super().__init__(layout, budget - 2 * junction * per_frame, sink=sink, window=window, recache=recache)
            self.budget = budget
        self.junction = junction
        gap = max(trained - self.window - junction, 0) // 2
        self.sink_reach = max(trained, self.window) - chunk
        self.junction_reach = self.sink_reach - self.sink - gap

    def start(self, batch: int) -> State:
        return {**super().start(batch), "junction": [], "prior": [], "switches": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        if not state["sink"]:
            return []
        found = [within(state["sink"][layer], now, self.sink_reach)]
        for name, switch in zip(("junction", "prior"), reversed(state["switches"])):
            if switch + self.window - self.sink < now.frame:
                found.append(within(state[name][layer], now, self.junction_reach))
                break
        return [*found, state["window"][layer]] if state["window"] else found

    def write(self, state: State, written: Written) -> State:
        after, now = super().write(state, written), written.now
        if not now.switched or now.replay or not self.junction:
            return after
        new = [written.bank(layer).first(self.junction) for layer in range(len(written.layers))]
        switches = [*state["switches"][-1:], now.frame]  # latent frames, of the prior junction and of this one
        return {**after, "junction": new, "prior": state["junction"], "switches": switches}


def within(bank: Bank, now: Now, reach: int) -> Bank:
    """Move a region as a whole so that it starts at most `reach` latent frames before the chunk."""
    frames = bank.positions[..., 0]
    return bank.at(frames + (now.frame - reach - frames[:, :1, :1]).clamp(min=0))
