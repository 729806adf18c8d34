"""A sliding window of the last latent frames: what streaming models do by default, and why they forget.

Source: Self-Forcing's rolling KV cache without a sink (`local_attn_size`).
"""

from slotmemory.layout import Layout
from slotmemory.memories._placing import PLACINGS
from slotmemory.memories.sink import Sink


class Window(Sink):
    """Reads the last latent frames; `window` counts them with the chunk being made. Arguments as in `sink`."""

    source = "Self-Forcing (arXiv 2506.08009)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        window: int = 12,
        recache: bool = False,
        placing: str = PLACINGS[0],
        reach: int = 21,
    ):
        super().__init__(layout, budget, sink=0, window=window, recache=recache, placing=placing, reach=reach)
