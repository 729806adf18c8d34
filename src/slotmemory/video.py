"""Video files that are playable at every moment: one closed group of pictures per chunk, appended as mp4 fragments.

Every chunk is encoded by a fresh encoder, so its bytes depend on its frames and its place alone. A run that was
killed and resumed therefore ends with the same file as one that was not. It knows nothing of models and scripts.
Frames are uint8 RGB [T, 3, H, W] everywhere.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import torch

from .errors import InputError, shorten

log = logging.getLogger(__name__)

# Macroblock trees cost x264 (core 165, AVX-512) its determinism: the same frames gave other bytes in one of ten runs on
# a busy machine, and a resumed run would no longer equal an uninterrupted one.
_ENCODER = {"crf": "16", "preset": "veryfast", "bf": "0", "mbtree": "0"}
_TICKS_PER_FRAME = 1000
_MOVIE_TIMESCALE = 1000  # what FFmpeg's mp4 writer uses for the file as a whole
_BT709 = 1


class Fragments:
    """Encodes chunks of frames as mp4 fragments: `header` first, then any number of `encode(...)`, in order.

    Width and height are those of the frames given; `scale` is a whole factor by which they are enlarged."""

    def __init__(self, fps: int, width: int, height: int, scale: int = 1) -> None:
        for name, value in (("fps", fps), ("width", width), ("height", height), ("scale", scale)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}={shorten(value)} is not a whole number of at least 1")
        if width * scale % 2 or height * scale % 2:
            size = f"{width * scale}x{height * scale}"
            raise InputError(f"{size} pixels are odd, the video codec needs even sizes; use an even scale")
        self.fps, self.width, self.height, self.scale = fps, width, height, scale
        blank = self._encode(np.zeros((1, height, width, 3), np.uint8))
        self.header = b"".join(blank[start:stop] for kind, start, stop in _boxes(blank) if kind in (b"ftyp", b"moov"))

    def encode(self, frames: torch.Tensor | np.ndarray, first_frame: int, number: int) -> bytes:
        """Encode one chunk as fragment `number` (from 0); its first frame is frame `first_frame` of the video."""
        data = self._encode(self._pixels(frames))
        parts = [bytearray(data[start:stop]) for kind, start, stop in _boxes(data) if kind in (b"moof", b"mdat")]
        _place(parts[0], number + 1, first_frame * _TICKS_PER_FRAME)
        return b"".join(parts)

    def _pixels(self, frames: torch.Tensor | np.ndarray) -> np.ndarray:
        if isinstance(frames, torch.Tensor):
            frames = frames.detach().cpu().numpy()
        expected = f"[T, 3, {self.height}, {self.width}] of uint8"
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (3, self.height, self.width):
            raise ValueError(f"frames are {list(frames.shape)} of {frames.dtype}, expected {expected}")
        if len(frames) == 0:
            raise ValueError(f"no frames, expected {expected} with T >= 1")
        return np.ascontiguousarray(frames.transpose(0, 2, 3, 1))

    def _encode(self, pixels: np.ndarray) -> bytes:
        """One self-contained mp4 file with one fragment that starts at time 0; pixels [T, H, W, 3]."""
        file = io.BytesIO()
        options = {
            "movflags": "frag_custom+empty_moov+default_base_moof",
            "video_track_timescale": str(self.fps * _TICKS_PER_FRAME),
            "fflags": "+bitexact",
        }
        with av.open(file, "w", format="mp4", options=options) as container:
            stream = container.add_stream("libx264", rate=self.fps, options=_ENCODER)
            stream.width, stream.height, stream.pix_fmt = self.width * self.scale, self.height * self.scale, "yuv420p"
            context = stream.codec_context
            context.thread_count = 1  # x264's output depends on the number of threads
            context.gop_size = max(len(pixels), 2)
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = 1
            for index, image in enumerate(pixels):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    stream.width,
                    stream.height,
                    "yuv420p",
                    dst_colorspace="ITU709",
                    interpolation="BICUBIC",  # Lanczos rings around flat shapes, nearest shows steps
                )
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return file.getvalue()


class VideoWriter:
    """Writes a video chunk by chunk; after each `write` the file is playable as it is.

    keep=n continues an existing file after its first n chunks and drops what follows them."""

    def __init__(self, path: str | Path, fps: int, width: int, height: int, scale: int = 1, keep: int = 0) -> None:
        self.path = Path(path)
        self.fragments = Fragments(fps, width, height, scale)
        self.chunks = self.frames = 0
        header, self._duration_at = _with_duration(self.fragments.header)
        self._file: BinaryIO | None = None
        try:
            if keep:
                self._file = open(self.path, "r+b", buffering=0)
                self._reopen(header, keep)
            else:
                self._file = open(self.path, "wb", buffering=0)
                self._append(header)
        except OSError as error:
            self._abandon()
            raise InputError.from_os("write the video", self.path, error) from error
        except InputError:
            self._abandon()
            raise

    def write(self, frames: torch.Tensor | np.ndarray) -> None:
        """Append one chunk, uint8 RGB [T, 3, H, W]. If it fails, the chunks before it are kept."""
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        data = self.fragments.encode(frames, self.frames, self.chunks)
        try:
            self._append(data)
        except OSError as error:
            raise InputError.from_os("write the video", self.path, error) from error
        self.chunks += 1
        self.frames += len(frames)
        self._write_duration()

    def sync(self) -> None:
        """Wait until the chunks written so far would survive a power cut."""
        if self._file is not None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise InputError.from_os("write the video", self.path, error) from error

    def close(self) -> None:
        if self._file is not None:
            try:
                self.sync()
            finally:
                self._abandon()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        start = self._file.tell()
        try:
            view = memoryview(data)
            while view:
                view = view[self._file.write(view) :]
        except BaseException:
            # half a fragment would hide the next one; if even that fails, the first error is the one to tell
            with contextlib.suppress(OSError):
                self._file.seek(start)
                self._file.truncate()
            raise

    def _write_duration(self) -> None:
        """Tell players, which do not read ahead, how long the video is so far."""
        end = self._file.tell()
        self._file.seek(self._duration_at)
        self._file.write(struct.pack(">I", round(self.frames * _MOVIE_TIMESCALE / self.fragments.fps)))
        self._file.seek(end)

    def _reopen(self, header: bytes, keep: int) -> None:
        found = self._file.read(len(header))
        at = self._duration_at
        if found[:at] + found[at + 4 :] != header[:at] + header[at + 4 :]:
            size = f"{self.fragments.width}x{self.fragments.height} pixels, scale {self.fragments.scale}"
            raise InputError(
                f"{shorten(self.path, 200)} was not written with {size}, {self.fragments.fps} frames/s; "
                "start a new run in another folder"
            )
        end = len(header)
        for frames, stop in _fragments(self._file, end):
            if self.chunks == keep:
                break
            self.chunks, self.frames, end = self.chunks + 1, self.frames + frames, stop
        if self.chunks < keep:
            raise InputError(
                f"{shorten(self.path, 200)} holds {self.chunks} whole chunks, {keep} are needed to go on; "
                "start a new run in another folder"
            )
        self._file.seek(end)
        self._file.truncate()
        self._write_duration()

    def _abandon(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def count_chunks(path: str | Path) -> tuple[int, int]:
    """Whole chunks and frames in a file of VideoWriter, without decoding."""
    try:
        with open(path, "rb") as file:
            counts = [frames for frames, _ in _fragments(file, 0)]
    except OSError as error:
        raise InputError.from_os("read the video", path, error) from error
    return len(counts), sum(counts)


def read_video(path: str | Path, frames: Iterable[int] | None = None) -> torch.Tensor:
    """Decode a video, or the frames of it with the given numbers in rising order, as uint8 RGB [T, 3, H, W].

    A file that breaks off gives what is whole; a number beyond its end raises InputError."""
    wanted = None if frames is None else sorted(set(frames))
    found = []
    for index, image in enumerate(_decode(path)):
        if wanted is None or (len(found) < len(wanted) and wanted[len(found)] == index):
            found.append(torch.from_numpy(image).permute(2, 0, 1))
        if wanted is not None and len(found) == len(wanted):
            break
    if wanted and len(found) < len(wanted):
        raise InputError(f"{shorten(Path(path), 200)} has no frame {wanted[len(found)]}; it ends before")
    if not found:
        if wanted == []:
            return torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        raise InputError(f"{shorten(Path(path), 200)} holds no frame of video")
    return torch.stack(found)


def _decode(path: str | Path) -> Iterator[np.ndarray]:
    """Images [H, W, 3] in order."""
    count = 0
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{shorten(Path(path), 200)} holds no video")
            for frame in container.decode(video=0):
                yield frame.reformat(format="rgb24").to_ndarray()
                count += 1
    except av.error.FFmpegError as error:
        if count == 0:
            if isinstance(error, OSError) and error.errno:
                raise InputError.from_os("read the video", path, error) from error
            raise InputError(f"{shorten(Path(path), 200)} is not a video that can be read: {error.strerror}") from error
        log.warning("%s breaks off after %d frames", path, count)


# mp4 boxes (ISO/IEC 14496-12): 4 bytes of size, 4 letters of kind, then content

_CONTAINERS = (b"moov", b"mvex", b"moof", b"traf")


def _boxes(data: bytes | bytearray, start: int = 0, stop: int | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and stop of the boxes side by side in a piece of data."""
    stop = len(data) if stop is None else stop
    while start + 8 <= stop:
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8 or start + size > stop:
            return
        yield bytes(data[start + 4 : start + 8]), start, start + size
        start += size


