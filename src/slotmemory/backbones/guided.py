"""Classifier-free guidance as a backbone: the flow under a prompt, led away from the flow under a negative one.

Source: Ho and Salimans, arXiv 2207.12598. Distilled models need none; it doubles every pass. Both passes read the same
memory, as the stream has one past.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from slotmemory.backbones.attention import Pattern
from slotmemory.backbones.causal_wan import Seen, TextKeys


class Guided:
    """A backbone whose flow is led away from a negative prompt: cond + scale (cond - negative).

    The published guidance g, negative + g (cond - negative), is scale + 1."""

    def __init__(self, backbone: Any, negative: Tensor | Callable[[], Tensor], scale: float):
        """backbone: a CausalWan, or what is called like one; negative: the embedded prompt [1, L, C], or what makes it
        when it is first needed."""
        self.backbone, self.negative, self.scale = backbone, negative, scale
        self.dtype, self.config, self.patch_embedding = backbone.dtype, backbone.config, backbone.patch_embedding
        self.text_keys, self.run = backbone.text_keys, backbone.run

    @cached_property
    def against(self) -> TextKeys:
        return self.backbone.text_keys(self.negative if isinstance(self.negative, Tensor) else self.negative())

    def __call__(
        self, latents: Tensor, timesteps: Tensor, text: TextKeys, frames: Tensor, pattern: Pattern | None = None
    ) -> tuple[Tensor, list[Seen]]:
        negative = [tuple(x.expand(len(latents), -1, -1, -1) for x in layer) for layer in self.against]
        away, _ = self.backbone(latents, timesteps, negative, frames, pattern)
        flow, seen = self.backbone(latents, timesteps, text, frames, pattern)
        return flow + self.scale * (flow - away), seen
