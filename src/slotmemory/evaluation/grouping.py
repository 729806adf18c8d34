"""How well groups of tokens are things: what slots, clusters or fixed regions found, against who really is where.

Labels say which group, or which thing, every token of a clip belongs to; the same number in two chunks is the same group.
So a group that wanders from thing to thing loses, over the whole clip, what it may win in every single chunk. Sources: ARI
(Hubert and Arabie, 1985), on foreground tokens alone as in object-centric learning (FG-ARI), which cannot see a group
that spills over the background and so goes with mBO (Pont-Tuset et al., arXiv 1503.00848).

Shapes: T chunks, N tokens of a chunk. Thing 0 is the background.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from slotmemory.errors import InputError


class Quality(NamedTuple):
    """Of one clip; fg_ari up to 1, all others from 0 to 1, None where the clip shows too little to tell.

    fg_ari: agreement of pairs of foreground tokens, over the whole clip; mbo: mean over things of the best overlap (IoU)
    with one group, over the whole clip; mbo_chunk: the same in each chunk by itself; bound: how often a thing that is in two
    chunks on end is held by the same group; usage: entropy of the groups' sizes, 1 if all are equal."""

    fg_ari: float | None
    mbo: float | None
    mbo_chunk: float | None
    bound: float | None
    usage: float


def measure(found: Tensor, truth: Tensor, groups: int) -> Quality:
    """Compare labels found [T, N] in 0..groups-1 with truth [T, N], 0 the background. Raises InputError for other shapes."""
    if found.shape != truth.shape or found.ndim != 2:
        raise InputError(f"labels of {tuple(found.shape)} and {tuple(truth.shape)}: expected two [chunks, tokens]")
    found, truth = found.long(), truth.long()
    shown = truth > 0
    overlaps = [x for x in (_overlap(*pair, groups) for pair in zip(found, truth)) if x is not None]
    return Quality(
        fg_ari=adjusted_rand_index(found[shown], truth[shown]) if truth[shown].unique().numel() > 1 else None,
        mbo=_overlap(found.flatten(), truth.flatten(), groups),
        mbo_chunk=sum(overlaps) / len(overlaps) if overlaps else None,
        bound=_bound(found, truth, groups),
        usage=_usage(found, groups),
    )


def adjusted_rand_index(a: Tensor, b: Tensor) -> float:
    """Agreement of two labellings [N] on which points belong together: 1 the same up to names, 0 as by chance."""
    (_, a), (_, b) = a.unique(return_inverse=True), b.unique(return_inverse=True)
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    table = torch.bincount(a * columns + b, minlength=rows * columns).view(rows, columns).double()

    def pairs(x: Tensor) -> float:
        return float((x * (x - 1) / 2).sum())

    both, first, second = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = first * second / max(pairs(table.sum()), 1)
    most = (first + second) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _overlap(found: Tensor, truth: Tensor, groups: int) -> float | None:
    """Mean best overlap of labels [N], over the things there are."""
    best = []
    for thing in truth[truth > 0].unique():
        inside = torch.bincount(found[truth == thing], minlength=groups).double()
        union = torch.bincount(found, minlength=groups) + (truth == thing).sum() - inside
        best.append(float((inside / union.clamp_min(1)).max()))
    return sum(best) / len(best) if best else None


def _bound(found: Tensor, truth: Tensor, groups: int) -> float | None:
    """How often the group that holds most of a thing is the one that did in the chunk before."""
    kept = []
    for thing in truth[truth > 0].unique():
        holders = [
            int(torch.bincount(labels[there], minlength=groups).argmax()) if there.any() else None
            for labels, there in zip(found, truth == thing)
        ]
        kept += [a == b for a, b in zip(holders, holders[1:]) if a is not None and b is not None]
    return sum(kept) / len(kept) if kept else None


def _usage(found: Tensor, groups: int) -> float:
    share = torch.bincount(found.flatten(), minlength=groups).double() / found.numel()
    return float(-share.xlogy(share).sum() / math.log(max(groups, 2)))
