"""Move the cast: where every individual stands, which way it looks and which pose it strikes, latent by latent.

Knows shots and time, no pixels. Distances are in units (1/48 of the frame height), speeds in units per latent.
Every drawing is held for a latent, a quarter of a second, as in stop-motion films: what moves within the four frames of a
latent blurs in a small codec, and who walks has three eyes.
"""

from dataclasses import dataclass

import numpy as np

from slotmemory.world import sprites
from slotmemory.world.clock import LATENTS_PER_CHUNK, latent_frames, num_frames
from slotmemory.world.grammar import Role, ShotSpec

# All distances are quarter units so that default-size sprites repeat their sub-pixel shifts (a sample is 1/4 pixel).
WALK_REACH_ALONE = 9.0  # from the middle of a walk to where it turns
WALK_REACH_PAIR = 4.5
WALK_LATENTS = 3  # for that; there and back in three seconds
TRAVEL_SPEED = 6.0  # in, out and across, 24 units/s
PAIR_HOMES = (0.26, 0.74)
SOLO_HOME = 0.5
OFFSTAGE = 20.0  # beyond the edge, no part of a body shows
FLOAT_HEIGHT = 1.0
_STEPS = (sprites.STEP_LEFT, sprites.STEP_RIGHT)
_BREATHS = (sprites.STAND, sprites.BREATHE, sprites.INHALE, sprites.INHALE, sprites.BREATHE, sprites.BLINK)
_FLOAT_LIFTS = (0.0, 0.5, 1.0, 1.0, 0.5, 0.0)
_HOP = ((sprites.SQUASH, 0.0), (sprites.INHALE, 4.5), (sprites.STAND, 2.5))


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
    """One individual while the latents are played through."""

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

    def play(self, latent: int) -> None:
        """Draw this latent, then move to the next."""
        if self._state == "away":
            return
        off_home = self._home - self._x
        if self._state == "entering" and off_home:
            self._facing = 1 if off_home > 0 else -1
        self._draw(latent, off_home)
        if self._state == "leaving":
            self._x += TRAVEL_SPEED * self._facing
            if not -OFFSTAGE < self._x < self._width + OFFSTAGE:
                self._state = "away"
        elif self._state == "entering":
            self._approach(off_home)
            if self._x == self._home:
                self._state = "here"
        elif self._action == "walks" and abs(off_home) <= self._reach:
            if -off_home * self._facing >= self._reach:
                self._facing = -self._facing
            self._x += self._reach / WALK_LATENTS * self._facing
        elif off_home:
            self._approach(off_home)

    def _approach(self, distance: float) -> None:
        self._x += float(np.clip(distance, -TRAVEL_SPEED, TRAVEL_SPEED))

    def _draw(self, latent: int, off_home: float) -> None:
        travels = self._state != "here" or self._action == "walks" or (self._action == "waits" and off_home != 0.0)
        if self._state == "here" and travels and abs(off_home) > self._reach * (self._action == "walks"):
            self._facing = 1 if off_home > 0 else -1
        lift = FLOAT_HEIGHT * self._floats
        beat, breath = latent % len(_HOP), latent % len(_BREATHS)
        if self._state == "here" and self._action == "jumps" and beat == 0:
            # Hops stay locked to chunk starts, so a newcomer waits for the next one.
            self._hops = True
        if travels:
            pose = _STEPS[latent % len(_STEPS)]
        elif self._hops and self._state == "here" and self._action == "jumps":
            pose, height = _HOP[beat]
            lift += height
        else:
            pose = _BREATHS[breath]
            lift += self._floats * _FLOAT_LIFTS[breath]
        held, track = latent_frames(latent), self.track
        frames = slice(held.start, held.stop)
        track.x[frames], track.lift[frames], track.pose[frames] = self._x, lift, pose
        track.facing[frames], track.present[frames] = self._facing, True


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
        for latent in range(LATENTS_PER_CHUNK * start, LATENTS_PER_CHUNK * (last_chunk + 1)):
            for actor in actors.values():
                actor.play(latent)
    return [actors[identity].track for identity in cast]
