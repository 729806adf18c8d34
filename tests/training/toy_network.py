"""A toy objective with a transformer: two chunks, the second reading the first; samples are the same on any processes."""

from __future__ import annotations

import torch
from torch import nn

from slotmemory.backbones.attention import Buffered
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.training import loop
from slotmemory.training.networks import Cast, add_lora
from slotmemory.training.recipe import Frozen

# six heads and tokens divide among two and three processes, widths among none but two
CONFIG = WanConfig(
    dim=24, ffn_dim=20, num_heads=6, num_layers=2, freq_dim=8, text_dim=8, text_len=4, in_dim=4, out_dim=4,
    patch=(1, 1, 1),
)  # fmt: skip


class Options(Frozen):
    recompute: bool = False
    constant: bool = False  # a second clip, from which the probe alone learns
    lora: int = 0


class Objective(loop.Objective):
    def __init__(self, options, context):
        self.options, self.context = options, context
        self.network, self.probe = CausalWan(CONFIG), nn.Linear(24, 1)
        nn.init.normal_(self.network.head.head.weight, std=0.1)
        if options.lora:
            add_lora(self.network, options.lora)
        self.cast = Cast(self.network, context.dtype, options.recompute)

    def modules(self):
        return {"network": self.network, "probe": self.probe}

    def networks(self):
        return [self.network]

    def clip(self, latents, noise, words):
        """The flows of two chunks, and what the probe says of the second."""
        text = self.cast.text_keys(words)
        still = [(keys.detach(), values.detach()) for keys, values in text]
        first, second = torch.arange(2), torch.arange(2, 4)
        turn = rotation(grid_positions(first[None], 2, 3), CONFIG.head_dim)
        zero, half = torch.zeros(latents.shape[:2]), torch.full(latents.shape[:2], 500.0)
        with torch.no_grad():
            seen = self.cast(latents, zero, still, first)[1]
        context = [(rotate(layer.keys, *turn), layer.values) for layer in seen]
        mixed = (latents + noise) / 2
        flows = [
            self.cast(mixed, half, text, first)[0],
            self.cast(mixed, half, text, second, Buffered(context))[0],
        ]
        told = self.cast(mixed, half, text, second, Buffered(context))[1][-1].hidden
        return torch.stack(flows), self.probe(told.float())

    def loss(self, step, rank, generator):
        self.cast.refresh()
        first = rank * self.context.batch
        numbers = [loop.seed_for(step, first + i) for i in range(self.context.batch)]
        drawn = torch.stack([torch.randn(200, generator=torch.Generator().manual_seed(n)) for n in numbers])
        latents, noise = (part.view(-1, 2, 4, 2, 3) for part in drawn[:, :96].split(48, 1))
        words = drawn[:, 100:116].view(-1, 2, 8)
        flows, told = self.clip(latents, noise, words)
        error, probe = (flows.float() - (noise - latents)).square().mean(), (told - 1).square().mean()
        loss = error + 0.1 * probe
        if self.options.constant:
            with self.cast.constant():
                loss = loss + 0.1 * (self.clip(noise, latents, words)[1] + 1).square().mean()
        return loss, {"error": error.detach(), "probe": probe.detach()}
