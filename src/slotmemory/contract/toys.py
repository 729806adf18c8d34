"""A random, tiny engine that is blind to meaning: enough to tell right arithmetic from wrong, in milliseconds."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from slotmemory import memory as memories
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.engine import Engine, Text
from slotmemory.layout import Layout
from slotmemory.sampler import FewStep


class ToyText(Text):
    """Words by their checksum: the same vector for the same word, in every process."""

    def __init__(self, width: int):
        self.width = width

    def check(self, prompt: str) -> None:
        if not prompt.split():
            raise ValueError("the prompt is empty; expected a few words")

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        words = [prompt.split() for prompt in prompts]
        embeddings = torch.zeros(len(prompts), max(len(row) for row in words), self.width)
        for row, spoken in enumerate(words):
            for column, word in enumerate(spoken):
                generator = torch.Generator().manual_seed(zlib.crc32(word.encode()))
                embeddings[row, column] = torch.randn(self.width, generator=generator)
        return embeddings, torch.tensor([len(row) for row in words])


class ToyCodec:
    """Three latent channels as colours; it remembers the last latent frame, so that a lost decoder state shows."""

    space_stride, time_stride, latent_channels, dtype = 1, 1, 4, torch.float32

    def start(self) -> dict[str, list[Tensor]]:
        return {"last": []}

    def push(self, latents: Tensor, state: dict[str, list[Tensor]]) -> tuple[Tensor, dict[str, list[Tensor]]]:
        before = state["last"][0] if state["last"] else torch.zeros_like(latents[:, :1])
        video = (latents + torch.cat((before, latents[:, :-1]), 1)) / 4
        return video[:, :, :3], {"last": [latents[:, -1:]]}


@cache
def toy(dtype: torch.dtype = torch.float32) -> Engine:
    """A random engine of 2 layers and 16 tokens per latent frame, with a memory of its own size for every policy."""
    config = WanConfig(24, 48, 2, 2, 16, 8, 8, 4, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = CausalWan(config)
        for part in (*backbone.blocks, backbone.head):
            nn.init.normal_(part.modulation, std=0.5)
        nn.init.normal_(backbone.head.head.weight, std=config.dim**-0.5)
    layout = Layout(
        64,
        64,
        latent_channels=config.in_dim,
        layers=config.num_layers,
        heads=config.num_heads,
        head_dim=config.head_dim,
        text_tokens=config.text_len,
    )
    defaults = {"window": 9, "slots": 3, "slot_dim": 8, "tokens_per_slot": 4, "bank": 2, "record_every": 1}
    networks = {"width": 16, "heads": 2, "archive": 2, "encoded": 4}
    return Engine(
        backbone.to(dtype).eval().requires_grad_(False),
        ToyCodec(),
        ToyText(config.text_dim),
        FewStep((1000, 500)),
        memories.build("none", layout),
        layout,
        memory_defaults=defaults | networks,
    )
