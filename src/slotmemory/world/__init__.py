"""A small seeded world of narrated videos: the data our models learn from and are measured on.

Prompts state kind, colour, action and scene; hue, pattern, accessory and size are left for a memory to carry.
"""

from slotmemory.world.clock import (
    FPS,
    FRAMES_PER_CHUNK,
    FRAMES_PER_LATENT,
    LATENTS_PER_CHUNK,
    chunk_frames,
    chunk_of,
    chunks_in,
    latent_frames,
    num_frames,
)
from slotmemory.world.entities import ACCESSORIES, HUES, PATTERNS, Entity, colour_name, entity_of, sample_entity
from slotmemory.world.grammar import Role, ShotSpec, compose, compose_plain, parse, sample_story
from slotmemory.world.narrative import Narrative, Shot
from slotmemory.world.renderer import Truth, WorldSize
from slotmemory.world.vocabulary import ACTIONS, COLOURS, KINDS, SCENES, WORDS, UnknownWord, canonical

__all__ = [
    "ACCESSORIES",
    "ACTIONS",
    "COLOURS",
    "FPS",
    "FRAMES_PER_CHUNK",
    "FRAMES_PER_LATENT",
    "HUES",
    "KINDS",
    "LATENTS_PER_CHUNK",
    "PATTERNS",
    "SCENES",
    "WORDS",
    "Entity",
    "Narrative",
    "Role",
    "Shot",
    "ShotSpec",
    "Truth",
    "UnknownWord",
    "WorldSize",
    "canonical",
    "chunk_frames",
    "chunk_of",
    "chunks_in",
    "colour_name",
    "compose",
    "compose_plain",
    "entity_of",
    "latent_frames",
    "num_frames",
    "parse",
    "sample_entity",
    "sample_story",
]
