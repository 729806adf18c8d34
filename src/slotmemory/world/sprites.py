"""Draw one individual in one pose: a flat shape with a dark outline, two big eyes, its pattern and its accessory.

Knows entities and poses, not places: sprites are anchored at the feet and cached per sub-pixel shift.
Body coordinates: x to where it faces, y up from the feet, one unit = 1/48 of the frame height.
"""

from dataclasses import dataclass

import numpy as np

from slotmemory.world import shapes
from slotmemory.world.entities import Entity
from slotmemory.world.shapes import SAMPLES, box, capsule, ellipse, polygon


@dataclass(frozen=True)
class Pose:
    """One drawing of the body: stretch about the feet, which foot is forward, whether the eyes are shut."""

    stretch_x: float = 1.0
    stretch_y: float = 1.0
    step: int = 0
    blinks: bool = False


POSES = (
    Pose(),
    Pose(0.99, 1.025),
    Pose(0.98, 1.05),
    Pose(blinks=True),
    Pose(step=1),
    Pose(step=-1),
    Pose(1.08, 0.90),
)
STAND, BREATHE, INHALE, BLINK, STEP_LEFT, STEP_RIGHT, SQUASH = range(len(POSES))

# Room for the largest body in its widest and tallest pose, with hat and outline.
CANVAS_WIDTH, CANVAS_HEIGHT, CANVAS_FEET = 44, 48, 45
OUTLINE = 1.0

INK = (38, 30, 52)
CREAM = (255, 243, 214)
WHITE = (255, 255, 255)
GREY = (176, 184, 198)
GOLD = (255, 200, 40)
PINK = (255, 120, 170)
HAT = (62, 52, 84)
HAT_BAND = (240, 240, 250)
SHADOW_ALPHA = 0.22

# Where the face sits and where an accessory stands, per kind.
_EYE_LEVEL = {"cat": 15.0, "ghost": 16.5, "robot": 17.0, "ball": 16.5}
_CROWN_LEVEL = {"cat": 21.0, "ghost": 24.8, "robot": 24.0, "ball": 25.0}
_EYE_SPREAD = 4.6
_LOOK_AHEAD = 1.6


class Painter:
    """Lay flat colours over each other on one canvas of samples; rgb [3, H, W] and coverage [H, W]."""

    def __init__(self, x: np.ndarray, y: np.ndarray, outline_samples: float):
        self.x, self.y = x, y
        self._outline_samples = outline_samples
        shape = np.broadcast_shapes(x.shape, y.shape)
        self.rgb = np.zeros((3, *shape), dtype=np.float32)
        self.covered = np.zeros(shape, dtype=bool)

    def paint(self, mask: np.ndarray, colour, outlined: bool = False) -> None:
        """Fill a mask; outlined, a dark rim is laid around it first."""
        if outlined:
            rim = shapes.grow(mask, self._outline_samples)
            self.covered |= rim
            self.rgb[:, rim] = np.array(INK, dtype=np.float32)[:, None]
        self.covered |= mask
        self.rgb[:, mask] = np.array(colour, dtype=np.float32)[:, None]


@dataclass(frozen=True)
class Sprite:
    """A drawn body in pixels: premultiplied rgb [3, h, w] uint16, see-through 255 - alpha [h, w] uint16,
    solid [h, w] bool (alpha >= 1/2), and where its top left corner lies relative to the feet's pixel."""

    rgb: np.ndarray
    clear: np.ndarray
    solid: np.ndarray
    left: int
    top: int


