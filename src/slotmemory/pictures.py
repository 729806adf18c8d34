"""Two pictures of a run: its shots side by side, and what the memory held, read and evicted over time.

Drawn with Pillow from frames and trace records alone; it knows no models, memories or run folders.
Frames are uint8 RGB [T, 3, H, W] or [3, H, W].
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .tree import atomic_file


class Item(TypedDict, total=False):
    """One item that a memory held during a chunk."""

    id: str
    kind: str  # name of its bank, such as sink, window, slots
    born: int  # latent frame
    owner: int  # slot, below 0 if none
    score: float
    tokens: int
    read: bool


class Record(TypedDict, total=False):
    """One line of trace.jsonl: what happened in one chunk. Every part may be missing."""

    chunk: int
    seconds: Sequence[float]  # start and stop of the chunk
    shot: int
    prompt: str
    switched: bool
    read: Mapping[str, int]  # tokens read, by bank
    items: Sequence[Item]
    written: int  # tokens
    evicted: Sequence[str]
    milliseconds: Mapping[str, float]


_INK, _GREY, _FAINT, _BAND = (34, 38, 46), (112, 118, 130), (222, 225, 230), (246, 247, 249)
_KIND_ORDER = ("sink", "window", "slots")


# filmstrip


def caption(start: float, stop: float, prompt: str) -> str:
    """Caption of a shot: its time on the first line, then its prompt."""
    return f"{_clock(start)} - {_clock(stop)}\n{prompt}"


def filmstrip(
    shots: Sequence[torch.Tensor | np.ndarray],
    captions: Sequence[str],
    path: str | Path,
    columns: int | None = None,
    frame_width: int = 400,
    labels: Sequence[str] = (),
) -> None:
    """Write shots side by side as a PNG, each with its frames downwards in time order and its caption below.

    shots: per shot uint8 RGB [T, 3, H, W]; captions: see `caption`. Rows hold 3 to 5 shots unless columns is given.
    labels: words to the left of a row's first, second ... frames, where these are not times of one video."""
    if not shots or len(shots) != len(captions):
        raise ValueError(f"{len(shots)} shots and {len(captions)} captions; expected as many, at least one")
    columns = columns or _columns(len(shots))
    margin, gap, between = frame_width // 12, frame_width // 20, 3
    text = frame_width // 18
    plain, small = _font(text), _font(round(text * 0.85))
    images = [[_image(frame, frame_width) for frame in shot] for shot in shots]
    lines = [_caption_lines(words, plain, frame_width) for words in captions]

    rows = []
    for first in range(0, len(shots), columns):
        members = range(first, min(first + columns, len(shots)))
        pictures = max(sum(image.height + between for image in images[i]) - between for i in members)
        rows.append((members, pictures, max(len(lines[i][1]) for i in members)))
    line = round(text * 1.32)
    heights = [pictures + round(text * 0.6) + line + wrapped * line for _, pictures, wrapped in rows]
    labels = [_fit(label, plain, frame_width) for label in labels]
    side = max((round(plain.getlength(label)) + gap for label in labels), default=0)
    width = 2 * margin + side + columns * frame_width + (columns - 1) * gap
    canvas = Image.new("RGB", (width, 2 * margin + sum(heights) + gap * (len(rows) - 1)), "white")
    draw = ImageDraw.Draw(canvas)
    top = margin
    for (members, pictures, _), height in zip(rows, heights):
        for column, index in enumerate(members):
            left, y = margin + side + column * (frame_width + gap), top
            for row, image in enumerate(images[index]):
                canvas.paste(image, (left, y))
                if column == 0 and row < len(labels):
                    draw.text((margin, y + image.height // 2), labels[row], font=plain, fill=_INK, anchor="lm")
                y += image.height + between
            y = top + pictures + round(text * 0.6)
            time, words = lines[index]
            draw.text((left, y), time, font=small, fill=_GREY)
            for offset, part in enumerate(words):
                draw.text((left, y + (offset + 1) * line), part, font=plain, fill=_INK)
        top += height + gap
    _save(canvas, path)


def _columns(count: int) -> int:
    """Shots per row: all up to 4, else the width of 3 to 5 that leaves the fewest holes."""
    return count if count <= 4 else min((4, 5, 3), key=lambda columns: -count % columns)


def _caption_lines(words: str, font: ImageFont.FreeTypeFont, width: int) -> tuple[str, list[str]]:
    time, _, prompt = words.partition("\n")
    return time, _wrap(prompt, font, width, 4)


# timeline


def timeline(
    records: Sequence[Record | Mapping[str, Any]],
    path: str | Path,
    frames: Mapping[int, torch.Tensor | np.ndarray] | None = None,
    title: str = "What the memory held, read and evicted",
    width: int = 1800,
) -> None:
    """Write the memory timeline of a run as a PNG: time to the right, one thin bar per item from birth to eviction.

    records: Record, in order; frames: pictures [3, H, W] to show above, by the chunk under which they belong.
    Pale means held, full colour means read; colours tell the owning slots apart."""
    _Timeline(records, frames or {}, title, width).save(path)


class _Timeline:
    def __init__(self, records: Sequence[Mapping[str, Any]], frames: Mapping[int, Any], title: str, width: int) -> None:
        self.records = list(records)
        self.frames, self.title, self.width = frames, title, width
        self.left, self.right, self.margin = 130, 36, 30
        self.text, self.small, self.heading = _font(16), _font(14), _font(24)
        self.numbers = [record.get("chunk", -1) for record in self.records]
        if any(after <= before for before, after in zip([-1, *self.numbers], self.numbers)):
            self.numbers = list(range(len(self.records)))  # some chunk is missing
        times = [record.get("seconds") for record in self.records]
        self.in_seconds = bool(times) and all(time is not None and len(time) == 2 for time in times)
        self.spans = (
            [(float(start), float(stop)) for start, stop in times]
            if self.in_seconds
            else [(float(number), number + 1.0) for number in self.numbers]
        )
        self.first = min((start for start, _ in self.spans), default=0.0)
        self.last = max((stop for _, stop in self.spans), default=1.0)
        self.canvas = Image.new("RGB", (width, 64), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.bars = _bars(self.records)

    def x(self, time: float) -> int:
        span = max(self.last - self.first, 1e-6)
        return self.left + round((time - self.first) / span * (self.width - self.left - self.right))

    def edges(self, position: int) -> tuple[int, int]:
        """First and last pixel column of a record."""
        start, stop = self.spans[position]
        return self.x(start), max(self.x(stop) - 1, self.x(start))

    def save(self, path: str | Path) -> None:
        shots = self.shots()
        rooms = [max(self.x(stop) - self.x(start) - 12, 30) for start, stop, _ in shots]
        prompts = [_wrap(words, self.small, room, 5) for (_, _, words), room in zip(shots, rooms)]
        lanes = self.lanes()
        thumbs = self.thumbnails()
        thumb_height = max((image.height for _, image in thumbs), default=0)
        top = self.margin + 44
        prompts_at = top + 24
        words_height = 18 * max((len(lines) for lines in prompts), default=0) + 10
        thumbs_at = prompts_at + words_height
        lanes_at = thumbs_at + (thumb_height + 14 if thumbs else 0)
        lanes_height = sum(height for *_, height in lanes)
        tokens_at = lanes_at + lanes_height
        bottom = tokens_at + self.tokens_height() + 8
        self.canvas = Image.new("RGB", (self.width, bottom + 74), "white")
        self.draw = ImageDraw.Draw(self.canvas)
        self.draw.text((self.margin, self.margin - 6), self.title, font=self.heading, fill=_INK)

        for index, ((start, stop, _), lines) in enumerate(zip(shots, prompts)):
            if index % 2 == 0:
                self.draw.rectangle((self.x(start), top, max(self.x(stop) - 1, self.x(start)), bottom), fill=_BAND)
            self.draw.text((self.x(start) + 6, top + 4), f"{index + 1}", font=self.small, fill=_GREY)
            for row, line in enumerate(lines):
                self.draw.text((self.x(start) + 6, prompts_at + 18 * row), line, font=self.small, fill=_INK)
            if index:
                self.draw.line((self.x(start), top, self.x(start), bottom), fill=_FAINT, width=2)
        for left, image in thumbs:
            self.canvas.paste(image, (left, thumbs_at))
        y = lanes_at
        for name, rows, pitch, height in lanes:
            self.lane(name, rows, pitch, y)
            y += height
        self.tokens(tokens_at)
        self.axis(bottom)
        if not self.records:
            self.draw.text((self.left, top + 10), "no trace records", font=self.text, fill=_GREY)
        _save(self.canvas, path)

    def shots(self) -> list[tuple[float, float, str]]:
        """Start, stop and prompt of each stretch of chunks with one shot and prompt."""
        shots: list[list[Any]] = []
        for record, (start, stop) in zip(self.records, self.spans):
            key = (record.get("shot"), record.get("prompt"))
            if shots and shots[-1][3] == key:
                shots[-1][1] = stop
            else:
                shots.append([start, stop, record.get("prompt") or "", key])
        return [(start, stop, words) for start, stop, words, _ in shots]

    def thumbnails(self) -> list[tuple[int, Image.Image]]:
        """Left edge and image of each frame, none over the one before it."""
        placed: list[tuple[int, Image.Image]] = []
        where = dict(zip(self.numbers, self.spans))
        chosen = [(chunk, frame) for chunk, frame in sorted(self.frames.items()) if chunk in where]
        lefts = [self.x(where[chunk][0]) for chunk, _ in chosen] + [self.width - self.right]
        for (_, frame), left, after in zip(chosen, lefts, lefts[1:]):
            placed.append((left + 6, _image(frame, min(max(after - left - 12, 24), 200))))
        return placed

    def lanes(self) -> list[tuple[str, list[list[_Bar]], float, int]]:
        """Name, rows of bars that do not overlap, distance between rows and height, for each bank."""
        lanes = []
        kinds = sorted({bar.kind for bar in self.bars}, key=lambda kind: (*_rank(kind), kind))
        for kind in kinds:
            rows: list[list[_Bar]] = []
            members = [bar for bar in self.bars if bar.kind == kind]
            for owner in sorted({bar.owner for bar in members}):
                own: list[list[_Bar]] = []
                for bar in sorted((bar for bar in members if bar.owner == owner), key=lambda bar: bar.first):
                    row = next((row for row in own if row[-1].last < bar.first), None)
                    if row is None:
                        own.append(row := [])
                    row.append(bar)
                rows += own
            pitch = min(16, 504 / len(rows))  # below 1 rows share pixels: a memory of everything is a grey field
            lanes.append((kind, rows, pitch, max(26, math.ceil(len(rows) * pitch)) + 18))
        return lanes

    def lane(self, name: str, rows: list[list[_Bar]], pitch: float, top: int) -> None:
        self.draw.line((self.margin, top, self.width - self.right, top), fill=_FAINT)
        self.draw.text((self.margin, top + 8), name, font=self.text, fill=_INK)
        items = sum(len(row) for row in rows)
        self.draw.text((self.margin, top + 28), f"{items} item{'s' * (items != 1)}", font=self.small, fill=_GREY)
        thickness = max(1, math.floor(pitch) - (2 if pitch >= 6 else 1))
        for index, row in enumerate(rows):
            y = top + 9 + math.floor(index * pitch)
            for bar in row:
                colour = _colour(bar.kind, bar.owner)
                pale = tuple(round(c + (255 - c) * 0.68) for c in colour)
                for position in range(bar.first, bar.last + 1):
                    left, right = self.edges(position)
                    right -= position == bar.last and right > left  # a seam between items in one row
                    fill = colour if position in bar.read else pale
                    self.draw.rectangle((left, y, right, y + thickness - 1), fill=fill)
                if bar.evicted:
                    end = self.x(self.spans[bar.last][1])
                    self.draw.rectangle((end - 3, y, end - 1, y + thickness - 1), fill=_INK)

    def tokens_height(self) -> int:
        return 104 if any(record.get("read") for record in self.records) else 0

    def tokens(self, top: int) -> None:
        """Draw the tokens read per chunk, the banks on top of each other."""
        if not self.tokens_height():
            return
        reads = [dict(record.get("read") or {}) for record in self.records]
        most = max(max(sum(read.values()) for read in reads), 1)
        self.draw.line((self.margin, top, self.width - self.right, top), fill=_FAINT)
        self.draw.text((self.margin, top + 8), "tokens read", font=self.text, fill=_INK)
        self.draw.text((self.margin, top + 28), f"at most {most:,}", font=self.small, fill=_GREY)
        base, room = top + self.tokens_height() - 6, self.tokens_height() - 18
        for position, read in enumerate(reads):
            left, right = self.edges(position)
            done = 0
            for kind in sorted(read, key=lambda kind: (*_rank(kind), kind)):
                y = base - round(room * (done + read[kind]) / most)
                below = base - round(room * done / most) - 1
                if below >= y:
                    self.draw.rectangle((left, y, right, below), fill=_colour(kind, -1))
                done += read[kind]

    def axis(self, top: int) -> None:
        self.draw.line((self.left, top, self.width - self.right, top), fill=_GREY)
        span = self.last - self.first
        step = next((s for s in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800) if span / s <= 16), 3600)
        tick = -(-self.first // step) * step
        while tick <= self.last + 1e-6:
            self.draw.line((self.x(tick), top, self.x(tick), top + 6), fill=_GREY)
            label = _clock(tick) if self.in_seconds else f"{tick:g}"
            self.draw.text((self.x(tick), top + 9), label, font=self.small, fill=_GREY, anchor="ma")
            tick += step
        self.draw.text((self.margin, top + 8), "time" if self.in_seconds else "chunk", font=self.text, fill=_INK)
        y, x = top + 40, self.left
        base = _colour("slots", 0)
        pale = tuple(round(c + (255 - c) * 0.68) for c in base)
        for colour, label in ((base, "read"), (pale, "held, not read"), (_INK, "evicted")):
            self.draw.rectangle((x, y + 2, x + (4 if label == "evicted" else 22), y + 13), fill=colour)
            x += 10 if label == "evicted" else 28
            self.draw.text((x, y), label, font=self.small, fill=_GREY)
            x += round(self.small.getlength(label)) + 26
        owners = sorted({bar.owner for bar in self.bars if bar.owner >= 0})[:12]
        for owner in owners:
            self.draw.rectangle((x, y + 2, x + 12, y + 13), fill=_colour("slots", owner))
            label = f"slot {owner}"
            self.draw.text((x + 18, y), label, font=self.small, fill=_GREY)
            x += 18 + round(self.small.getlength(label)) + 18


class _Bar:
    """An item's life: positions of the first and last record that list it, and of those that read it."""

    def __init__(self, kind: str, owner: int, first: int) -> None:
        self.kind, self.owner, self.first, self.last = kind, owner, first, first
        self.read: set[int] = set()
        self.evicted = False


def _bars(records: Sequence[Mapping[str, Any]]) -> list[_Bar]:
    bars, alive = [], {}
    for position, record in enumerate(records):
        for item in record.get("items") or ():
            kind = item.get("kind") or "memory"
            owner = item.get("owner")
            identity = item.get("id") or (kind, owner, item.get("born"))
            bar = alive.get(identity)
            if bar is None or bar.last < position - 1:  # an id that was away is a new item
                bar = alive[identity] = _Bar(kind, -1 if owner is None else owner, position)
                bars.append(bar)
            bar.last = position
            if item.get("read"):
                bar.read.add(position)
        for identity in record.get("evicted") or ():
            if identity in alive:
                alive.pop(identity).evicted = True
    return bars


def _rank(kind: str) -> tuple[int]:
    return (_KIND_ORDER.index(kind) if kind in _KIND_ORDER else len(_KIND_ORDER),)


def _colour(kind: str, owner: int) -> tuple[int, int, int]:
    """A colour of its own for each slot; items of no slot take their bank's."""
    if owner < 0:
        fixed = {"sink": (96, 108, 128), "window": (160, 168, 182), "slots": (58, 124, 204)}
        return fixed.get(kind, (150, 130, 170))
    hue = (0.58 + owner * 0.618034) % 1.0  # golden ratio: neighbours in number are far apart in hue
    return tuple(round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.47, 0.62))


# parts of both


def _clock(seconds: float) -> str:
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _wrap(words: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines that fit a width; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    rest = words.split()
    while rest:
        line = _fit(rest.pop(0), font, width)
        while rest and font.getlength(f"{line} {rest[0]}") <= width:
            line = f"{line} {rest.pop(0)}"
        if len(lines) == most - 1 and rest:
            return [*lines, _fit(f"{line} ...", font, width)]
        lines.append(line)
    return lines


def _fit(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line[:400]) <= width and len(line) <= 400:
        return line
    line = line[:400].removesuffix("...").rstrip()
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1].rstrip()
    return f"{line}..."


def _image(frame: torch.Tensor | np.ndarray, width: int) -> Image.Image:
    pixels = frame.detach().cpu().numpy() if isinstance(frame, torch.Tensor) else np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"a frame is {list(pixels.shape)} of {pixels.dtype}, expected [3, H, W] of uint8")
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    height = max(1, round(width * image.height / image.width))
    # Lanczos rings around flat shapes when it enlarges a little picture a lot
    kernel = Image.Resampling.BICUBIC if width > image.width else Image.Resampling.LANCZOS
    return image.resize((width, height), kernel)


def _save(image: Image.Image, path: str | Path) -> None:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    with atomic_file(path) as file:
        file.write(data.getvalue())
