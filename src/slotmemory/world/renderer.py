"""Compose cached sprites onto cached backgrounds and read the truth off the same sprites.

Knows tracks, looks and backgrounds; not prompts.
"""

from dataclasses import dataclass

import numpy as np

from slotmemory.world.entities import Entity
from slotmemory.world.motion import Track
from slotmemory.world.scenery import UNITS_HIGH
from slotmemory.world.shapes import SAMPLES
from slotmemory.world.sprites import POSES, Sprite, SpriteSheet

GROUND = 45.0  # units from the top to the line the cast stands on


@dataclass(frozen=True)
class WorldSize:
    """Pixels of a frame; everything is drawn to scale with the height."""

    width: int = 160
    height: int = 96

    def __post_init__(self):
        if self.height < 24 or self.width < self.height:
            raise ValueError(f"size {self.width}x{self.height} is too small or upright; use 24 <= height <= width")

    @property
    def pixels_per_unit(self) -> float:
        return self.height / UNITS_HIGH

    @property
    def units_wide(self) -> float:
        return self.width / self.pixels_per_unit


@dataclass(frozen=True)
class Truth:
    """What is where in a span of T frames, for all E entities of the narrative.
    boxes [E, T, 4] int32 tight around the visible pixels (x0, y0, x1, y1; ends exclusive), zeros when unseen;
    visibility [E, T] float32 visible share of the body (1 = nothing cut off or hidden);
    masks [T, H, W] uint8, 0 background, index + 1 an entity;
    flow [T, 2, H, W] float32 (dx, dy) in pixels to frame t + 1: the body's shift and stretch, not its legs;
    0 on the background, on the last frame and across cuts."""

    boxes: np.ndarray
    visibility: np.ndarray
    masks: np.ndarray
    flow: np.ndarray


class Stage:
    """Draw spans of frames of one choreographed cast."""

    def __init__(self, entities: list[Entity], tracks: list[Track], size: WorldSize):
        self._entities, self._tracks, self._size = entities, tracks, size
        self._sheet = SpriteSheet(size.pixels_per_unit)
        per_unit = size.pixels_per_unit * SAMPLES
        # Feet in whole samples from the top left corner, [E, T]; the finest grid sprites are cut on.
        self._feet_x = [np.rint(track.x * per_unit).astype(int) for track in tracks]
        self._feet_y = [np.rint((GROUND - track.lift) * per_unit).astype(int) for track in tracks]
        self._ground = round(GROUND * size.pixels_per_unit)

    def draw(self, pixels: np.ndarray, frames: range) -> None:
        """Draw everybody into pixels [T, 3, H, W] uint8, which already holds the backgrounds."""
        for canvas, frame in zip(pixels, frames):
            here = [index for index, track in enumerate(self._tracks) if track.present[frame]]
            for index in here:
                column, shift = divmod(int(self._feet_x[index][frame]), SAMPLES)
                self._blend(canvas, self._sheet.shadow(self._entities[index], shift), column, self._ground)
            for index in here:
                self._blend(canvas, *self._place(index, frame))

    def truth(self, frames: range, cut_frames: set[int]) -> Truth:
        """Measure what `draw` shows; cut_frames are frames that begin another scene."""
        height, width = self._size.height, self._size.width
        num, span = len(self._entities), len(frames)
        boxes = np.zeros((num, span, 4), dtype=np.int32)
        visibility = np.zeros((num, span), dtype=np.float32)
        masks = np.zeros((span, height, width), dtype=np.uint8)
        flow = np.zeros((span, 2, height, width), dtype=np.float32)
        for t, frame in enumerate(frames):
            full = {}
            for index, track in enumerate(self._tracks):
                if track.present[frame]:
                    sprite, column, row = self._place(index, frame)
                    full[index] = int(sprite.solid.sum())
                    window, part = self._clip(sprite, column, row)
                    masks[t][window][sprite.solid[part]] = index + 1
            for index, area in full.items():
                rows, columns = np.nonzero(masks[t] == index + 1)
                if not len(rows):
                    continue
                visibility[index, t] = len(rows) / area
                boxes[index, t] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
                if frame + 1 not in cut_frames:
                    flow[t][:, rows, columns] = self._flow(index, frame, columns, rows)
        return Truth(boxes, visibility, masks, flow)

    def _flow(self, index: int, frame: int, columns, rows):
        """Move pixel centres with the feet and with the stretch of the pose about them."""
        track = self._tracks[index]
        if frame + 1 >= len(track.present) or not track.present[frame + 1]:
            return np.zeros((2, len(rows)), dtype=np.float32)
        old, new = POSES[track.pose[frame]], POSES[track.pose[frame + 1]]
        moved = []
        for feet, place, ratio in (
            (self._feet_x[index], columns, new.stretch_x / old.stretch_x),
            (self._feet_y[index], rows, new.stretch_y / old.stretch_y),
        ):
            here, there = feet[frame] / SAMPLES, feet[frame + 1] / SAMPLES
            moved.append(there - here + (place + 0.5 - here) * (ratio - 1.0))
        return np.stack(moved)

    def _place(self, index: int, frame: int) -> tuple[Sprite, int, int]:
        """Give an entity's sprite and the pixel its feet stand on."""
        track = self._tracks[index]
        column, shift_x = divmod(int(self._feet_x[index][frame]), SAMPLES)
        row, shift_y = divmod(int(self._feet_y[index][frame]), SAMPLES)
        pose, facing = int(track.pose[frame]), int(track.facing[frame])
        return self._sheet.body(self._entities[index], pose, facing, shift_x, shift_y), column, row

    def _clip(self, sprite: Sprite, column: int, row: int):
        """Give the slices of the frame that a sprite covers, and of the sprite that lie in the frame."""
        height, width = sprite.clear.shape
        top, left = row + sprite.top, column + sprite.left
        y0, y1 = max(top, 0), max(0, min(top + height, self._size.height))
        x0, x1 = max(left, 0), max(0, min(left + width, self._size.width))
        # An end before its start would count from the far side of the sprite.
        y1, x1 = max(y0, y1), max(x0, x1)
        return (slice(y0, y1), slice(x0, x1)), (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))

    def _blend(self, canvas: np.ndarray, sprite: Sprite, column: int, row: int) -> None:
        window, part = self._clip(sprite, column, row)
        under = canvas[(slice(None), *window)]
        # Premultiplied "over" in 16 bits; +255 >> 8 divides by 255 exactly at both ends.
        mixed = (under * sprite.clear[part] + 255) >> 8
        mixed += sprite.rgb[(slice(None), *part)]
        under[...] = mixed
