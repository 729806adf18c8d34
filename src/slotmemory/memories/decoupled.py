"""DecMem: a local window and a sparse global memory, each with a softmax of its own, joined by a learned gate.

Source: DecMem (arXiv 2605.31336), from its text; its program is not public. Nothing is evicted: frames that leave the
window go to an archive. Every latent frame is cut into 2 x 3 blocks; blocks of queries and keys are pooled to their means,
and each block of the chunk's queries, in each head of each layer and in every pass, attends to all tokens of the `top_blocks`
blocks whose mean key fits its mean query best - of archive, window and the chunk itself. The window is attended to
separately, so that no number of far tokens can take weight from it:

    out = window attention + gate * block attention,    gate = sigmoid(rms(hidden) W + b), one per head

What the paper leaves open, and what is done here:
- The gate's form: W starts at zero and b so that every gate is `gate`, near the window model; W and b are trained.
- Means are taken of keys and queries with their rows and columns rotated in, but not their time, so that a frame far back
  can be found again; attention itself uses the keys where they stand (`placing`: capped, within the trained range).
- Blocks of unequal size, where 2 x 3 does not divide the grid, are padded and the padding is masked.
- `archive` limits the archive: the frame leaves that a newer one resembles most, by the cosine of their blocks' mean keys.
- A budget is shared in halves by window and archive. Without either limit the archive, and what is read, grows.
The choice of blocks carries no gradient; the tokens of chosen blocks do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.backbones.attention import Buffered, Pattern, attend
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories._placing import check_placing, place
from slotmemory.memory import Bank, Memory, Now, State, Written


class Decoupled(Memory):
    """Reads the archive and the last latent frames; `window` counts them with the chunk being made.

    archive: latent frames kept beside the window (default: all); rows, columns: blocks of a frame; top_blocks: blocks that
    a block of queries attends to; gate: what the gates start at, from 0 (the window alone, for good) to 1. placing,
    reach: see `_placing.py`; weights: trained gates, see `Engine.with_memory`.
    """

    source = "DecMem (arXiv 2605.31336)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        window: int = 9,
        archive: int | None = None,
        rows: int = 2,
        columns: int = 3,
        top_blocks: int = 80,
        gate: float = 0.1,
        placing: str = "capped",
        reach: int = 21,
        weights: str = "",
    ):
        chunk, per_frame = layout.frames_per_chunk, layout.tokens_per_frame
        for name, value, least in (("window", window, chunk), ("archive", archive, 0), ("top_blocks", top_blocks, 1)):
            if value is not None and value < least:
                raise InputError(f"{name}={value} is too small; use {least} or more")
        if not (1 <= rows <= layout.grid[0] and 1 <= columns <= layout.grid[1]):
            raise InputError(
                f"rows={rows}, columns={columns} do not cut a frame of {layout.grid[0]} x {layout.grid[1]} tokens; "
                f"use from 1 x 1 to {layout.grid[0]} x {layout.grid[1]}"
            )
        if not 0 <= gate <= 1:
            raise InputError(f"gate={gate} is not from 0 to 1")
        past = window - chunk
        if budget is not None:
            frames = budget // per_frame
            half = frames // 2 if archive is None else min(frames // 2, archive)
            past = min(past, frames - half)
            archive = frames - past if archive is None else min(archive, frames - past)
        elif archive is not None:
            budget = (past + archive) * per_frame
        super().__init__(layout, budget)
        self.past, self.archive, self.top_blocks = past, archive, top_blocks
        self.placing, self.reach, self.weights = check_placing(placing), reach, weights
        self.blocks = Blocks(layout.grid, rows, columns)
        self.weight = nn.Parameter(torch.zeros(layout.layers, layout.model_width, layout.heads))
        start = math.log(gate / (1 - gate)) if 0 < gate < 1 else math.copysign(math.inf, gate - 0.5)
        self.bias = nn.Parameter(torch.full((layout.layers, layout.heads), start))

    def gate(self, layer: int, hidden: Tensor) -> Tensor:
        """How much of the global memory each token's heads take: hidden [B, N, C] -> [B, N, H, 1] in [0, 1], fp32."""
        normed = F.rms_norm(hidden.float(), hidden.shape[-1:])
        return torch.sigmoid(normed @ self.weight[layer].float() + self.bias[layer].float())[..., None]

    def start(self, batch: int) -> State:
        return {"archive": [], "window": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return place([state[n][layer] for n in ("archive", "window") if state[n]], now, self.placing, self.reach)

    def attend(
        self, state: State, now: Now, read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]
    ) -> Pattern | None:
        if self.archive == 0:
            return None
        far = [bank.tokens for bank in state["archive"]] or [0] * len(read)
        return TwoSoftmaxes(self, now, read, context, far)

    def write(self, state: State, written: Written) -> State:
        new = [written.bank(layer) for layer in range(len(written.layers))]
        window = [old.join(bank) for old, bank in zip(state["window"], new)] if state["window"] else new
        return {**state, "window": window}

    def update(self, state: State, written: Written) -> State:
        leaving = [bank.first(bank.items - self.past) for bank in state["window"]]
        archive = [old.join(bank) for old, bank in zip(state["archive"], leaving)] if state["archive"] else leaving
        if self.archive is not None:
            archive = [self._novel(bank) for bank in archive]
        return {"archive": archive, "window": [bank.last(self.past) for bank in state["window"]]}

    def _novel(self, bank: Bank) -> Bank:
        """Let frames leave, one by one, that a newer one of the archive resembles most."""
        while bank.items > self.archive:
            means = self.blocks.pool(bank.keys.flatten(1, 2)).unflatten(1, (bank.items, -1)).flatten(2)
            alike = F.normalize(means, dim=-1) @ F.normalize(means, dim=-1).mT  # [B, M, M]
            older = torch.ones_like(alike, dtype=torch.bool).tril()  # a frame is compared with newer ones only
            alike = alike.masked_fill(older, -1).amax(-1)
            keep = alike.topk(bank.items - 1, largest=False).indices.sort(1).values
            bank = replace(bank, score=-alike).take(keep)
        return bank


