"""A small causal streaming video codec in the manner of TAEHV (github.com/madebyollin/taehv), written anew.

2-D convolutions see time only through blocks that also look at the frame before, so a stream's whole memory is one
activation per such block. Module layout and tensor names are TAEHV's, so that `PreviewConfig.wan()` takes the tensors
of taew2_1 unchanged. Inside the network pixels are in [0, 1], as TAEHV's are; outside they follow `codecs/base.py`.
It does not know how it is trained.

Shapes: B batch, T pixel frames, L latent frames, C latent channels, N = B * frames of a layer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from slotmemory.codecs.base import State, check_tensors, num_frames, num_latents, read_metadata_json, read_tensors
from slotmemory.errors import InputError

STAGES = 3
SPACE_STRIDE = 8
TIME_STRIDE = 4
RESIDUAL_SLOPE = 5.0  # of a leaky ReLU whose He weights are a fifth of a linear layer's: blocks start near the identity


@dataclass(frozen=True)
class PreviewConfig:
    """Sizes of a PreviewCodec. `space` and `time` say per decoder stage whether it doubles; the encoder mirrors them.

    encoder_channels: width of encoder stages 0..2; decoder_channels: widths of decoder stages 0..2 and of the head.
    blocks: memory blocks per stage, one number or one per decoder stage (the encoder mirrors it).
    group: frames that the first layer reads and the last one writes at once; 1 in TAEHV. What it leaves of the time stride
    is for `time`. plain: PlainMemBlock in place of TAEHV's MemBlock.
    """

    image_channels: int = 3
    latent_channels: int = 16
    patch: int = 1
    encoder_channels: tuple[int, ...] = (64, 64, 64)
    decoder_channels: tuple[int, ...] = (256, 128, 64, 64)
    blocks: tuple[int, ...] = (3, 3, 3)
    space: tuple[bool, ...] = (True, True, True)
    time: tuple[bool, ...] = (False, True, True)
    group: int = 1
    plain: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.blocks, int):
            object.__setattr__(self, "blocks", (self.blocks,) * STAGES)
        if len(self.time) == STAGES - 1:
            object.__setattr__(self, "time", (False, *self.time))
        for name in ("encoder_channels", "decoder_channels", "blocks", "space", "time"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            length = STAGES + (name == "decoder_channels")
            if len(value) != length:
                raise InputError(f"{name}={value} has {len(value)} entries, expected {length}")
        sizes = (self.image_channels, self.latent_channels, self.patch, *self.encoder_channels, *self.decoder_channels)
        if min(*sizes, *self.blocks) < 1:
            raise InputError(f"every size must be 1 or more: {self}")
        space = self.patch * 2 ** sum(self.space)
        if space != SPACE_STRIDE:
            raise InputError(
                f"patch={self.patch} with space={self.space} has a stride of {space} pixels per latent cell, expected "
                f"{SPACE_STRIDE}; use patch 1, 2, 4 or 8 with 3, 2, 1 or 0 doublings"
            )
        if self.group * 2 ** sum(self.time) != TIME_STRIDE:
            raise InputError(
                f"time={self.time} with group={self.group} has a stride of {self.group * 2 ** sum(self.time)} frames per "
                f"latent frame, expected {TIME_STRIDE}; use group 1, 2 or 4 with two, one or no doublings"
            )

    @classmethod
    def wan(cls) -> PreviewConfig:
        """The sizes of taew2_1, TAEHV for Wan 2.1."""
        return cls()

    @classmethod
    def tiny(cls) -> PreviewConfig:
        """The embedded model's codec: its weights sit where a latent frame costs least, before it becomes frames."""
        return cls(
            patch=4,
            latent_channels=32,
            encoder_channels=(96, 96, 192),
            decoder_channels=(192, 96, 96, 96),
            blocks=(3, 1, 1),
            space=(True, False, False),
            time=(False, False, False),
            group=4,
            plain=True,
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PreviewConfig:
        """Build from parsed JSON; raises ValueError for an unknown key."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise InputError(f"unknown codec sizes {unknown}; known: {known}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class Clamp(nn.Module):
    """Soft clamp to (-3, 3), so that a wild latent cannot blow up the decoder."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemBlock(nn.Module):
    """Residual block over a frame and the frame before it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv(inputs * 2, outputs),
            nn.ReLU(inplace=True),
            conv(outputs, outputs),
            nn.ReLU(inplace=True),
            conv(outputs, outputs),
        )
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x, past [N, C, h, w], past one frame earlier -> [N, C, h, w]."""
        return F.relu(self.conv(torch.cat([x, past], 1)) + self.skip(x))


class PlainMemBlock(MemBlock):
    """The same role with an untouched residual path that starts as the identity (not in TAEHV).

    TAEHV's block rectifies its residual path; trained from scratch for minutes at a high rate, most channels die. The
    frame before comes in cell by cell: its own layers have looked around already, and a second 3 x 3 costs a third more."""

    def __init__(self, channels: int) -> None:
        nn.Module.__init__(self)
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)
        self.past = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x)) + self.past(F.silu(past))))


