"""Move the cast: where every individual stands, which way it looks and which pose it strikes, frame by frame.

Knows shots and time, no pixels. Distances are in units (1/48 of the frame height), speeds in units per frame.
"""

from dataclasses import dataclass

import numpy as np

from slotmemory.world import sprites
from slotmemory.world.clock import FRAMES_PER_LATENT, beat_of, chunk_frames, num_frames
from slotmemory.world.grammar import Role, ShotSpec

# All speeds are quarter units so that default-size sprites repeat their sub-pixel shifts (a sample is 1/4 pixel).
WALK_SPEED = 0.75  # 12 units/s
DRIFT_SPEED = 1.5
ENTRY_SPEED = 1.5  # 24 units/s; quicker ones blur in the codec
WALK_REACH_ALONE = 9.0  # there and back in 48 frames
WALK_REACH_PAIR = 4.5  # there and back in 24 frames
PAIR_HOMES = (0.26, 0.74)
SOLO_HOME = 0.5
OFFSTAGE = 20.0  # beyond the edge, no part of a body shows
FLOAT_HEIGHT = 1.0
_BREATHS = (sprites.STAND, sprites.BREATHE, sprites.INHALE, sprites.INHALE, sprites.BREATHE, sprites.STAND)
_FLOAT_LIFTS = (0.0, 0.5, 1.0, 1.0, 0.5, 0.0)
# A latent is four frames, and what is quick within one blurs in any codec: a hop is three drawings, held for a latent each.
_HOP = ((sprites.SQUASH, 0.0), (sprites.INHALE, 4.5), (sprites.STAND, 2.5))
_BREATH_FRAMES = FRAMES_PER_LATENT * len(_BREATHS)


@dataclass(frozen=True)
class Track:
    """One individual's way through a narrative; every array is [T].
    x and lift (height of the feet above ground) in units, pose an index into `sprites.POSES`, facing 1 or -1."""

    x: np.ndarray
    lift: np.ndarray
    pose: np.ndarray
    facing: np.ndarray
    present: np.ndarray


class _Actor:
    """One individual while the frames are played through."""

    def __init__(self, kind: str, width: float, frames: int):
        self._floats = kind == "ghost"
        self._width = width
        self._x = self._home = 0.0
        self._facing = 1
        self._state = "away"
        self._action = "waits"
        self._hops = False
        self._reach = 0.0
        self.track = Track(
            x=np.zeros(frames, dtype=np.float32),
            lift=np.zeros(frames, dtype=np.float32),
            pose=np.zeros(frames, dtype=np.int8),
            facing=np.ones(frames, dtype=np.int8),
            present=np.zeros(frames, dtype=bool),
        )

    def cue(self, role: Role | None, place: int, num_roles: int, cuts: bool) -> None:
        """Take the direction of a new shot; after a cut everybody is in place at once."""
        if role is None:
            if cuts:
                self._state = "away"
            elif self._state in ("here", "entering"):
                self._state = "leaving"
                self._facing = -1 if self._x < self._width / 2 else 1
            return
        alone = num_roles == 1
        self._home = round(4 * (SOLO_HOME if alone else PAIR_HOMES[place]) * self._width) / 4
        self._reach = WALK_REACH_ALONE if alone else WALK_REACH_PAIR
        self._action, self._hops = role.action, False
        if cuts:
            self._state, self._x = "here", self._home
            self._facing = 1 if alone else (1, -1)[place]
            self._hops = role.action == "jumps"
        elif self._state == "away":
            self._state = "entering"
            self._x = -OFFSTAGE if self._home < self._width / 2 else self._width + OFFSTAGE
        elif self._state == "leaving":
            self._state = "entering"

    def play(self, frame: int) -> None:
        """Record this frame, then move to the next."""
        if self._state == "away":
            return
        off_home = self._home - self._x
        if self._state == "entering" and off_home:
            self._facing = 1 if off_home > 0 else -1
        self._record(frame, off_home)
        if self._state == "leaving":
            self._x += ENTRY_SPEED * self._facing
            if not -OFFSTAGE < self._x < self._width + OFFSTAGE:
                self._state = "away"
        elif self._state == "entering":
            self._approach(off_home, ENTRY_SPEED)
            if self._x == self._home:
                self._state = "here"
        elif self._action == "walks" and abs(off_home) <= self._reach:
            if (self._facing > 0 and -off_home >= self._reach) or (self._facing < 0 and off_home >= self._reach):
                self._facing = -self._facing
            self._x += WALK_SPEED * self._facing
        elif off_home:
            self._approach(off_home, DRIFT_SPEED)

    def _approach(self, distance: float, speed: float) -> None:
        self._x += float(np.clip(distance, -speed, speed))

    def _record(self, frame: int, off_home: float) -> None:
        travels = self._state != "here" or self._action == "walks" or (self._action == "waits" and off_home != 0.0)
        if self._state == "here" and travels and abs(off_home) > self._reach * (self._action == "walks"):
            self._facing = 1 if off_home > 0 else -1
        lift = FLOAT_HEIGHT * self._floats
        beat = beat_of(frame)
        if self._state == "here" and self._action == "jumps" and beat == 0:
            # Hops stay locked to chunk starts, so a newcomer waits for the next one.
            self._hops = True
        if travels:
            pose = (sprites.STEP_LEFT, sprites.STEP_RIGHT)[beat_of(frame, 2 * FRAMES_PER_LATENT) // FRAMES_PER_LATENT]
        elif self._hops and self._state == "here" and self._action == "jumps":
            pose, height = _HOP[beat // FRAMES_PER_LATENT]
            lift += height
        else:
            breath = beat_of(frame, _BREATH_FRAMES)
            pose = _BREATHS[breath // FRAMES_PER_LATENT]
            lift += self._floats * _FLOAT_LIFTS[breath // FRAMES_PER_LATENT]
            if breath >= _BREATH_FRAMES - FRAMES_PER_LATENT:
                pose = sprites.BLINK
        track = self.track
        track.x[frame], track.lift[frame], track.pose[frame] = self._x, lift, pose
        track.facing[frame], track.present[frame] = self._facing, True


def choreograph(shots: list[tuple[ShotSpec, int]], cast: list[tuple[str, str]], chunks: int, width: float):
    """Play all shots (spec, start chunk) through and give one Track per (colour, kind) of the cast.
    width is the frame's, in units. Nothing is left to chance: a place that the prompt does not settle would have to be
    guessed after every cut, and a model that has not made up its mind draws somebody at two places at once."""
    frames = num_frames(chunks)
    actors = {identity: _Actor(identity[1], width, frames) for identity in cast}
    scene = None
    for index, (spec, start) in enumerate(shots):
        last_chunk = shots[index + 1][1] - 1 if index + 1 < len(shots) else chunks - 1
        places = {role.identity: place for place, role in enumerate(spec.roles)}
        for identity, actor in actors.items():
            place = places.get(identity)
            role = None if place is None else spec.roles[place]
            actor.cue(role, place or 0, len(spec.roles), cuts=spec.scene != scene)
        scene = spec.scene
        for frame in range(chunk_frames(start).start, chunk_frames(last_chunk).stop):
            for actor in actors.values():
                actor.play(frame)
    return [actors[identity].track for identity in cast]