class TwoSoftmaxes(Buffered):
    """Window attention plus gated block attention over [archive | window | chunk], which share one buffer.

    far: tokens of the archive by layer, which stand first in the context.
    """

    def __init__(
        self,
        policy: Decoupled,
        now: Now,
        read: Sequence[list[Bank]],
        context: Sequence[tuple[Tensor, Tensor]],
        far: Sequence[int],
    ):
        super().__init__(context)
        self.policy, self.now, self.read, self.far = policy, now, read, far
        self.means: dict[int, Tensor] = {}  # of what was read, by layer; pooled once

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        keys, values = self.joined(layer, key, value)
        near = attend(query, keys[:, self.far[layer] :], values[:, self.far[layer] :])
        far = self._by_blocks(layer, query, key, keys, values)
        return near + (self.policy.gate(layer, hidden) * far).to(near.dtype)

    def _by_blocks(self, layer: int, query: Tensor, key: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        blocks, count = self.policy.blocks, self.policy.top_blocks
        if count >= blocks.count * keys.shape[1] // blocks.tokens:
            return attend(query, keys, values)  # every block is chosen
        with torch.no_grad():
            if layer not in self.means and self.read[layer]:
                frames = torch.cat([bank.positions[:, :, 0, 0] for bank in self.read[layer]], 1)
                self.means[layer] = self._timeless(self.context[layer][0], frames)
            frames = torch.arange(self.now.frame, self.now.frame + self.now.frames, device=key.device)[None]
            means = self._timeless(key, frames)
            means = torch.cat((self.means[layer], means), 1) if layer in self.means else means
            fit = torch.einsum("bqhd,bkhd->bhqk", self._timeless(query, frames), means)
            chosen = fit.topk(count, sorted=False).indices  # [B, H, query blocks, k]
        return blocks.attend(query, keys, values, chosen)

    def _timeless(self, x: Tensor, frames: Tensor) -> Tensor:
        """Pool rotated x [B, T n, H, D] of latent frames [B or 1, T] by blocks and take their time back out, fp32."""
        back = torch.zeros(*frames.shape, self.policy.blocks.count, 3, device=x.device)
        # all tokens of a block share their time: it turns their mean as it turned them
        back[..., 0] = -frames[..., None]
        return rotate(self.policy.blocks.pool(x), *rotation(back.flatten(1, 2), x.shape[-1]))


class Blocks(nn.Module):
    """A latent frame's tokens cut into rows x columns of neighbours, numbered row by row; frame after frame.

    count: blocks of a frame; tokens: tokens of a frame. Blocks of unequal size are padded to the largest.
    """

    def __init__(self, grid: tuple[int, int], rows: int, columns: int):
        super().__init__()
        height, width = grid
        self.count, self.tokens = rows * columns, height * width
        down, across = torch.arange(height) * rows // height, torch.arange(width) * columns // width
        block = (down[:, None] * columns + across).flatten()  # [n]: the block of each token
        sizes = block.bincount(minlength=self.count)
        self.size = int(sizes.max())
        order = block.argsort(stable=True)
        place = torch.arange(self.tokens) - (sizes.cumsum(0) - sizes)[block[order]]  # within its block
        table, back = torch.zeros(self.count, self.size, dtype=torch.long), torch.empty_like(order)
        table[block[order], place] = order
        back[order] = block[order] * self.size + place
        self.register_buffer("table", table, persistent=False)  # the tokens of each block
        self.register_buffer("back", back, persistent=False)  # where in the flattened table each token stands
        self.register_buffer("padding", torch.arange(self.size) >= sizes[:, None], persistent=False)
        self.padded = bool(self.padding.any())

    def pool(self, x: Tensor) -> Tensor:
        """Average every block's tokens: [B, T n, H, D] -> [B, T blocks, H, D] fp32."""
        cut = x.unflatten(1, (-1, self.tokens))[:, :, self.table].float()
        cut = cut.masked_fill(self.padding[..., None, None], 0)
        return (cut.sum(3) / (~self.padding).sum(1)[:, None, None]).flatten(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, chosen: Tensor) -> Tensor:
        """Let every block of query tokens attend to all tokens of the key blocks chosen for it.

        query [B, N, H, D]; key, value [B, M, H, D]; chosen [B, H, query blocks, k] block numbers -> [B, N, H, D].
        """
        batch, _, heads, dim = query.shape
        row = torch.arange(batch, device=query.device)[:, None, None, None] * key.shape[1]
        head = torch.arange(heads, device=query.device)[:, None, None]
        made = []
        # a frame at a time: what is gathered is k blocks for every block of queries
        for frame, picked in zip(query.split(self.tokens, 1), chosen.split(self.count, 2)):
            tokens = ((picked // self.count * self.tokens)[..., None] + self.table[picked % self.count]).flatten(3)
            index = ((row + tokens) * heads + head).flatten()  # whole heads of tokens, the fastest rows to copy
            shape = (batch * heads, self.count, -1, dim)
            there = [x.reshape(-1, dim).index_select(0, index).view(shape).transpose(1, 2) for x in (key, value)]
            asked = frame[:, self.table].permute(0, 3, 2, 1, 4).flatten(0, 1)  # [B H, s, blocks, D]
            mask = None
            if self.padded:
                mask = ~self.padding[picked % self.count].flatten(3).flatten(0, 1)[:, :, None]  # [B H, blocks, 1, k s]
            found = attend(asked, *there, mask).transpose(1, 2).flatten(1, 2)[:, self.back]  # [B H, n, D]
            made.append(found.unflatten(0, (batch, heads)).transpose(1, 2))
        return torch.cat(made, 1)
