"""Does a stream keep its looks? Brightness, contrast, colour, sharpness and a distance to true pictures, over a minute.

A generated video has no truth to be compared with pixel by pixel. But what its prompts ask for is known: the narrative
world tells them too, several times over, each time with other looks that no word states. Levels are given against these
tellings in the same seconds, so that what changes only because the prompts change the scene is no drift.

Sources: RMS contrast (Peli, 1990), gradient energy as a measure of focus (Krotkov, 1988), the Frechet distance of two
Gaussians (Dowson and Landau, 1982) as FID takes it (Heusel et al., arXiv 1706.08500), here of latents of our own codec.

Looked at are the first frames of every second. Legend: V videos, S seconds, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slotmemory.codecs.base import to_float
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.errors import InputError
from slotmemory.world.clock import FPS

CLIP = 5  # frames looked at in a second: two latents
WINDOW = 10  # seconds
LOOKS = ("brightness", "contrast", "saturation", "sharpness")
DISTANCE = "distance"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
BATCH = 16  # clips encoded together


class Gaussian(NamedTuple):
    """mean [C], covariance [C, C]."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class Window:
    """What some seconds show: the mean of every look, and the Gaussian of the latents' cells."""

    seconds: float  # where its middle is
    looks: Mapping[str, float]
    cells: Gaussian
    spread: float  # mean distance of each video to the others; 0 for one video


class Course(NamedTuple):
    """How a quantity goes through a video: in its first and last window, and the change per minute (least squares)."""

    first: float
    last: float
    slope: float


def eye() -> PreviewCodec:
    """The codec whose latents are compared: always the embedded one, whatever codec made the video."""
    path = str(files("slotmemory") / "assets" / "tiny" / "codec.safetensors")
    return PreviewCodec.load(path).eval().requires_grad_(False)


def measure(video: Tensor, world: Sequence[Window], codec: PreviewCodec) -> dict[str, list[float]]:
    """Compare a video uint8 [T, 3, H, W] with `describe` of the world's tellings -> per window, by quantity:

    looks as shares of the world's (1: as there); the distance of latents to the world's, in the mean distance of one
    telling to the others (1: as near as one more telling). A codec that learned to draw hardly sees fine noise: that
    raises sharpness instead. Raises InputError for other lengths, and for less than two tellings."""
    own = describe([video], codec)
    if len(own) != len(world):
        raise InputError(f"a video of {len(video)} frames has {len(own)} windows, the world's {len(world)}")
    if not all(window.spread > 0 for window in world):
        raise InputError("the world's tellings are all the same; expected two or more with other looks")
    found = {name: [a.looks[name] / max(b.looks[name], 1e-6) for a, b in zip(own, world)] for name in LOOKS}
    return {**found, DISTANCE: [frechet(a.cells, b.cells) / b.spread for a, b in zip(own, world)]}


def describe(videos: Sequence[Tensor], codec: PreviewCodec) -> list[Window]:
    """Describe videos uint8 [T, 3, H, W] of one length as one, in windows of about 10 s, at least two."""
    seen = torch.stack([clips(video) for video in videos])  # [V, S, CLIP, 3, H, W]
    parts = torch.arange(seen.shape[1]).tensor_split(max(2, round(seen.shape[1] / WINDOW)))
    return [_window(float(part.float().mean()), seen[:, part], codec) for part in parts]


def clips(video: Tensor) -> Tensor:
    """The first frames of every second: [T, 3, H, W] -> [S, CLIP, 3, H, W]. Raises InputError for less than two."""
    if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[1] != 3:
        raise InputError(f"a video is {tuple(video.shape)} of {video.dtype}, expected [T, 3, H, W] of uint8")
    if len(video) < FPS + CLIP:
        raise InputError(f"drift in {len(video)} frames: give at least {FPS + CLIP}, better a minute")
    return torch.stack([video[start : start + CLIP] for start in range(0, len(video) - CLIP + 1, FPS)])


def _window(second: float, seen: Tensor, codec: PreviewCodec) -> Window:
    """Describe clips [V, S, CLIP, 3, H, W]."""
    means = {name: float(values.mean()) for name, values in looks(seen.flatten(0, 2)).items()}
    with torch.no_grad():
        latents = [codec.encode(to_float(part).to(codec.dtype)) for part in seen.flatten(0, 1).split(BATCH)]
    cells = torch.cat(latents).double().movedim(2, -1).reshape(len(seen), -1, codec.latent_channels)
    apart = []
    for video in range(len(cells) if len(cells) > 1 else 0):
        others = torch.cat((cells[:video], cells[video + 1 :]))
        apart.append(frechet(_gaussian(cells[video]), _gaussian(others.flatten(0, 1))))
    spread = sum(apart) / len(apart) if apart else 0.0
    return Window(second + CLIP / 2 / FPS, means, _gaussian(cells.flatten(0, 1)), spread)


def _gaussian(cells: Tensor) -> Gaussian:
    return Gaussian(cells.mean(0), torch.cov(cells.T))


def looks(frames: Tensor) -> dict[str, Tensor]:
    """Of frames uint8 [N, 3, H, W], each [N] in shares of full scale:

    brightness: mean luma Y; contrast: standard deviation of Y in the frame; saturation: mean of max(R, G, B) -
    min(R, G, B), HSV's chroma; sharpness: root mean square of the differences of Y to the right and downwards."""
    colours = frames.float() / 255
    luma = (colours * torch.tensor(LUMA)[:, None, None]).sum(1)
    edges = luma.diff(dim=2).square().mean((1, 2)) + luma.diff(dim=1).square().mean((1, 2))
    return {
        "brightness": luma.mean((1, 2)),
        "contrast": luma.flatten(1).std(1, correction=0),
        "saturation": (colours.amax(1) - colours.amin(1)).mean((1, 2)),
        "sharpness": edges.sqrt(),
    }


def frechet(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # A B and the symmetric A^(1/2) B A^(1/2) have the same eigenvalues
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(float(apart), 0.0)


def course(values: Sequence[float], seconds: Sequence[float]) -> Course:
    """Follow a quantity through the windows whose middles are at these seconds."""
    slope = np.polyfit(np.asarray(seconds) / 60, values, 1)[0]
    return Course(float(values[0]), float(values[-1]), float(slope))
