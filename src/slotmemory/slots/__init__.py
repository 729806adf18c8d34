"""Slots: bind the tokens of a chunk to entities, carry them over time, and choose the tokens that stand for them."""

from slotmemory.slots.adapter import Adapter, LayerAdapters, LayerDecoders
from slotmemory.slots.attention import Grouper, Grouping, LearnedInit, Predictor, RandomInit, SlotAttention
from slotmemory.slots.checkpoint import load_slotcontrast
from slotmemory.slots.losses import contrast, pair_weight, reconstruction
from slotmemory.slots.select import Selection, select

__all__ = [
    "Adapter",
    "Grouper",
    "Grouping",
    "LayerAdapters",
    "LayerDecoders",
    "LearnedInit",
    "Predictor",
    "RandomInit",
    "Selection",
    "SlotAttention",
    "contrast",
    "load_slotcontrast",
    "pair_weight",
    "reconstruction",
    "select",
]
