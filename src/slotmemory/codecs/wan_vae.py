"""Wan 2.1's video autoencoder, streamed: diffusers' AutoencoderKLWan with its feature cache carried from call to call.

Latents are decoded one at a time with the inputs of every causal convolution kept, so that pushing them in any split
gives the very numbers of a whole decode (the published program restarts its cache between parts and loses frames there).
It knows the network's calling convention, nothing of what makes latents. Needs the extra `wan`.
Sources: Wan2.1 `wan/modules/vae.py`; diffusers `autoencoder_kl_wan.py`.

Shapes: B batch, T pixel frames, L latent frames, C latent channels; inside the network [B, C, T, H, W].
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slotmemory.checkpoints import names
from slotmemory.checkpoints.files import flat, read_tree, told_of
from slotmemory.checkpoints.layouts import kind_of
from slotmemory.codecs.base import State, check_tensors, num_latents
from slotmemory.errors import InputError, need_extra

KIND = "wan-vae"  # in a weights file's metadata
STRIDE, TIME_STRIDE = 8, 4
LATENTS = 16


class WanVAE(nn.Module):
    """Causal streaming codec of Wan 2.1; see `codecs/base.py` for pixels, time and the verbs.

    Computes in its weights' dtype; fp32 is what the weights were released in, bf16 what the published programs run.
    """

    space_stride = STRIDE
    time_stride = TIME_STRIDE

    def __init__(self, model: nn.Module) -> None:
        """model: an AutoencoderKLWan with its weights."""
        super().__init__()
        self.model = model
        self.latent_channels: int = model.config.z_dim
        causal = need_extra("diffusers.models.autoencoders.autoencoder_kl_wan", "wan", "the Wan VAE").WanCausalConv3d
        # one place per causal convolution; those inside shortcuts keep theirs empty
        self._places = {
            part: sum(isinstance(module, causal) for module in getattr(model, part).modules())
            for part in ("encoder", "decoder")
        }

    @property
    def dtype(self) -> torch.dtype:
        return self.model.post_quant_conv.weight.dtype

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the network's latents per channel, [C, 1, 1] fp32."""
        config = self.model.config
        values = torch.tensor([config.latents_mean, config.latents_std], dtype=torch.float32, device=like.device)
        return values[0, :, None, None], values[1, :, None, None]

    def encode(self, video: Tensor) -> Tensor:
        """video [B, T, 3, H, W] in [-1, 1], T = 4 (L - 1) + 1 -> latents [B, L, C, H / 8, W / 8], fp32: the mean, no sample."""
        self._check_video(video)
        num_latents(video.shape[1], TIME_STRIDE)
        return self.feed(video, self.start())[0]

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B, L, C, h, w] -> video [B, 4 (L - 1) + 1, 3, 8 h, 8 w] in [-1, 1], fp32."""
        return self.push(latents, self.start())[0]

    def start(self) -> State:
        """Return the state of a new stream; `push` and `feed` use their own halves of it."""
        return {"decoder": [], "encoder": [], "waiting": []}

    def push(self, latents: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode the next latents [B, L, C, h, w] -> frames [B, T, 3, 8 h, 8 w], state.

        T is 4 L, or 4 L - 3 at the start of the stream."""
        if latents.ndim != 5 or latents.shape[2] != self.latent_channels:
            raise InputError(f"latents are {tuple(latents.shape)}, expected [B, L, {self.latent_channels}, h, w]")
        batch, count, _, height, width = latents.shape
        if count == 0:
            return latents.new_zeros(batch, 0, 3, height * STRIDE, width * STRIDE, dtype=torch.float32), state
        mean, std = self._statistics(latents)
        raw = (latents.float() * std + mean).to(self.dtype).transpose(1, 2)
        cache, parts = self._unpacked(state["decoder"], "decoder"), []
        for latent in raw.split(1, 2):
            inside = self.model.post_quant_conv(latent)
            parts.append(self.model.decoder(inside, feat_cache=cache, feat_idx=[0]))
        video = torch.cat(parts, 2).transpose(1, 2).float().clamp(-1, 1)
        return video, {**state, "decoder": _packed(cache)}

    def feed(self, video: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode the next frames [B, T, 3, H, W] -> the latents [B, L, C, h, w] they complete, state.

        Frame 0 is a group by itself; frames of an incomplete group of 4 wait in the state."""
        self._check_video(video)
        batch, _, _, height, width = video.shape
        video = torch.cat([*state["waiting"], video], 1)
        cache, begun, parts, at = self._unpacked(state["encoder"], "encoder"), bool(state["encoder"]), [], 0
        while video.shape[1] - at >= (group := TIME_STRIDE if begun else 1):
            pixels = video[:, at : at + group].to(self.dtype).transpose(1, 2)
            inside = self.model.encoder(pixels, feat_cache=cache, feat_idx=[0])
            parts.append(self.model.quant_conv(inside)[:, : self.latent_channels])
            at, begun = at + group, True
        state = {**state, "encoder": _packed(cache), "waiting": [video[:, at:].clone()] if at < video.shape[1] else []}
        if not parts:
            return video.new_zeros(batch, 0, self.latent_channels, height // STRIDE, width // STRIDE), state
        mean, std = self._statistics(video)
        return (torch.cat(parts, 2).transpose(1, 2).float() - mean) / std, state

    def _unpacked(self, kept: list[Tensor], part: str) -> list[Any]:
        """A state's tensors -> the list that the network reads and replaces the entries of."""
        cache = [tensor if tensor.numel() else "Rep" for tensor in kept]
        return cache + [None] * (self._places[part] - len(cache))

    def metadata(self) -> dict[str, str]:
        """What a weights file says about itself."""
        config = {key: value for key, value in self.model.config.items() if key in _arguments(type(self.model))}
        return {"kind": KIND, "config": json.dumps(config)}

    @classmethod
    def published(cls) -> WanVAE:
        """One of the published sizes, with fresh weights."""
        return cls(
            need_extra("diffusers.models.autoencoders.autoencoder_kl_wan", "wan", "the Wan VAE").AutoencoderKLWan()
        )

    @classmethod
    def load(cls, path: Path) -> WanVAE:
        """Read weights: `Wan2.1_VAE.pth` in the original names, or diffusers' names with its config.json beside them.

        Sizes come from the tensors where nothing tells them. Raises InputError for another model's file, a missing,
        surplus or misshapen tensor.
        """
        module = need_extra("diffusers.models.autoencoders.autoencoder_kl_wan", "wan", "the Wan VAE")
        tensors, config = flat(read_tree(path), path), {}
        if "decoder.conv1.weight" in tensors and "conv2.weight" in tensors:
            tensors = {name: tensors[stored] for stored, name in names.autoencoder(tensors).items()}
        elif "decoder.conv_in.weight" not in tensors or "post_quant_conv.weight" not in tensors:
            raise InputError(f"{path} is {kind_of(tensors)}, expected the Wan 2.1 video autoencoder")
        else:
            config = told_of(path)
        try:
            known = {key: value for key, value in config.items() if key in _arguments(module.AutoencoderKLWan)}
            with torch.device("meta"):
                model = module.AutoencoderKLWan(**(known or _sizes(tensors, path)))
        except (TypeError, ValueError, IndexError) as error:
            raise (
                error
                if isinstance(error, InputError)
                else InputError(f"{path}: sizes that make no autoencoder ({error})")
            ) from None
        check_tensors(tensors, model.state_dict(), path)
        model.load_state_dict(tensors, assign=True)
        return cls(model).eval().requires_grad_(False)

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[2] != 3 or not video.is_floating_point():
            raise InputError(f"video is {tuple(video.shape)} {video.dtype}, expected [B, T, 3, H, W] float in [-1, 1]")
        if video.shape[3] % STRIDE or video.shape[4] % STRIDE:
            raise InputError(f"video of {video.shape[4]}x{video.shape[3]} pixels: use multiples of {STRIDE}")


def _packed(cache: list[Any]) -> list[Tensor]:
    """The network's list -> tensors alone: its mark for "the first frame was repeated" becomes an empty one."""
    while cache and cache[-1] is None:
        cache = cache[:-1]
    return [torch.zeros(0) if isinstance(entry, str) else entry for entry in cache]


def _arguments(cls: type) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


def _sizes(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Read the network's sizes off its tensors, in diffusers' names."""
    base, pixels = tensors["encoder.conv_in.weight"].shape[:2]
    latents = tensors["post_quant_conv.weight"].shape[0]
    if pixels != 3 or latents != LATENTS:
        kind = "the Wan 2.2 autoencoder" if latents == 48 else f"an autoencoder of {latents} latent channels"
        raise InputError(f"{path} is {kind} ({pixels} input channels), expected Wan 2.1's: 3 and {LATENTS}")
    widths, temporal, blocks, index = [base], [], [0], 0
    while True:
        block = f"encoder.down_blocks.{index}"
        if f"{block}.conv2.weight" in tensors:
            widths[-1] = tensors[f"{block}.conv2.weight"].shape[0]
            blocks[-1] += 1
        elif f"{block}.resample.1.weight" in tensors:
            temporal.append(f"{block}.time_conv.weight" in tensors)
            widths.append(widths[-1])
            blocks.append(0)
        else:
            break
        index += 1
    return {
        "base_dim": base,
        "z_dim": latents,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": blocks[0],
        "temperal_downsample": temporal,
    }
