"""Objective: train the preview codec to reproduce clips of the narrative world.

Clips are rendered on the fly and never repeat. Entities are small and carry what a viewer looks at, so their pixels
weigh more; noise on the latents makes the latent space smooth enough for a diffusion model to aim at.
It does not know the codec's layers, nor how the loop steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from slotmemory.codecs.base import num_latents, to_float, to_uint8
from slotmemory.codecs.preview import SPACE_STRIDE, TIME_STRIDE, PreviewCodec, PreviewConfig
from slotmemory.training import loop
from slotmemory.training.narratives import HELD_OUT, Pool, PoolSize, Refresh, Seconds
from slotmemory.training.recipe import Frozen, Recipe
from slotmemory.world.clock import chunk_frames
from slotmemory.world.narrative import Narrative


class Sizes(Frozen):
    """The codec's sizes; defaults are the embedded model's."""

    latent_channels: int = PreviewConfig.tiny().latent_channels
    patch: int = PreviewConfig.tiny().patch
    encoder_channels: tuple[int, ...] = PreviewConfig.tiny().encoder_channels
    decoder_channels: tuple[int, ...] = PreviewConfig.tiny().decoder_channels
    blocks: tuple[int, ...] = PreviewConfig.tiny().blocks
    space: tuple[bool, ...] = PreviewConfig.tiny().space
    time: tuple[bool, ...] = PreviewConfig.tiny().time
    group: int = PreviewConfig.tiny().group
    plain: bool = PreviewConfig.tiny().plain


class Options(Frozen):
    """What the codec objective may be told."""

    sizes: Sizes = Sizes()
    part: Literal["both", "decoder"] = Field(
        "both",
        description="decoder: latents stay what they are, so transformers trained on them stay valid; needs init",
    )
    data: Literal["narrative", "toy"] = "narrative"
    frames: int = Field(13, ge=1, description="pixel frames per clip, 4 n + 1")
    crop: int = Field(80, ge=8, description="pixels of a clip's width: entities are nearly as tall as the picture")
    seconds: Seconds = 16.0
    pool: PoolSize = 48
    refresh: Refresh = 10
    at_cuts: float = Field(0.1, ge=0, le=1, description="share of clips with a change of shot inside")
    still: float = Field(0.05, ge=0, le=1, description="share of clips that repeat one frame")
    entity_weight: float = Field(4.0, ge=1, description="weight of entity pixels against background pixels")
    dilation: int = Field(2, ge=0, description="pixels by which entity masks grow")
    mse: float = Field(1.0, ge=0)
    l1: float = Field(0.0, ge=0, description="slow at the start: after 60 steps on one batch 21.4 dB, mse 28.8 dB")
    edge: float = Field(0.0, ge=0, description="weight of the finite-difference term")
    noise: float = Field(0.1, ge=0, description="noise on normalised latents before decoding")
    loud: float = Field(0.0, ge=0, description="largest noise on a share of the clips: a latent space that bears noise")
    loud_share: float = Field(0.5, ge=0, le=1, description="that share")
    scale: float = Field(0.01, ge=0, description="pull of the raw latents towards zero mean and unit variance")
    momentum: float = Field(0.02, gt=0, le=1, description="of the running latent statistics")
    held_out: int = Field(16, ge=1, description="narratives of the validation")
    calibration_clips: int = Field(32, ge=1, description="clips behind the codec's start")
    statistics_clips: int = Field(256, ge=1, description="clips behind the exported latent statistics")

    def check(self, recipe: Recipe) -> None:
        if self.part == "decoder" and recipe.init is None:
            raise ValueError(
                "options.part=decoder without init would fit a decoder to an encoder that knows nothing; name the codec "
                "that goes on, such as init=src/slotmemory/assets/tiny or a run's folder"
            )


@dataclass(frozen=True)
class Reel:
    """A rendered narrative: pixels uint8 [T, 3, H, W], entity masks bool [T, H, W], first frames of its later shots."""

    pixels: Tensor
    masks: Tensor
    cuts: list[int]


class Clips(Protocol):
    """Where clips come from; everything about a batch follows from the step and the generator."""

    def batch(self, step: int, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        """Return pixels uint8 [count, T, 3, H, W] and entity masks bool [count, T, H, W] to learn from."""
        ...

    def held_out(self, number: int) -> tuple[Tensor, Tensor]:
        """Return one whole clip [T, ...] that is never learnt from."""
        ...


class NarrativeClips:
    """Clips of the narrative world: anywhere, around changes of shot, and stills, each cropped to a part of the width."""

    def __init__(self, options: Options, seed: int, rank: int) -> None:
        self.options = options
        self.pool = Pool(self._render, options.pool, options.refresh, seed, rank)

    def batch(self, step: int, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        reels = self.pool.at(step)
        clips = [self._crop(*self._cut(reels[random.integers(len(reels))], random), random) for _ in range(count)]
        return tuple(torch.stack(parts) for parts in zip(*clips))

    def held_out(self, number: int) -> tuple[Tensor, Tensor]:
        return self._cut(self._render(HELD_OUT + number), np.random.default_rng(number))

    def _render(self, seed: int) -> Reel:
        narrative = Narrative.random(seed, self.options.seconds)
        cuts = [chunk_frames(shot.start_chunk).start for shot in narrative.shots[1:]]
        pixels = torch.as_tensor(narrative.render(0, narrative.frames))
        return Reel(pixels, torch.as_tensor(narrative.truth(0, narrative.frames).masks) > 0, cuts)

    def _cut(self, reel: Reel, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        frames, roll = self.options.frames, random.random()
        span = (len(reel.pixels) - frames) // TIME_STRIDE * TIME_STRIDE
        first = int(random.integers(span + 1))
        if roll < self.options.at_cuts and reel.cuts:
            first = int(np.clip(random.choice(reel.cuts) - random.integers(1, frames), 0, span))
        if roll > 1 - self.options.still:
            return tuple(x[first : first + 1].expand(frames, *x.shape[1:]) for x in (reel.pixels, reel.masks))
        first -= first % TIME_STRIDE  # latent frames begin where the world's shots and steps do, as in a stream
        return reel.pixels[first : first + frames], reel.masks[first : first + frames]

    def _crop(self, pixels: Tensor, masks: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        most = pixels.shape[-1] - self.options.crop
        left = int(random.integers(most // SPACE_STRIDE + 1)) * SPACE_STRIDE if most > 0 else 0
        return tuple(x[..., left : left + self.options.crop] for x in (pixels, masks))


class ToyClips:
    """Boxes drifting over a plain ground: enough to see an objective work in a test."""

    def __init__(self, options: Options, seed: int = 0, rank: int = 0) -> None:
        self.frames = options.frames

    def batch(self, step: int, random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
        pixels = np.zeros((count, self.frames, 3, 48, 80), np.uint8)
        masks = np.zeros((count, self.frames, 48, 80), bool)
        for clip in range(count):
            pixels[clip] = random.integers(256, size=(1, 3, 1, 1))
            (x, y), speed = random.integers((60, 28)), random.integers(-2, 3)
            colour = random.integers(256, size=(3, 1, 1))
            for frame in range(self.frames):
                left = int(np.clip(x + speed * frame, 0, 60))
                pixels[clip, frame, :, y : y + 20, left : left + 20] = colour
                masks[clip, frame, y : y + 20, left : left + 20] = True
        return torch.from_numpy(pixels), torch.from_numpy(masks)

    def held_out(self, number: int) -> tuple[Tensor, Tensor]:
        return tuple(x[0] for x in self.batch(0, np.random.default_rng(HELD_OUT + number), 1))


def pixel_weights(masks: Tensor, entity_weight: float, dilation: int) -> Tensor:
    """bool [B, T, H, W] -> float weights [B, T, 1, H, W] of mean 1: entities and their rim weigh more."""
    weights = masks.float()
    if dilation:
        weights = F.max_pool2d(weights, 2 * dilation + 1, stride=1, padding=dilation)
    weights = 1 + (entity_weight - 1) * weights
    return (weights / weights.mean())[:, :, None]


def reconstruction_terms(output: Tensor, target: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Weighted L1, squared and finite-difference errors of videos [B, T, 3, H, W] in [-1, 1]."""
    error = output - target
    across, down = error.diff(dim=-1).abs(), error.diff(dim=-2).abs()
    return {
        "l1": (weights * error.abs()).mean(),
        "mse": (weights * error.square()).mean(),
        "edge": (weights[..., 1:] * across).mean() + (weights[..., 1:, :] * down).mean(),
    }


