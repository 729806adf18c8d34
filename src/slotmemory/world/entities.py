"""Give every individual its looks: what the prompt states and what only a memory can carry.

Knows attributes and colours, not shapes or places.
"""

import colorsys
from dataclasses import dataclass

import numpy as np

from slotmemory.world.vocabulary import COLOURS, KINDS

PATTERNS = ("plain", "stripes", "spots", "half")
ACCESSORIES = ("none", "hat", "crown", "bow")
SIZES = (0.95, 1.05)

# Degrees. The jitter is as wide as the name stays unambiguous to the eye: red borders orange, yellow borders lime.
HUES = {"red": 0.0, "yellow": 50.0, "green": 128.0, "blue": 212.0, "purple": 280.0}
HUE_JITTER = {"red": 8.0, "yellow": 6.0, "green": 14.0, "blue": 12.0, "purple": 12.0}
# HSL lightness and saturation at which each hue looks most like its name.
_LIGHTNESS = {"red": 0.56, "yellow": 0.53, "green": 0.42, "blue": 0.54, "purple": 0.56}
_SATURATION = {"red": 0.82, "yellow": 0.98, "green": 0.62, "blue": 0.88, "purple": 0.62}
_LIGHTNESS_JITTER = 0.04


@dataclass(frozen=True)
class Entity:
    """One individual; kind and colour are stated in prompts, the rest never is. hue in degrees, size a factor."""

    kind: str
    colour: str
    hue: float
    lightness: float
    pattern: str
    accessory: str
    size: float

    @property
    def identity(self) -> tuple[str, str]:
        return self.colour, self.kind

    @property
    def rgb(self) -> tuple[float, float, float]:
        """Body colour, each channel in 0..255."""
        rgb = colorsys.hls_to_rgb(self.hue / 360.0, self.lightness, _SATURATION[self.colour])
        return tuple(255.0 * channel for channel in rgb)


def sample_entity(rng: np.random.Generator, colour: str, kind: str) -> Entity:
    """Roll the unstated attributes of one individual."""
    if colour not in COLOURS or kind not in KINDS:
        raise ValueError(f"'{colour} {kind}' is unknown; use one of {', '.join(COLOURS)} and of {', '.join(KINDS)}")
    jitter = HUE_JITTER[colour]
    return Entity(
        kind=kind,
        colour=colour,
        hue=float(HUES[colour] + rng.uniform(-jitter, jitter)) % 360.0,
        lightness=float(_LIGHTNESS[colour] + rng.uniform(-_LIGHTNESS_JITTER, _LIGHTNESS_JITTER)),
        pattern=str(rng.choice(PATTERNS)),
        accessory=str(rng.choice(ACCESSORIES)),
        size=float(rng.uniform(*SIZES)),
    )


def entity_of(seed: int, colour: str, kind: str) -> Entity:
    """Give the individual that these words name in the narrative of this seed, whoever else is in it."""
    rng = np.random.default_rng([seed, COLOURS.index(colour), KINDS.index(kind)])
    return sample_entity(rng, colour, kind)


def colour_name(hue: float) -> str:
    """Name the vocabulary colour nearest to a hue in degrees."""
    return min(COLOURS, key=lambda colour: abs((hue - HUES[colour] + 180.0) % 360.0 - 180.0))
