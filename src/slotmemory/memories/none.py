"""No memory: every chunk is made from its prompt alone. The floor of every comparison."""

from slotmemory.memory import Memory


class Nothing(Memory):
    """Reads nothing and keeps nothing."""