class TPool(nn.Module):
    """Join every `stride` frames into one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N / stride, C, h, w]."""
        if self.stride > 1:
            # channels of a pooled frame are ordered frame by frame; written so that channels_last stays channels_last
            last = x.permute(0, 2, 3, 1).unflatten(0, (-1, self.stride)).permute(0, 2, 3, 1, 4)
            x = last.flatten(3).permute(0, 3, 1, 2)
        return self.conv(x)


class TGrow(nn.Module):
    """Split every frame into `stride` frames."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, h, w] -> [N * stride, C, h, w]."""
        x = self.conv(x)
        if self.stride == 1:
            return x
        last = x.permute(0, 2, 3, 1).unflatten(3, (self.stride, -1)).permute(0, 3, 1, 2, 4)
        return last.flatten(0, 1).permute(0, 3, 1, 2)


def run(layers: nn.Sequential, x: Tensor, past: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Run the next frames through `layers`.

    x [B, T, C, H, W]; past: each MemBlock's last input [B, C, h, w], or empty at the start of a stream (zeros, as in
    TAEHV) -> output [B, T', C', H', W'], the new past."""
    batch, kept = x.shape[0], []
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    for layer in layers:
        if isinstance(layer, MemBlock):
            frames = x.unflatten(0, (batch, -1))
            before = past[len(kept)][:, None].to(x.dtype) if past else torch.zeros_like(frames[:, :1])
            kept.append(frames[:, -1].clone())
            if frames.shape[1] > 1:
                before = torch.cat([before, frames[:, :-1]], 1)
            x = layer(x, before.flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1)), kept


class PreviewCodec(nn.Module):
    """Causal streaming codec; see `codecs/base.py` for pixels, time and the verbs. Computes in its weights' dtype."""

    space_stride = SPACE_STRIDE
    time_stride = TIME_STRIDE

    def __init__(self, config: PreviewConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PreviewConfig()
        self.latent_channels = config.latent_channels
        pixels = config.image_channels * config.patch**2 * config.group

        def block(channels: int) -> MemBlock:
            return PlainMemBlock(channels) if config.plain else MemBlock(channels, channels)

        first = nn.SiLU if config.plain else nn.ReLU
        widths = (config.encoder_channels[0], *config.encoder_channels)
        layers: list[nn.Module] = [conv(pixels, widths[0]), first()]
        for stage in range(STAGES):
            mirror = STAGES - 1 - stage
            before, width = widths[stage], widths[stage + 1]
            layers += [TPool(before, 1 + config.time[mirror])]
            layers += [conv(before, width, stride=1 + config.space[mirror], bias=False)]
            layers += [block(width) for _ in range(config.blocks[mirror])]
        layers += [conv(widths[-1], config.latent_channels)]
        self.encoder = nn.Sequential(*layers)

        widths = config.decoder_channels
        layers = [Clamp(), conv(config.latent_channels, widths[0]), first()]
        for stage in range(STAGES):
            layers += [block(widths[stage]) for _ in range(config.blocks[stage])]
            layers += [nn.Upsample(scale_factor=1 + config.space[stage])]
            layers += [TGrow(widths[stage], 1 + config.time[stage])]
            layers += [conv(widths[stage], widths[stage + 1], bias=False)]
        layers += [first(), conv(widths[-1], pixels)]
        self.decoder = nn.Sequential(*layers)

        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self._initialise()
        self.to(memory_format=torch.channels_last)

    def _initialise(self) -> None:
        # Variance-preserving (He et al. 2015): torch's default shrinks every layer, which costs minutes of training.
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d):
                rectified = layer.kernel_size == (3, 3) and layer is not self.encoder[-1]
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if rectified else "linear")
                if name.endswith(("conv2", "past")):
                    nn.init.zeros_(layer.weight)
                if name.endswith("conv.4"):
                    nn.init.kaiming_normal_(layer.weight, a=RESIDUAL_SLOPE)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.normal_(self.decoder[-1].weight, std=0.01)
        nn.init.constant_(self.decoder[-1].bias, 0.5)

    @torch.no_grad()
    def calibrate(self, video: Tensor) -> None:
        """Start from data: raw latents of video [B, T, 3, H, W] get mean 0 and variance 1."""
        raw, _ = self.feed_raw(video, self.start())
        std, mean = torch.std_mean(raw.float(), dim=(0, 1, 3, 4))
        last = self.encoder[-1]
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(mean).div_(std)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder[-1].weight.dtype

    def normalise(self, raw: Tensor) -> Tensor:
        """Network latents -> latents of about zero mean and unit variance, both [..., C, h, w]; fp32."""
        mean, std = (x.float()[:, None, None] for x in (self.latent_mean, self.latent_std))
        return (raw.float() - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Undo `normalise`; fp32."""
        mean, std = (x.float()[:, None, None] for x in (self.latent_mean, self.latent_std))
        return latents.float() * std + mean

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in [-1, 1], T = 4 (L - 1) + 1 -> latents [B, L, C, H / 8, W / 8], fp32."""
        self._check_video(video)
        num_latents(video.shape[1], TIME_STRIDE)
        return self.feed(video, self.start())[0]

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """latents [B, L, C, h, w] -> video [B, 4 (L - 1) + 1, 3, 8 h, 8 w] in [-1, 1], fp32; unclamped for a loss."""
        return self.push(latents, self.start(), clamp)[0]

    def start(self) -> State:
        """Return the state of a new stream; `push` and `feed` use their own halves of it."""
        return {"decoder": [], "encoder": [], "waiting": []}

    def push(self, latents: Tensor, state: State, clamp: bool = True) -> tuple[Tensor, State]:
        """Decode the next latents [B, L, C, h, w] -> frames [B, T, 3, 8 h, 8 w], state.

        T is 4 L, or 4 L - 3 at the start of the stream."""
        self._check_latents(latents)
        batch, count, _, height, width = latents.shape
        if count == 0:
            shape = (batch, 0, self.config.image_channels, height * SPACE_STRIDE, width * SPACE_STRIDE)
            return latents.new_zeros(shape, dtype=torch.float32), state
        raw = self.denormalise(latents).to(self.dtype)
        video, past = run(self.decoder, raw, state["decoder"])
        video = F.pixel_shuffle(video.unflatten(2, (self.config.group, -1)).flatten(1, 2), self.config.patch)
        if not state["decoder"]:
            video = video[:, TIME_STRIDE - 1 :]
        video = video.float() * 2 - 1
        return video.clamp(-1, 1) if clamp else video, {**state, "decoder": past}

    def feed(self, video: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode the next frames [B, T, 3, H, W] -> the latents [B, L, C, h, w] they complete, state.

        Frames of an incomplete group of 4 wait in the state; frame 0 is a group by itself (TAEHV, unlike Wan and us,
        does not pad the front: here frame 0 is repeated to fill its group)."""
        self._check_video(video)
        raw, state = self.feed_raw(video, state)
        return self.normalise(raw), state

    def feed_raw(self, video: Tensor, state: State) -> tuple[Tensor, State]:
        """`feed` without the per-channel normalisation."""
        batch, count, _, height, width = video.shape
        if count and not state["encoder"] and not state["waiting"]:
            video = torch.cat([video[:, :1]] * (TIME_STRIDE - 1) + [video], 1)
        video = torch.cat([*state["waiting"], video], 1)
        whole = video.shape[1] - video.shape[1] % TIME_STRIDE
        waiting = [video[:, whole:].clone()] if whole < video.shape[1] else []
        if whole == 0:
            shape = (batch, 0, self.latent_channels, height // SPACE_STRIDE, width // SPACE_STRIDE)
            return video.new_zeros(shape), {**state, "waiting": waiting}
        pixels = (video[:, :whole] * 0.5 + 0.5).to(self.dtype)
        groups = F.pixel_unshuffle(pixels, self.config.patch).unflatten(1, (-1, self.config.group)).flatten(2, 3)
        raw, past = run(self.encoder, groups, state["encoder"])
        return raw, {**state, "encoder": past, "waiting": waiting}

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode and decode, for training: video [B, T, 3, H, W], noise [B, L, C, h, w] in units of latent std ->
        unclamped video, raw latents [B, L, C, h, w]."""
        raw, _ = self.feed_raw(video, self.start())
        latents = self.normalise(raw)
        return self.decode(latents if noise is None else latents + noise, clamp=False), raw

    def metadata(self) -> dict[str, str]:
        """What a weights file says about itself."""
        return {"config": json.dumps(asdict(self.config)), "kind": "preview-codec"}

    def save(self, path: str | Path) -> None:
        """Write weights and sizes as safetensors, atomically."""
        path = Path(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(to_bytes(tensors, metadata=self.metadata()))
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> PreviewCodec:
        """Read what `save` wrote; ValueError in one line for a missing, damaged or misshapen file."""
        tensors, metadata = read_tensors(path)
        try:
            config = PreviewConfig.from_dict(read_metadata_json(metadata, "config", path))
        except (TypeError, ValueError) as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        codec = cls(config)
        check_tensors(tensors, codec.state_dict(), path)
        codec.load_state_dict(tensors)
        return codec

    @classmethod
    def of_taehv(cls, tensors: Mapping[str, Tensor], path: str | Path) -> PreviewCodec:
        """Take the tensors of taew2_1 (TAEHV for Wan 2.1) as they are published; its latents are the normalised ones.

        Layers that could split a frame in time and are not asked to keep the rows of the last frame, as TAEHV does."""
        codec = cls(PreviewConfig.wan())
        expected = {k: v for k, v in codec.state_dict().items() if not k.startswith("latent_")}
        fitted = dict(tensors)
        for index, layer in enumerate(codec.decoder):
            name = f"decoder.{index}.conv.weight"
            if isinstance(layer, TGrow) and name in fitted:
                fitted[name] = fitted[name][-expected[name].shape[0] :]
        check_tensors(fitted, expected, path)
        codec.load_state_dict(fitted, strict=False)
        return codec

    def _check_video(self, video: Tensor) -> None:
        expected = f"[B, T, {self.config.image_channels}, H, W] float in [-1, 1]"
        if video.ndim != 5 or video.shape[2] != self.config.image_channels or not video.is_floating_point():
            raise InputError(f"video is {tuple(video.shape)} {video.dtype}, expected {expected}")
        if video.shape[3] % SPACE_STRIDE or video.shape[4] % SPACE_STRIDE:
            raise InputError(f"video of {video.shape[4]}x{video.shape[3]} pixels: use multiples of {SPACE_STRIDE}")

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise InputError(f"latents are {tuple(latents.shape)}, expected [B, L, {self.latent_channels}, h, w]")


def parameters_in(codec: PreviewCodec) -> tuple[int, int]:
    """Number of weights in the encoder and in the decoder."""
    return tuple(sum(prod(p.shape) for p in part.parameters()) for part in (codec.encoder, codec.decoder))


__all__ = ["PreviewCodec", "PreviewConfig", "num_frames", "num_latents", "parameters_in"]
