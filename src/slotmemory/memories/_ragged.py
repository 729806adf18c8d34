"""Batch rows that hold different numbers of items in banks of one shape. Shared by policies; not a policy.

A row with fewer items than another is padded; padding has an owner below -1, and attention leaves it out. A single
stream needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slotmemory.backbones.attention import Buffered, attend
from slotmemory.memory import Bank


def real(bank: Bank) -> Tensor:
    """Which items are no padding: [B, M] bool."""
    return bank.owner >= -1


def packed(bank: Bank, wanted: Tensor, count: int | None = None) -> Bank:
    """Keep the wanted items [B, M] of each row, in their order: `count`, or as many as the row with most of them has."""
    count = int(wanted.sum(1).max()) if count is None else count
    order = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    kept = bank.take(order)
    # numbered, as items of a bank differ in birth or owner
    padding = torch.arange(-2, -2 - kept.items, -1, device=wanted.device)
    return replace(kept, owner=torch.where(wanted.gather(1, order), kept.owner, padding))


def best(bank: Bank, rank: Tensor, count: int) -> Bank:
    """Keep `count` items of each row: those of the highest rank [B, M] >= 0, and of equal rank the highest score."""
    rank = rank.masked_fill(~real(bank), -1)
    order = bank.score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, rank.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return packed(bank, real(bank) & (order.argsort(dim=1) < count), min(count, bank.items))


def standard(x: Tensor, real: Tensor) -> Tensor:
    """Give the real numbers of each row mean 0 and variance 1: x, real [B, M]."""
    count = real.sum(-1, keepdim=True)
    centred = x - (x * real).sum(-1, keepdim=True) / count
    return centred / ((centred.square() * real).sum(-1, keepdim=True) / count).sqrt().add(1e-6)


class Padded(Buffered):
    """One softmax over what was read and the chunk's own tokens, padding left out."""

    def __init__(self, context: Sequence[tuple[Tensor, Tensor]], hidden: Sequence[Tensor | None]):
        """hidden: per layer [B, M] bool, True for tokens of padding; None where there is none."""
        super().__init__(context)
        self.hidden = hidden

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        keys, values = self.joined(layer, key, value)
        if self.hidden[layer] is None:
            return attend(query, keys, values)
        own = torch.ones(key.shape[:2], dtype=torch.bool, device=key.device)
        return attend(query, keys, values, torch.cat((~self.hidden[layer], own), 1)[:, None, None])


def hiding_padding(read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]) -> Padded | None:
    """The pattern for what was read (`Memory.attend`); None where every row is full."""
    if len(context[0][0]) == 1 or not any(read):
        return None
    hidden = [torch.cat([_padding_of(bank) for bank in found], 1) if found else None for found in read]
    some = iter(torch.stack([found.any() for found in hidden if found is not None]).tolist())  # one wait for all layers
    hidden = [found if found is not None and next(some) else None for found in hidden]
    return Padded(context, hidden) if any(found is not None for found in hidden) else None


def _padding_of(bank: Bank) -> Tensor:
    """Which tokens are padding: [B, M n] bool."""
    return (~real(bank)).repeat_interleave(bank.keys.shape[2], 1)
