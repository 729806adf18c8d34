"""Clips of video files in a folder, at a stream's size and frame rate.

A text file beside a video (cat.mp4, cat.txt) is its prompt. A file that cannot be read, or is too short for a chunk, is
skipped with its name and counted; a folder without any other is an error. It knows no model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.codecs.base import to_float
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.video import read_video

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")


@dataclass(frozen=True)
class Shown:
    """A clip of a video: latents [L, C, h, w], and a prompt per chunk."""

    latents: Tensor
    prompts: list[str]

    @property
    def chunks(self) -> int:
        return len(self.prompts)


class Videos:
    """The readable videos of a folder and the folders in it, of at least so many chunks."""

    def __init__(self, folder: str | Path, layout: Layout, least: int = 1):
        self.folder, self.layout, self.least = Path(folder), layout, least
        if not self.folder.is_dir():
            raise InputError(f"{folder} is no folder of videos")
        found = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        self.frames = {path: count for path in found if (count := self._frames(path))}
        self.skipped = len(found) - len(self.frames)
        if self.skipped:
            log.warning("%s: %d of %d videos were skipped", folder, self.skipped, len(found))
        if not self.frames:
            raise InputError(
                f"{folder} holds no video that can be used, of {len(found)} files; use {', '.join(SUFFIXES)}"
            )

    def _frames(self, path: Path) -> int:
        """Frames of a video at the stream's rate; 0, said, if there is no use for it."""
        try:
            read_video(path, [0])
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                rate = stream.average_rate or Fraction(self.layout.fps)
                seconds = stream.frames / rate if stream.frames else Fraction(container.duration or 0, av.time_base)
        except (InputError, OSError, av.error.FFmpegError) as error:
            log.warning("skipped: %s", error)
            return 0
        frames = int(seconds * self.layout.fps)
        least = self.layout.frames(self.least * self.layout.frames_per_chunk)
        if frames < least:
            told = (path, frames, self.layout.fps, self.least, least)
            log.warning("skipped: %s has %d frames at %d per second, %d chunks have %d", *told)
            return 0
        return frames

    def split(self, count: int) -> tuple[Videos, Videos]:
        """Set files aside to measure on, the last by name: `count`, at most a fifth of all, but one -> the others, these."""
        names = list(self.frames)
        if len(names) == 1:
            log.warning("%s holds one video only: measured will be what is learnt from", self.folder)
            return self, self
        first = len(names) - max(1, min(count, len(names) // 5))
        parts = (names[:first], names[first:])
        found = [copy.copy(self) for _ in parts]
        for videos, part in zip(found, parts):
            videos.frames = {path: self.frames[path] for path in part}
        return found[0], found[1]

    @torch.no_grad()
    def encoded(self, seed: int, chunks: int, encode: Callable[[Tensor], Tensor]) -> Shown:
        """Draw a clip as `clip` does; encode: pixels [1, T, 3, H, W] in [-1, 1] -> latents [1, L, C, h, w]."""
        pixels, prompt = self.clip(seed, chunks)
        latents = encode(to_float(pixels)[None])[0].float()
        return Shown(latents, [prompt] * (len(latents) // self.layout.frames_per_chunk))

    def clip(self, seed: int, chunks: int) -> tuple[Tensor, str]:
        """Draw a clip of at most so many whole chunks -> pixels uint8 [T, 3, H, W], prompt."""
        layout, random = self.layout, torch.Generator().manual_seed(seed)
        path = list(self.frames)[int(torch.randint(len(self.frames), (), generator=random))]
        size = layout.frames_per_chunk
        chunks = min(chunks, max(k for k in range(1, chunks + 1) if layout.frames(k * size) <= self.frames[path]))
        count = layout.frames(chunks * size)
        first = int(torch.randint(self.frames[path] - count + 1, (), generator=random))
        with av.open(str(path)) as container:
            rate = float(container.streams.video[0].average_rate or layout.fps)
        wanted = [int((first + i) * rate / layout.fps) for i in range(count)]
        shown = read_video(path, wanted)  # each frame once, though a slow video shows some twice
        unique = sorted(set(wanted))
        pixels = fitted(shown, layout.height, layout.width)[[unique.index(number) for number in wanted]]
        told = path.with_suffix(".txt")
        return pixels, " ".join(told.read_text(encoding="utf-8").split()) if told.is_file() else ""


def fitted(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale uint8 pixels [T, 3, h, w] to cover a size, and cut what stands over on both sides."""
    scale = max(height / pixels.shape[-2], width / pixels.shape[-1])
    size = [max(height, round(pixels.shape[-2] * scale)), max(width, round(pixels.shape[-1] * scale))]
    if size != list(pixels.shape[-2:]):
        found = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True, align_corners=False)
        pixels = found.round().clamp(0, 255).to(torch.uint8)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[..., top : top + height, left : left + width]
