"""Key-value eviction: of everything older than the last frames, the tokens that score highest stay.

The family of language-model cache compression, by `score` (higher stays); k un-rotated keys unless said otherwise:
  key_norm  -|k|                                      (Devoto et al., arXiv 2406.11430)
  key_diff  -cos(k, mean of all k / |k|)              keys unlike the rest (KeyDiff, arXiv 2504.15364)
  observed  mean attention that recent queries pay k  (SnapKV, arXiv 2404.14469)
  expected  softmax(k . m / sqrt d + k' S k / 2d) |v| attention from Gaussian queries of mean m and covariance S, turned
            by the mean rotation of the coming frames (Expected Attention, arXiv 2510.00636)
Sources: those papers; formulas as in NVIDIA's kvpress.

What video changes: recent queries are those of the clean pass; heads keep the same tokens, by their mean score (a bank
has one position per token); and a unit is a tile of the picture, whose tokens' scores are averaged, which is the pooling
that SnapKV does along a sentence. key_diff compares un-rotated keys, so that likeness is of content, not of place.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._placing import PLACINGS, place
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State, Written

SCORES = ("key_diff", "key_norm", "observed", "expected")


class Evicted(Sink):
    """Reads `window` latent frames' worth of tokens with the chunk itself: sink, last frames, and the best of the rest.

    score: see above; sink, recent: first and last latent frames that are exempt; tile: rows and columns of a unit, whose
    number in the picture is its items' owner; observers: queries asked, spread evenly over the chunk (`observed`);
    future: latent frames that the rotation is averaged over (`expected`). placing, reach: see `_placing.py`; tiles of
    many frames cannot stand side by side, so "relative" is refused.
    """

    source = "key norm (arXiv 2406.11430), KeyDiff (2504.15364), SnapKV (2404.14469), Expected Attention (2510.00636)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        score: str = SCORES[0],
        window: int = 12,
        sink: int = 0,
        recent: int = 3,
        tile: int = 2,
        observers: int = 64,
        future: int = 12,
        placing: str = PLACINGS[0],
        reach: int = 21,
    ):
        per_frame, chunk = layout.tokens_per_frame, layout.frames_per_chunk
        if score not in SCORES:
            raise InputError(unknown("score", score, SCORES))
        if placing == "relative":
            raise InputError(
                "placing=relative moves whole latent frames, tiles are parts of many; use native or capped"
            )
        for name, value in (("tile", tile), ("observers", observers), ("future", future)):
            if value < 1:
                raise InputError(f"{name}={value} is too small; use 1 or more")
        rows, columns = layout.grid
        if rows % tile or columns % tile:
            raise InputError(f"tile={tile} does not divide the picture's {rows} rows and {columns} columns of tokens")
        if recent < 0 or sink < 0 or window < sink + recent + chunk:
            raise InputError(
                f"window={window} cannot hold sink={sink}, recent={recent} and a chunk of {chunk} latent frames; "
                f"use window >= {max(sink, 0) + max(recent, 0) + chunk}"
            )
        total = (window - chunk) * per_frame if budget is None else min((window - chunk) * per_frame, budget)
        # a budget buys whole frames first, the sink before all
        whole = min(sink + recent, total // per_frame) * per_frame
        super().__init__(layout, whole, sink=sink, window=sink + recent + chunk, placing=placing, reach=reach)
        self.budget = total if budget is None else budget
        self.tile, self.capacity = tile, (total - whole) // tile**2
        score_of = {
            "key_norm": key_norm,
            "key_diff": key_diff,
            "observed": partial(observed, count=observers),
            "expected": partial(expected, grid=layout.grid, future=future),
        }
        self.score_of = score_of[score]

    def start(self, batch: int) -> State:
        return {**super().start(batch), "kept": []}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        kept = [state["kept"][layer]] if state["kept"] else []
        return [*place(kept, now, self.placing, self.reach), *super().read(state, layer, now)]

    def update(self, state: State, written: Written) -> State:
        leaving = [bank.first(max(bank.items - self.past, 0)) for bank in state["window"]]
        state = super().update(state, written)
        if not leaving[0].items:
            return state
        kept = []
        for layer, frames in enumerate(leaving):
            new = tiles(frames, self.layout.grid, self.tile)
            kept.append(self._best(state["kept"][layer].join(new) if state["kept"] else new, written, layer))
        return {**state, "kept": kept}

    def _best(self, bank: Bank, written: Written, layer: int) -> Bank:
        """Score all units anew and keep the best, in the order they came."""
        # scored where the coming chunk will see them
        coming = replace(written.now, frame=written.now.frame + written.frames)
        (seen,) = place([bank], coming, self.placing, self.reach)
        bank = replace(bank, score=self.score_of(seen, written, layer).mean((2, 3)))
        if bank.items <= self.capacity:
            return bank
        return bank.take(bank.score.topk(self.capacity, 1).indices.sort(1).values)


def tiles(frames: Bank, grid: tuple[int, int], side: int) -> Bank:
    """Cut latent frames [B, M, rows * columns, ...] into items of side x side tokens; owner: the tile's number."""
    across = (grid[0] // side, side, grid[1] // side, side)

    def cut(x: Tensor) -> Tensor:
        return x.unflatten(2, across).transpose(3, 4).flatten(4, 5).flatten(1, 3)

    count = across[0] * across[2]
    born = frames.born.repeat_interleave(count, 1)
    owner = torch.arange(count, device=born.device).repeat(frames.items).expand(born.shape)
    score = frames.score.repeat_interleave(count, 1)
    return Bank(cut(frames.keys), cut(frames.values), cut(frames.positions), born, owner, score)


# scores: a bank as the coming chunk sees it, what was written, the layer -> [B, M, n, H] fp32, higher stays


def key_norm(bank: Bank, written: Written, layer: int) -> Tensor:
    return -bank.keys.float().norm(dim=-1)


def key_diff(bank: Bank, written: Written, layer: int) -> Tensor:
    keys = F.normalize(bank.keys.float(), dim=-1)
    return -F.cosine_similarity(keys, keys.mean((1, 2), keepdim=True), dim=-1)


def observed(bank: Bank, written: Written, layer: int, count: int) -> Tensor:
    """Softmax over the stored keys and the chunk's own, which the queries see as well; one stored key's mean share."""
    seen = written.layers[layer]
    turn = rotation(written.positions, seen.keys.shape[-1])
    pick = torch.linspace(0, seen.query.shape[1] - 1, min(count, seen.query.shape[1])).round().long()
    queries = rotate(seen.query, *turn)[:, pick.to(seen.query.device)].float()
    keys = torch.cat((turned(bank), rotate(seen.keys, *turn).float()), 1)
    logits = torch.einsum("bqhd,bkhd->bqhk", queries, keys) * keys.shape[-1] ** -0.5
    attention = logits.softmax(-1).mean(1)[..., : bank.tokens]  # [B, H, stored keys]
    return attention.mT.unflatten(1, bank.keys.shape[1:3])


def expected(bank: Bank, written: Written, layer: int, grid: tuple[int, int], future: int) -> Tensor:
    queries = written.layers[layer].query.float()  # [B, N, H, D]
    width = queries.shape[-1]
    mean = queries.mean(1, keepdim=True)
    spread = queries - mean
    covariance = torch.einsum("bnhc,bnhd->bchd", spread, spread) / queries.shape[1]  # [B, D, H, D]
    start = written.now.frame + written.frames
    frames = torch.arange(start, start + future, device=queries.device)
    turn = [part.mean(0)[None, None] for part in rotation(grid_positions(frames, *grid), width)]
    mean = rotate(mean, *turn)[:, 0]
    covariance = rotate(rotate(covariance, *turn).transpose(1, 3), *turn)  # both sides; it is symmetric
    keys = turned(bank)  # [B, K, H, D]
    logits = torch.einsum("bkhd,bhd->bkh", keys, mean) * width**-0.5
    logits = logits + torch.einsum("bkhc,bchd,bkhd->bkh", keys, covariance, keys) / (2 * width)
    weight = logits.softmax(1) * bank.values.flatten(1, 2).float().norm(dim=-1)
    return weight.unflatten(1, bank.keys.shape[1:3])


def turned(bank: Bank) -> Tensor:
    """A bank's keys, rotated to where they stand: [B, M n, H, D] fp32."""
    keys = bank.keys.flatten(1, 2).float()
    return rotate(keys, *rotation(bank.positions.flatten(1, 2), keys.shape[-1]))
