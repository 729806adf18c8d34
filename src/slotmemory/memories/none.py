"""No memory: every chunk is made from its prompt alone. The floor of every comparison."""

from slotmemory.layout import Layout
from slotmemory.memory import Memory


class Nothing(Memory):
    """Reads nothing and keeps nothing."""

    source = "no paper: the floor of every comparison"
    positions = "none: nothing is read"

    def __init__(self, layout: Layout, budget: int | None = None):
        super().__init__(layout, 0 if budget is None else budget)
