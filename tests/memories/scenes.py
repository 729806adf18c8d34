"""Chunks whose tokens show entities that are known: clean blobs in feature space, and memories that see them as they are."""

import torch

from slotmemory.memory import build
from tests.memories.seen import LAYOUT, now, tell, written

BLOBS = ("slots", dict(slots=4, slot_dim=8, tokens_per_slot=4, bank=4, record_every=1, record_first=True, window=9))
ONE, TWO, THREE = [0] * 16, [0] * 8 + [1] * 8, [0] * 8 + [1] * 4 + [2] * 4


def memory_of(budget=None, **options):
    """`slots` whose adapters hand the first features through, so that blobs stay as far apart as they are."""
    name, defaults = BLOBS
    found = build(name, LAYOUT, budget, **{**defaults, **options}).requires_grad_(False)
    found.adapters.weight.copy_(torch.eye(8, LAYOUT.model_width).expand_as(found.adapters.weight))
    found.adapters.bias.zero_()
    return found


def scene(chunk, *rows, text=None, change=None, seed=0):
    """A chunk in which token i of every latent frame shows entity rows[r][i] (a direction of its own), one list per row.

    Keys, values and text queries of row r are drawn from seed + r."""
    truth = torch.tensor(rows)  # [B, n]
    noise = torch.randn(LAYOUT.tokens_per_chunk, LAYOUT.model_width, generator=torch.Generator().manual_seed(chunk))
    features = 5 * torch.eye(LAYOUT.model_width)[truth].repeat(1, LAYOUT.frames_per_chunk, 1) + 0.05 * noise

    def shown(seen, layer):
        seen = seen._replace(hidden=features)
        return change(seen, layer) if change else seen

    moment = now(chunk, text, len(rows))
    return written(moment, range(seed, seed + len(rows)), shown)


def told(memory, *scenes, rows=1, seed=0):
    """The state after each scene: a list of tokens, or one list per batch row."""
    state, found = memory.start(rows), []
    for chunk, shown in enumerate(scenes):
        state = tell(memory, state, scene(chunk, *([shown] if rows == 1 else shown), seed=seed))
        found.append(state)
    return found
