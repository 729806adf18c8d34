"""Keep every latent frame: the ceiling of every comparison, and dense causal attention when positions are native.

Cost grows with the video. The budget is ignored below what was kept: a ceiling has none.
"""

from slotmemory.layout import Layout
from slotmemory.memories._placing import PLACINGS, check_placing, place
from slotmemory.memory import Bank, Memory, Now, State, Written


class Everything(Memory):
    """Reads all past latent frames.

    placing: where their keys stand in time, see `_placing.py`; reach: the distance that `capped` allows.
    """

    source = "no paper: the ceiling of every comparison"
    unlimited = True

    def __init__(self, layout: Layout, budget: int | None = None, *, placing: str = PLACINGS[0], reach: int = 21):
        super().__init__(layout, None)
        self.placing, self.reach = check_placing(placing), reach

    def start(self, batch: int) -> State:
        return {"past": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        if not state["past"]:
            return []
        return place([state["past"][layer]], now, self.placing, self.reach)

    def write(self, state: State, written: Written) -> State:
        new = [written.bank(layer) for layer in range(len(written.layers))]
        past = [old.join(bank) for old, bank in zip(state["past"], new)] if state["past"] else new
        return {**state, "past": past}
