"""What every video codec offers, and how pixels are written down.

Pixels are uint8 RGB [T, 3, H, W] at the edge (files, renderer, page) and float RGB in [-1, 1] [B, T, 3, H, W] inside.
Time is causal: latent frame 0 is pixel frame 0 alone, every later latent frame is `time_stride` pixel frames, so
`frames = time_stride * (latents - 1) + 1`. Latents are normalised: about zero mean and unit variance per channel.
This module does not know any network, and nothing about what the pixels show.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slotmemory.errors import InputError

State = dict[str, list[Tensor]]
"""What a codec remembers of one stream: a plain tree of tensors, never changed in place."""


@runtime_checkable
class Codec(Protocol):
    """Video <-> latents, whole or streamed; the model is stateless, a stream's state goes in and comes out."""

    space_stride: int
    time_stride: int
    latent_channels: int

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in [-1, 1] -> latents [B, L, C, h, w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, L, C, h, w] -> video [B, T, 3, H, W] in [-1, 1]."""
        ...

    def start(self) -> State:
        """Return the state of a stream of which nothing has been seen."""
        ...

    def push(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode the next latents [B, L, C, h, w] -> their frames, state."""
        ...

    def feed(self, video: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode the next frames [B, T, 3, H, W] -> the latents completed by them, state."""
        ...


def to_float(pixels: Tensor) -> Tensor:
    """uint8 [...] in [0, 255] -> float32 [...] in [-1, 1]."""
    if pixels.dtype != torch.uint8:
        raise InputError(f"pixels are {pixels.dtype}, expected torch.uint8 in [0, 255]")
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """float [...] in [-1, 1] (clamped) -> uint8 [...] in [0, 255], rounded to nearest."""
    return ((video.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def num_latents(frames: int, time_stride: int = 4) -> int:
    """Latent frames that `frames` pixel frames fill; raises ValueError if the last group is incomplete."""
    if frames < 1 or (frames - 1) % time_stride:
        below = max(1, (frames - 1) // time_stride * time_stride + 1)
        raise InputError(
            f"frames={frames} is not {time_stride} * n + 1; use {below} or {below + time_stride}, or feed a stream"
        )
    return (frames - 1) // time_stride + 1


def num_frames(latents: int, time_stride: int = 4) -> int:
    """Pixel frames that `latents` latent frames decode to."""
    return time_stride * (latents - 1) + 1 if latents else 0


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file -> tensors by name, metadata; one-line ValueError if it is missing or damaged."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})


@contextmanager
def opened(path: str | Path) -> Iterator[safe_open]:
    """Open a safetensors file, of which only the header is read; one-line ValueError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no weights at {path}: expected a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise InputError(
            f"{path} is truncated or no safetensors file ({detail}); {path.stat().st_size} bytes found"
        ) from None


def read_metadata_json(metadata: Mapping[str, str], key: str, path: str | Path) -> Any:
    """Parse the JSON kept under `key` of a safetensors header; one-line ValueError if it is absent or damaged."""
    if key not in metadata:
        raise InputError(f"{path} has no {key!r} in its metadata; found {sorted(metadata) or 'none'}")
    try:
        return json.loads(metadata[key])
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: metadata {key!r} is no JSON ({error})") from None


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise a one-line ValueError naming the first tensor that is missing, misshapen or unknown, and how many more are."""

    def more(names: list[str]) -> str:
        return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

    missing = [name for name in expected if name not in found]
    if missing:
        shape = tuple(expected[missing[0]].shape)
        raise InputError(f"{path} lacks the tensor {missing[0]!r}: expected shape {shape}, found none{more(missing)}")
    misshapen = [name for name, tensor in expected.items() if found[name].shape != tensor.shape]
    if misshapen:
        name = misshapen[0]
        raise InputError(
            f"{path}: tensor {name!r} has shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
            f"{more(misshapen)}"
        )
    surplus = [name for name in found if name not in expected]
    if surplus:
        shape = tuple(found[surplus[0]].shape)
        raise InputError(f"{path} has an unknown tensor {surplus[0]!r} of shape {shape}, expected none{more(surplus)}")
