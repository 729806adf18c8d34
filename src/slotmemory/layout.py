"""Every size of a stream, derived once from backbone, codec and resolution.

Pure arithmetic: it knows no tensors, no weights and no files. A latent frame holds 4 pixel frames,
except the first of a video, which holds 1 (Wan 2.1, arXiv 2503.20314, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from .errors import InputError

# Durations such as 10 s / 3 come back from a product a hair above a whole number of latents.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Layout:
    """Sizes of one stream: height and width in pixels, frames_per_chunk in latent frames."""

    height: int
    width: int
    fps: int = 16
    spatial_stride: int = 8
    temporal_stride: int = 4
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    frames_per_chunk: int = 3
    _: KW_ONLY
    layers: int
    heads: int
    head_dim: int
    text_tokens: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        for name, value in vars(self).items():
            if name != "patch" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}={value!r} is not a whole number of at least 1")
        if len(self.patch) != 3 or not all(isinstance(p, int) and p >= 1 for p in self.patch):
            raise InputError(f"patch={self.patch!r} is not three whole numbers (time, height, width) of at least 1")
        _check_multiple("height", self.height, self.spatial_stride * self.patch[1], "pixels per token row")
        _check_multiple("width", self.width, self.spatial_stride * self.patch[2], "pixels per token column")
        _check_multiple("frames_per_chunk", self.frames_per_chunk, self.patch[0], "latent frames per token")
        if self.head_dim % 2:
            raise InputError(
                f"head_dim={self.head_dim} is odd, rotary positions turn pairs of numbers; "
                f"use {self.head_dim - 1 or 2} or {self.head_dim + 1}"
            )

    # space

    @property
    def latent_height(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_width(self) -> int:
        return self.width // self.spatial_stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in one latent frame."""
        return self.latent_height // self.patch[1], self.latent_width // self.patch[2]

    @property
    def model_width(self) -> int:
        """Width of the transformer: heads times head_dim."""
        return self.heads * self.head_dim

    @property
    def token_channels(self) -> int:
        """Latent values that one token holds."""
        return self.latent_channels * math.prod(self.patch)

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame (of one patch in time, should patches span several)."""
        return math.prod(self.grid)

    @property
    def tokens_per_chunk(self) -> int:
        return self.tokens_per_frame * (self.frames_per_chunk // self.patch[0])

    def tokens(self, latents: int) -> int:
        """Tokens of so many latent frames."""
        return self.tokens_per_frame * (latents // self.patch[0])

    def bytes_per_token(self, value_bytes: int = 2) -> int:
        """Bytes of one remembered token, key and value, over all layers; value_bytes=2 is bf16, 4 is fp32."""
        return self.layers * self.bytes_per_token_and_layer(value_bytes)

    def bytes_per_token_and_layer(self, value_bytes: int = 2) -> int:
        """Bytes of one remembered token, key and value, in one layer."""
        return 2 * self.model_width * value_bytes

    # time

    @property
    def latents_per_second(self) -> float:
        return self.fps / self.temporal_stride

    def frames(self, latents: int) -> int:
        """Pixel frames of a video's first `latents` latent frames: 4 * (latents - 1) + 1."""
        return self.temporal_stride * (latents - 1) + 1 if latents > 0 else 0

    def latents(self, frames: int) -> int:
        """Latent frames that hold a video's first `frames` pixel frames, rounded up."""
        return -(-(frames - 1) // self.temporal_stride) + 1 if frames > 0 else 0

    def chunk_latents(self, chunk: int) -> range:
        """Latent frames of chunk number `chunk`."""
        return range(chunk * self.frames_per_chunk, (chunk + 1) * self.frames_per_chunk)

    def chunk_frames(self, chunk: int) -> range:
        """Pixel frames of chunk number `chunk`; the first chunk has fewer than the others."""
        latents = self.chunk_latents(chunk)
        return range(self.frames(latents.start), self.frames(latents.stop))

    def latents_at(self, seconds: float) -> float:
        """Time in latent frames, not rounded: 10 s are 40 latents at 16 frames/s."""
        return seconds * self.latents_per_second

    def chunk_from(self, seconds: float) -> int:
        """First chunk that starts at or after a time; a prompt switch waits for it.

        Counted in latents as LongLive does: latent 40 waits for chunk 14, which starts at latent 42. A video's first
        latent holds one frame only, so a chunk is shown up to 3 frames before the time its latents stand for."""
        return math.ceil(self.latents_at(seconds) / self.frames_per_chunk - _TOLERANCE)

    def chunks(self, seconds: float) -> int:
        """Chunks that cover a duration, at least 1.

        Counted in latents: 60 s are 240 latents, 80 chunks, and 957 frames, 3 fewer than 60 * 16."""
        return max(1, self.chunk_from(seconds))

    def chunk_start(self, chunk: int) -> float:
        """Seconds at which a chunk's first pixel frame is shown."""
        return self.chunk_frames(chunk).start / self.fps

    def seconds(self, chunks: int) -> float:
        """Seconds of video in the first `chunks` chunks."""
        return self.frames(chunks * self.frames_per_chunk) / self.fps


def _check_multiple(name: str, value: int, unit: int, meaning: str) -> None:
    if value % unit:
        below, above = value // unit * unit, (value // unit + 1) * unit
        choice = f"{below} or {above}" if below else str(above)
        raise InputError(f"{name}={value} is not a multiple of {unit} ({meaning}); use {choice}")