def _find(data: bytes | bytearray, *path: bytes) -> tuple[int, int]:
    """Start and stop of the box at a path of kinds, such as moof, traf, tfdt."""
    start, stop = 0, len(data)
    for kind in path:
        start, stop = next((a, b) for k, a, b in _boxes(data, start, stop) if k == kind)
        if kind in _CONTAINERS and kind is not path[-1]:
            start += 8
    return start, stop


def _place(moof: bytearray, number: int, ticks: int) -> None:
    """Set a fragment's sequence number and start time in place."""
    start, _ = _find(moof, b"moof", b"mfhd")
    struct.pack_into(">I", moof, start + 12, number)
    start, _ = _find(moof, b"moof", b"traf", b"tfdt")
    assert moof[start + 8] == 1, "FFmpeg writes 64-bit fragment times"
    struct.pack_into(">Q", moof, start + 12, ticks)


def _with_duration(header: bytes) -> tuple[bytes, int]:
    """Insert a box for the duration (mehd) into a header; the header, and where its 4 bytes of duration are."""
    data = bytearray(header)
    start, _ = _find(data, b"moov", b"mvex")
    box = struct.pack(">I4sII", 16, b"mehd", 0, 0)
    for kinds in ((b"moov", b"mvex"), (b"moov",)):
        at, stop = _find(data, *kinds)
        struct.pack_into(">I", data, at, stop - at + len(box))
    data[start + 8 : start + 8] = box
    return bytes(data), start + 8 + 12


def _fragments(file: BinaryIO, start: int) -> Iterator[tuple[int, int]]:
    """Number of frames and end of each whole fragment from a place in a file on."""
    size = os.fstat(file.fileno()).st_size
    frames = None
    while start + 8 <= size:
        file.seek(start)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length < 8 or start + length > size:
            return
        if kind == b"moof":
            moof = struct.pack(">I4s", length, kind) + file.read(length - 8)
            try:
                at, _ = _find(moof, b"moof", b"traf", b"trun")
            except StopIteration:
                return
            frames = int.from_bytes(moof[at + 12 : at + 16], "big")
        elif kind == b"mdat" and frames is not None:
            yield frames, start + length
            frames = None
        start += length
