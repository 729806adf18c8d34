"""No memory: every chunk is made from its prompt alone. The floor of every comparison."""

from slotmemory.memory import Memory


class Nothing(Memory):
    """Reads nothing and keeps nothing."""

    source = "no paper: the floor of every comparison"
    positions = "none: nothing is read"
