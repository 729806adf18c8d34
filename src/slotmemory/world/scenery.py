"""Paint the four backgrounds: two or three flat areas and one or two landmarks.

Knows scenes and a seed; the same seed and scene always give the same picture.
"""

import numpy as np

from slotmemory.world import shapes
from slotmemory.world.shapes import box, capsule, ellipse, polygon
from slotmemory.world.vocabulary import SCENES

UNITS_HIGH = 48.0
TINT = 0.04
FAR, NEAR = (0.14, 0.20), (0.80, 0.86)  # where landmarks are, of the width


class Backdrop:
    """A picture of samples in units (48 high, y down): flat fills under one tint."""

    def __init__(self, width: int, height: int, tint: np.ndarray):
        scale = height / UNITS_HIGH
        x, y = shapes.grid(width, height)
        self.x, self.y = x / scale, y / scale
        self.units_wide = width / scale
        self._tint = tint
        self._rgb = np.zeros((3, *np.broadcast_shapes(x.shape, y.shape)), dtype=np.float32)

    def fill(self, mask, colour) -> None:
        """Paint a mask in one colour."""
        mask = np.broadcast_to(mask, self._rgb.shape[1:])
        self._rgb[:, mask] = (np.array(colour, dtype=np.float32) * self._tint)[:, None]

    def fade(self, top, bottom, end: float) -> None:
        """Paint everything with a vertical gradient that reaches `bottom` at height `end`."""
        along = np.clip(self.y / end, 0.0, 1.0)[None]
        top, bottom = (np.array(colour, dtype=np.float32)[:, None, None] for colour in (top, bottom))
        self._rgb[:] = (top + (bottom - top) * along) * self._tint[:, None, None]

    def pixels(self) -> np.ndarray:
        """Give the picture as uint8 [3, H, W]."""
        return np.rint(np.clip(shapes.average(self._rgb), 0, 255)).astype(np.uint8)


def paint_scene(scene: str, seed: int, width: int, height: int) -> np.ndarray:
    """Paint the background [3, H, W] uint8 that this scene has in the narrative of this seed."""
    rng = np.random.default_rng([seed, 1000 + SCENES.index(scene)])
    tint = (1.0 + rng.uniform(-TINT, TINT, size=3)).astype(np.float32)
    # The far landmark left, the near one right, and only about where by chance: one that may be on either side is drawn on
    # both by a model that has not made up its mind.
    far, near = rng.uniform(*FAR), rng.uniform(*NEAR)
    backdrop = Backdrop(width, height, tint)
    painter = {"meadow": _meadow, "beach": _beach, "snow": _snow, "night": _night}[scene]
    painter(backdrop, near * backdrop.units_wide, far * backdrop.units_wide)
    return backdrop.pixels()


def _meadow(b: Backdrop, here: float, there: float) -> None:
    x, y = b.x, b.y
    b.fade((150, 210, 248), (205, 236, 252), 30)
    b.fill(ellipse(x, y, (there, 8), (5, 5)), (255, 226, 110))
    b.fill(ellipse(x, y, (there, 42), (30, 17)), (160, 212, 120))
    b.fill(y > 32, (186, 226, 128))
    b.fill(box(x, y, here - 2, here + 2, 20, 34), (156, 110, 78))
    b.fill(ellipse(x, y, (here, 15), (10, 9.5)), (104, 178, 98))


def _beach(b: Backdrop, here: float, there: float) -> None:
    x, y = b.x, b.y
    b.fade((176, 226, 250), (232, 246, 250), 22)
    b.fill(y > 21, (76, 190, 206))
    b.fill(polygon(x, y, [(there - 1, 5), (there - 1, 19), (there + 8, 19)]), (255, 252, 246))
    b.fill(polygon(x, y, [(there - 7, 20), (there + 9, 20), (there + 6, 25), (there - 4, 25)]), (216, 108, 84))
    b.fill(y > 32, (250, 222, 164))
    b.fill(capsule(x, y, (here, 36), (here + 2, 14), 1.6), (160, 112, 76))
    for dx, dy in ((-10, 2), (-7, -5), (7, -5), (10, 2)):
        b.fill(capsule(x, y, (here + 2, 13), (here + 2 + dx, 12 + dy), 2.1), (72, 166, 100))


def _snow(b: Backdrop, here: float, there: float) -> None:
    x, y = b.x, b.y
    b.fade((178, 200, 224), (220, 230, 240), 30)
    b.fill(polygon(x, y, [(there - 20, 34), (there, 6), (there + 20, 34)]), (142, 162, 192))
    b.fill(polygon(x, y, [(there - 6, 14.4), (there, 6), (there + 6, 14.4)]), (248, 250, 255))
    b.fill(y > 32, (240, 246, 252))
    b.fill(box(x, y, here - 1.8, here + 1.8, 28, 36), (140, 104, 84))
    for top, half in ((11, 10.0), (1, 7.5)):
        b.fill(polygon(x, y, [(here - half, top + 18), (here, top), (here + half, top + 18)]), (74, 140, 126))


def _night(b: Backdrop, here: float, there: float) -> None:
    x, y = b.x, b.y
    b.fade((64, 70, 130), (104, 108, 172), 32)
    b.fill(ellipse(x, y, (there, 9), (6, 6)) & ~ellipse(x, y, (there + 3, 7.5), (5, 5)), (255, 242, 188))
    # Stars only between moon and house, so that none sits on either.
    for along, height in ((0.30, 5), (0.46, 13), (0.64, 5)):
        b.fill(ellipse(x, y, (there + along * (here - there), height), (1, 1)), (255, 246, 214))
    b.fill(y > 32, (76, 98, 122))
    b.fill(box(x, y, here - 8, here + 8, 19, 34), (58, 58, 96))
    b.fill(polygon(x, y, [(here - 11, 19.5), (here, 10), (here + 11, 19.5)]), (128, 78, 104))
    b.fill(box(x, y, here - 3, here + 3, 23, 29), (255, 216, 112))
