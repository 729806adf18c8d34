"""Frame sink and local window: the video's first latent frames stay, the last ones slide by. The field's default.

Sources: Self-Forcing (rolling KV cache with `sink_size`), LongLive (frame sink, recache at a prompt switch). `window`
counts as their `local_attn_size` does: sink, past and the chunk being made, in latent frames.
"""

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories._placing import PLACINGS, check_placing, place
from slotmemory.memory import Bank, Memory, Now, State, Written


class Sink(Memory):
    """Reads the first `sink` latent frames and the last ones, `window` in all with the chunk itself.

    recache: at a prompt switch, recompute what stands in the window under the new prompt (LongLive); otherwise it
    keeps the prompt it was made under. global_sink: the sink outlives switches; otherwise a recache re-seats it on the
    frames it replays. placing, reach: see `_placing.py`. compat: "longlive" also recomputes a global sink when the
    window is not yet full at a switch, as the published program does.
    """

    source = "Self-Forcing (arXiv 2506.08009), LongLive (arXiv 2509.22622)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        sink: int = 3,
        window: int = 12,
        recache: bool = False,
        global_sink: bool = True,
        placing: str = PLACINGS[0],
        reach: int = 21,
        compat: str = "",
    ):
        chunk, per_frame = layout.frames_per_chunk, layout.tokens_per_frame
        if budget is not None:  # the budget buys frames beside the chunk itself
            window = min(window, budget // per_frame + chunk)
            sink = min(sink, max(window - chunk, 0))
        past = window - sink - chunk
        if sink < 0 or past < 0:
            raise InputError(
                f"window={window} cannot hold sink={sink} and a chunk of {chunk} latent frames; use window >= {sink + chunk}"
            )
        if compat not in ("", "longlive"):
            raise InputError(f"compat={compat!r} is not known; use 'longlive' or leave it out")
        super().__init__(layout, (sink + past) * per_frame if budget is None else budget)
        self.sink, self.past, self.window = sink, past, window
        self.recache, self.global_sink, self.compat = recache, global_sink, compat
        self.placing, self.reach = check_placing(placing), reach
        self.replays = window if recache else 0

    def start(self, batch: int) -> State:
        return {"sink": [], "window": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        kept = [state[name][layer] for name in ("sink", "window") if state[name]]
        return place(kept, now, self.placing, self.reach)

    def write(self, state: State, written: Written) -> State:
        sinks, windows = [], []
        for layer in range(len(written.layers)):
            new = written.bank(layer)
            sink = state["sink"][layer] if state["sink"] else new.first(0)
            window = state["window"][layer] if state["window"] else new.first(0)
            missing = self.sink - sink.items
            sinks.append(sink.join(new.first(missing)) if missing else sink)
            windows.append(window.join(new.after(missing) if missing else new))
        return {**state, "sink": sinks, "window": windows}

    def update(self, state: State, written: Written) -> State:
        return {**state, "window": [bank.last(self.past) for bank in state["window"]]}

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        if not self.recache or now.frame == 0:
            return state, 0
        young = now.frame <= self.window
        if not self.global_sink or (young and self.compat == "longlive"):
            return {**state, "sink": [], "window": []}, min(self.window, now.frame)
        return {**state, "window": []}, min(self.window, now.frame) - self.sink if young else self.window - self.sink
