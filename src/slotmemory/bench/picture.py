"""The rows as a picture: one panel per cost, budgets to the right, a line per memory. Drawn with Pillow."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from slotmemory.bench.streams import Row
from slotmemory.tree import atomic_file

PANELS = (
    ("attended tokens per layer", "attended", 1.0),
    ("held, MB", "held_bytes", 1e-6),
    ("read, ms per chunk", "read_ms", 1.0),
    ("write + update, ms per chunk", "kept_ms", 1.0),
    ("chunk at the end, ms", "end_ms", 1.0),
    ("chunk at the end / at the start", "growth", 1.0),
)
COLUMNS = 3
WIDTH, HEIGHT, MARGIN, LEFT, LEGEND = 360, 260, 28, 46, 190  # pixels of a panel, around it, of its numbers, of names
TEXT = 13
INK, GREY, FAINT = (34, 38, 46), (112, 118, 130), (222, 225, 230)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG. Rows that say why they are empty are left out of the lines."""
    names = list(dict.fromkeys(row.memory for row in rows))
    budgets = list(dict.fromkeys(row.budget for row in rows))
    lines = -(-len(PANELS) // COLUMNS)
    size = (COLUMNS * (WIDTH + LEFT + MARGIN) + LEGEND + MARGIN, lines * (HEIGHT + 3 * MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=TEXT)
    for number, (title, name, unit) in enumerate(PANELS):
        left = MARGIN + LEFT + number % COLUMNS * (WIDTH + LEFT + MARGIN)
        top = 2 * MARGIN + number // COLUMNS * (HEIGHT + 3 * MARGIN)
        found = {(row.memory, row.budget): value(row, name) for row in rows}
        points = {key: unit * x for key, x in found.items() if x is not None}
        panel(draw, font, (left, top), title, points, names, budgets)
    for i, name in enumerate(names):
        y = 2 * MARGIN + i * round(1.6 * TEXT)
        x = size[0] - LEGEND - MARGIN
        draw.line((x, y + TEXT // 2, x + 22, y + TEXT // 2), colour(i), 3)
        draw.text((x + 30, y), name, font=font, fill=INK)
    with atomic_file(path) as file:
        canvas.save(file, "PNG")


def value(row: Row, name: str) -> float | None:
    if name != "kept_ms":
        return getattr(row, name)
    return None if row.write_ms is None else row.write_ms + row.update_ms


def panel(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    corner: tuple[int, int],
    title: str,
    points: dict[tuple[str, int | None], float],
    names: Sequence[str],
    budgets: Sequence[int | None],
) -> None:
    """Draw one cost: the value axis starts at 0, budgets stand at even distances."""
    left, top = corner
    bottom = top + HEIGHT
    tick = step(max(points.values(), default=0.0))
    most = tick * max(math.ceil(max(points.values(), default=0.0) / tick), 1)

    def x(budget: int | None) -> float:
        return left + WIDTH * (budgets.index(budget) + 0.5) / len(budgets)

    def y(number: float) -> float:
        return bottom - HEIGHT * number / most

    draw.text((left, top - round(1.6 * TEXT)), title, font=font, fill=INK)
    for i in range(round(most / tick) + 1):
        height = y(i * tick)
        draw.line((left, height, left + WIDTH, height), FAINT)
        draw.text((left - 6, height), f"{i * tick:g}", font=font, fill=GREY, anchor="rm")
    for budget in budgets:
        word = "own" if budget is None else str(budget)
        draw.text((x(budget), bottom + 6), word, font=font, fill=GREY, anchor="ma")
    for i, name in enumerate(names):
        line = [(x(budget), y(points[name, budget])) for budget in budgets if (name, budget) in points]
        draw.line(line, colour(i), 2)
        for at, height in line:
            draw.ellipse((at - 3, height - 3, at + 3, height + 3), colour(i))


def step(most: float) -> float:
    """A round distance of ticks that makes four or five of them up to `most`."""
    if most <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(most))
    return next(power * share for share in (0.2, 0.5, 1.0, 2.0) if most / (power * share) <= 6)


def colour(index: int) -> tuple[int, int, int]:
    """The golden ratio of the circle apart from the one before, alternately darker and lighter: neighbours differ."""
    hue, light = index * (math.sqrt(5) - 1) / 2 % 1, (0.42, 0.58)[index % 2]
    return tuple(round(255 * part) for part in colorsys.hls_to_rgb(hue, light, 0.65))