class SpriteSheet:
    """Draw sprites on demand and keep them; one sheet per narrative."""

    def __init__(self, pixels_per_unit: float):
        self._scale = pixels_per_unit
        self._feet = (round(CANVAS_WIDTH / 2 * pixels_per_unit), round(CANVAS_FEET * pixels_per_unit))
        self._drawn: dict[tuple, np.ndarray] = {}
        self._sprites: dict[tuple, Sprite] = {}

    def body(self, entity: Entity, pose: int, facing: int, shift_x: int, shift_y: int) -> Sprite:
        """Give an entity's sprite; facing is 1 (right) or -1, shifts are in samples, 0..3."""
        key = (entity, pose, facing, shift_x, shift_y)
        if key not in self._sprites:
            self._sprites[key] = self._cut(self._samples(entity, pose, facing), shift_x, shift_y)
        return self._sprites[key]

    def shadow(self, entity: Entity, shift_x: int) -> Sprite:
        """Give the soft patch of shade under an entity."""
        key = (entity.size, shift_x)
        if key not in self._sprites:
            x, y = self._canvas()
            mask = ellipse(x / entity.size, y / entity.size, (0.0, 0.5), (12.5, 2.6))
            shade = np.zeros((4, *mask.shape), dtype=np.float32)
            shade[:3] = np.array(INK, dtype=np.float32)[:, None, None] * (mask * SHADOW_ALPHA)
            shade[3] = mask * (255.0 * SHADOW_ALPHA)
            self._sprites[key] = self._cut(shade, shift_x, 0)
        return self._sprites[key]

    def _canvas(self):
        x, y = shapes.grid(2 * self._feet[0], round(CANVAS_HEIGHT * self._scale))
        return (x - self._feet[0]) / self._scale, (self._feet[1] - y) / self._scale

    def _samples(self, entity: Entity, pose: int, facing: int) -> np.ndarray:
        """Give the canvas of samples, premultiplied [4, H, W] in 0..255; the left-facing one is the mirror image."""
        key = (entity, pose, facing)
        if key not in self._drawn:
            if facing < 0:
                # The feet stand on the canvas's mid-line, so mirroring keeps them in place.
                self._drawn[key] = self._samples(entity, pose, 1)[:, :, ::-1]
            else:
                stretch = POSES[pose]
                x, y = self._canvas()
                painter = Painter(
                    x / (entity.size * stretch.stretch_x),
                    y / (entity.size * stretch.stretch_y),
                    outline_samples=OUTLINE * self._scale * SAMPLES,
                )
                draw_body(painter, entity, stretch)
                alpha = painter.covered[None] * np.float32(255.0)
                self._drawn[key] = np.concatenate([painter.rgb * painter.covered, alpha])
        return self._drawn[key]

    def _cut(self, samples: np.ndarray, shift_x: int, shift_y: int) -> Sprite:
        """Shift a canvas by samples, average it to pixels and trim what is empty."""
        # Rolling is safe: the canvas has an empty margin wider than any shift.
        pixels = shapes.average(np.roll(samples, (shift_y, shift_x), axis=(1, 2)))
        pixels = np.rint(pixels).astype(np.uint16)
        rows = np.flatnonzero(pixels[3].any(axis=1))
        columns = np.flatnonzero(pixels[3].any(axis=0))
        pixels = pixels[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return Sprite(
            rgb=np.ascontiguousarray(pixels[:3]),
            clear=255 - pixels[3],
            solid=pixels[3] >= 128,
            left=int(columns[0]) - self._feet[0],
            top=int(rows[0]) - self._feet[1],
        )


def draw_body(painter: Painter, entity: Entity, pose: Pose) -> None:
    """Paint one individual facing right."""
    draw_kind = {"cat": _cat, "ghost": _ghost, "robot": _robot, "ball": _ball}[entity.kind]
    body = draw_kind(painter, entity.rgb, pose)
    painter.paint(body & _pattern(painter, entity.pattern), CREAM)
    _face(painter, entity.kind, pose)
    _accessory(painter, entity.accessory, _CROWN_LEVEL[entity.kind])


def _cat(p: Painter, colour, pose: Pose) -> np.ndarray:
    x, y = p.x, p.y
    wag = 1.2 * pose.step
    tail = capsule(x, y, (-9.5, 4.5), (-14.0, 8.0), 2.0) | capsule(x, y, (-14.0, 8.0), (-14.2 + wag, 14.0), 2.0)
    p.paint(tail, colour, outlined=True)
    feet = ellipse(x, y, (-6.0, 2.2 + max(0, pose.step)), (4.2, 2.4))
    feet |= ellipse(x, y, (6.0, 2.2 + max(0, -pose.step)), (4.2, 2.4))
    p.paint(feet, colour, outlined=True)
    body = ellipse(x, y, (0.0, 12.0), (12.0, 10.2)) | box(x, y, -11.0, 11.0, 2.5, 13.0, 4.0)
    for side in (-1, 1):
        body |= polygon(x, y, [(side * 11.2, 12.0), (side * 10.8, 27.0), (side * 2.6, 20.5)])
    p.paint(body, colour, outlined=True)
    return body | feet


def _ghost(p: Painter, colour, pose: Pose) -> np.ndarray:
    x, y = p.x, p.y
    body = ellipse(x, y, (0.0, 14.4), (11.2, 11.4))
    body |= polygon(x, y, [(-11.2, 15.0), (11.2, 15.0), (12.0, 4.2), (-12.0, 4.2)])
    for lobe in (-1, 0, 1):
        # Outer and middle lobes wave in turn.
        low = 0.3 + max(0, pose.step * (1 if lobe else -1)) * 1.6
        body |= ellipse(x, y, (lobe * 8.0, 4.2), (4.0, 4.2 - low))
    p.paint(body, colour, outlined=True)
    return body


def _robot(p: Painter, colour, pose: Pose) -> np.ndarray:
    x, y = p.x, p.y
    p.paint(box(x, y, -1.0, 1.0, 23.0, 27.0) | ellipse(x, y, (0.0, 27.0), (2.0, 2.0)), GREY, outlined=True)
    left, right = 1.2 * max(0, pose.step), 1.2 * max(0, -pose.step)
    p.paint(box(x, y, -8.0, -2.0, left, 4.0, 1.0) | box(x, y, 2.0, 8.0, right, 4.0, 1.0), GREY, outlined=True)
    p.paint(box(x, y, -13.6, -10.0, 12.5, 18.5, 1.0) | box(x, y, 10.0, 13.6, 12.5, 18.5, 1.0), GREY, outlined=True)
    body = box(x, y, -11.5, 11.5, 3.0, 24.0, 1.6)
    p.paint(body, colour, outlined=True)
    return body


def _ball(p: Painter, colour, pose: Pose) -> np.ndarray:
    # A ball rocks instead of rolling: a turning pattern would be unreadable at this size.
    if pose.step:
        angle = 0.2 * pose.step
        turned_x = np.cos(angle) * p.x + np.sin(angle) * (p.y - 13.0)
        p.y = -np.sin(angle) * p.x + np.cos(angle) * (p.y - 13.0) + 13.0
        p.x = turned_x
    body = ellipse(p.x, p.y, (0.0, 13.0), (12.8, 12.8))
    p.paint(body, colour, outlined=True)
    return body


def _pattern(p: Painter, pattern: str) -> np.ndarray:
    """Mask where the second colour goes, before clipping to the body."""
    x, y = p.x, p.y
    if pattern == "stripes":
        return (np.abs(y - 4.8) < 1.7) | (np.abs(y - 11.2) < 1.6) | (np.abs(y - 21.8) < 1.4)
    if pattern == "spots":
        spots = ellipse(x, y, (-7.6, 8.6), (3.2, 3.2)) | ellipse(x, y, (0.2, 5.6), (3.2, 3.2))
        return spots | ellipse(x, y, (7.8, 8.8), (3.2, 3.2)) | ellipse(x, y, (-7.4, 20.8), (2.4, 2.4))
    if pattern == "half":
        return np.broadcast_to(y < 10.6, p.covered.shape)
    return np.zeros(p.covered.shape, dtype=bool)


def _face(p: Painter, kind: str, pose: Pose) -> None:
    x, y = p.x, p.y
    level = _EYE_LEVEL[kind]
    for side in (-1, 1):
        centre = side * _EYE_SPREAD + _LOOK_AHEAD
        if pose.blinks:
            p.paint(box(x, y, centre - 2.6, centre + 2.6, level - 0.8, level + 0.4), INK)
            continue
        white = ellipse(x, y, (centre, level), (3.3, 3.3))
        if kind == "robot":
            white = box(x, y, centre - 3.0, centre + 3.0, level - 3.0, level + 3.0, 0.6)
        p.paint(white, WHITE)
        p.paint(ellipse(x, y, (centre + 0.9, level - 0.1), (1.9, 2.3)), INK)
    if kind == "cat":
        p.paint(polygon(x, y, [(0.0, 12.4), (3.2, 12.4), (1.6, 10.4)]), PINK)
    elif kind == "ghost":
        p.paint(ellipse(x, y, (_LOOK_AHEAD, 11.2), (1.7, 1.9)), INK)
    elif kind == "robot":
        p.paint(box(x, y, -2.6, 5.8, 10.0, 11.8), INK)
    else:
        p.paint(ellipse(x, y, (_LOOK_AHEAD, 12.2), (2.8, 2.2)) & (y < 12.2), INK)


def _accessory(p: Painter, accessory: str, level: float) -> None:
    x, y = p.x, p.y - level
    if accessory == "hat":
        p.paint(box(x, y, -8.0, 8.0, -1.0, 1.2, 0.8) | box(x, y, -5.2, 5.2, 0.0, 8.6, 0.8), HAT, outlined=True)
        p.paint(box(x, y, -5.2, 5.2, 1.4, 3.6), HAT_BAND)
    elif accessory == "crown":
        points = [(-6.4, -0.6), (-7.0, 7.6), (-3.2, 3.8), (0.0, 8.4), (3.2, 3.8), (7.0, 7.6), (6.4, -0.6)]
        p.paint(polygon(x, y, points), GOLD, outlined=True)
    elif accessory == "bow":
        wings = polygon(x, y, [(0.0, 2.6), (-8.2, 7.2), (-8.2, -2.0)])
        wings |= polygon(x, y, [(0.0, 2.6), (8.2, 7.2), (8.2, -2.0)])
        p.paint(wings, PINK, outlined=True)
        p.paint(ellipse(x, y, (0.0, 2.6), (2.4, 2.6)), WHITE, outlined=True)