def statistics(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [C] of raw latents [B, L, C, h, w]."""
    std, mean = torch.std_mean(raw.float(), dim=(0, 1, 3, 4))
    return mean, std


def psnr(squared_error: Tensor) -> float:
    """PSNR in dB from a mean squared error of pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / squared_error.clamp_min(1e-10)))


def in_boxes(masks: Tensor) -> Tensor:
    """bool masks [..., H, W] -> bool, true inside the bounding box of each frame's entity pixels."""
    rows, columns = masks.any(-1), masks.any(-2)

    def between(x: Tensor) -> Tensor:
        forward = x.cumsum(-1) > 0
        backward = x.flip(-1).cumsum(-1).flip(-1) > 0
        return forward & backward

    return between(rows)[..., :, None] & between(columns)[..., None, :]


class Objective(loop.Objective):
    """Train a PreviewCodec on rendered clips."""

    def __init__(self, options: Options, context: loop.Context) -> None:
        self.options, self.context = options, context
        self.codec = PreviewCodec(PreviewConfig(**options.sizes.model_dump()))
        num_latents(options.frames)
        source = {"narrative": NarrativeClips, "toy": ToyClips}[options.data]
        self.clips: Clips = source(options, context.seed, context.rank)
        random = np.random.default_rng(loop.seed_for(context.seed))
        self.codec.calibrate(to_float(self.clips.batch(0, random, options.calibration_clips)[0]))
        self.fixed = options.part == "decoder"
        self.codec.encoder.requires_grad_(not self.fixed)
        self._held_out: tuple[Tensor, Tensor] | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"codec": self.codec}

    def parameter_groups(self):
        # Muon for the hidden convolutions. Adam moves every weight by about the rate: where many alike inputs add up to a
        # pixel, that is a visible leap, so the last layer has half of it.
        names = [name for name, p in self.codec.named_parameters() if p.ndim == 4 and p.requires_grad]
        latents, pixels = (f"{part}.{len(getattr(self.codec, part)) - 1}.weight" for part in ("encoder", "decoder"))
        hidden = [name for name in names if name not in (latents, pixels)]
        groups = ((hidden, "muon", 1.0), ([latents], "adamw", 1.0), ([pixels], "adamw", 0.5))
        return [
            {"names": [f"codec.{name}" for name in chosen], "optimizer": kind, "scale": scale}
            for chosen, kind, scale in groups
            if set(chosen) <= set(names)
        ]

    def running(self) -> list[Tensor]:
        return [self.codec.latent_mean, self.codec.latent_std]

    def metadata(self, module: str) -> dict[str, str]:
        return self.codec.metadata()

    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        options, device = self.options, self.context.device
        random = np.random.default_rng(loop.seed_for(self.context.seed, step, rank))
        pixels, masks = self.clips.batch(step, random, self.context.batch)
        target = to_float(pixels).to(device)
        count, frames, _, height, width = target.shape
        grid = (height // self.codec.space_stride, width // self.codec.space_stride)
        shape = (count, num_latents(frames), self.codec.latent_channels, *grid)
        loud = torch.rand(2, count, 1, 1, 1, 1, generator=generator)
        level = torch.where(loud[0] < options.loud_share, options.noise + loud[1] * options.loud, options.noise)
        noise = level * torch.randn(shape, generator=generator)
        output, raw = loop.cast_call(self.codec, self.context.dtype, target, noise.to(device))
        weights = pixel_weights(masks.to(device), options.entity_weight, options.dilation)
        terms = reconstruction_terms(output, target, weights)
        mean, std = statistics(raw)
        terms["scale"] = mean.square().mean() + (std - 1).square().mean()
        shares = {"l1": options.l1, "mse": options.mse, "edge": options.edge, "scale": options.scale}
        loss = sum(share * terms[name] for name, share in shares.items())
        if self.fixed:
            return loss, terms
        with torch.no_grad():
            share = 1.0 if step == 0 else options.momentum
            # New tensors, not in place: backward still needs the ones that forward saw.
            self.codec.latent_mean = self.codec.latent_mean.lerp(mean, share)
            self.codec.latent_std = self.codec.latent_std.lerp(std.clamp_min(1e-3), share)
        return loss, terms

    def validate(self, step: int) -> dict[str, float]:
        target, masks, output = self._reconstruct()
        squared = (output - target).square().mean(2)
        results = {"psnr": psnr(squared.mean())}
        boxes = in_boxes(masks)
        if boxes.any():
            results["psnr_entities"] = psnr(squared[boxes].mean())
        results["latent_std"] = float(self.codec.latent_std.mean())
        return results

    def sample(self, step: int, folder: Path) -> None:
        """Write codec.png: per narrative a row of originals above a row of reconstructions, 2x."""
        target, _, output = self._reconstruct()
        picked = torch.linspace(0, target.shape[1] - 1, min(8, target.shape[1])).round().long()
        rows = torch.stack([target[:, picked], output[:, picked]], 1)  # [N, 2, T, 3, H, W]
        sheet = to_uint8(rows).permute(0, 1, 4, 2, 5, 3).flatten(0, 2).flatten(1, 2)
        sheet = sheet.repeat_interleave(2, 0).repeat_interleave(2, 1)
        Image.fromarray(sheet.cpu().numpy()).save(folder / "codec.png")

    def finish(self) -> None:
        """Replace the running latent statistics by exact ones over many clips."""
        if self.fixed:
            return
        raw = []
        with torch.no_grad():
            for index in range(-(-self.options.statistics_clips // 8)):
                random = np.random.default_rng(loop.seed_for(self.context.seed, HELD_OUT + index))
                video = to_float(self.clips.batch(index, random, 8)[0]).to(self.context.device)
                raw.append(self._call(video, self.codec.start(), method="feed_raw")[0])
            mean, std = statistics(torch.cat(raw))
            self.codec.latent_mean.copy_(mean)
            self.codec.latent_std.copy_(std.clamp_min(1e-3))

    def _reconstruct(self) -> tuple[Tensor, Tensor, Tensor]:
        """Held-out clips -> target, masks, output clamped to [-1, 1]."""
        if self._held_out is None:
            clips = [self.clips.held_out(number) for number in range(self.options.held_out)]
            self._held_out = tuple(torch.stack(parts) for parts in zip(*clips))
        pixels, masks = (x.to(self.context.device) for x in self._held_out)
        target = to_float(pixels)
        with torch.no_grad():
            output, _ = self._call(target)
        return target, masks, output.clamp(-1, 1)

    @property
    def _call(self):
        return partial(loop.cast_call, self.codec, self.context.dtype)
