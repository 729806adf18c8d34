"""Chunks as a clean pass would show them to a memory, made of random numbers: no model runs."""

import torch

from slotmemory.backbones.causal_wan import Seen
from slotmemory.backbones.rope import grid_positions
from slotmemory.contract import toy
from slotmemory.memory import Memory, Now, Written

LAYOUT = toy().layout
TEXT = (6, LAYOUT.heads, LAYOUT.head_dim)


def prompt(seed: int = 0, batch: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer random cross-attention keys and values [B, L, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, *TEXT, generator=generator).expand(batch, 2, *TEXT).unbind(1))] * LAYOUT.layers


def now(chunk: int, text=None, batch: int = 1, **changes) -> Now:
    length = LAYOUT.frames_per_chunk
    text = prompt(batch=batch) if text is None else text
    return Now(chunk, chunk * length, length, 0, False, text, torch.full((batch,), TEXT[0]), **changes)


def written(moment: Now, seeds=(0,), change=None) -> Written:
    """Random keys, values, features and queries, one seed per batch row; `change(seen, layer) -> seen` edits them."""
    tokens, shape = LAYOUT.tokens_per_chunk, (LAYOUT.heads, LAYOUT.head_dim)
    layers = []
    for layer in range(LAYOUT.layers):
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(1000 * seed + 10 * moment.chunk + layer)
            parts = (shape, shape, (LAYOUT.model_width,), shape, shape)  # keys, values, features, text queries, queries
            rows.append([torch.randn(tokens, *part, generator=generator) for part in parts])
        seen = Seen(*(torch.stack(part) for part in zip(*rows)))
        layers.append(change(seen, layer) if change else seen)
    frames = torch.arange(moment.frame, moment.frame + moment.frames)
    latents = torch.zeros(len(seeds), moment.frames, LAYOUT.latent_channels, LAYOUT.latent_height, LAYOUT.latent_width)
    return Written(moment, layers, grid_positions(frames[None], *LAYOUT.grid), latents)


def tell(memory: Memory, state, shown: Written):
    return memory.update(memory.write(state, shown), shown)


@torch.no_grad()
def stream(memory: Memory, chunks: int, text=None, seeds=(0,)):
    """Yield the state after each chunk."""
    state = memory.start(len(seeds))
    for chunk in range(chunks):
        state = tell(memory, state, written(now(chunk, text, len(seeds)), seeds))
        yield state
