"""Ways to deal a chunk's tokens to S groups other than slot attention: what an object-centric memory is compared with.

Each yields a `Grouping` as slot attention does, so that everything after it - selection, storing, scores, budget - stays
the same: a column of an assignment sums to 1, and a group's vector is the mean of its adapted tokens. Nothing here is
learnt and no gradient passes. Controls B8 to B10 and O1 of an evaluation: clusters, shuffled slots, fixed regions, truth.

Shapes: L layers, B rows, S groups, N tokens of F latent frames (n each), C slot width.
"""

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.slots.attention import Grouping
from slotmemory.slots.precision import full_precision

SOFTNESS = 0.01  # of a hard assignment; it only ranks the tokens of a group


def dice(*numbers: int) -> torch.Generator:
    """A random stream on the CPU that the numbers alone settle: a seed, a chunk, a layer."""
    return torch.Generator().manual_seed(zlib.crc32(repr(numbers).encode()))


def shuffled(assignment: Tensor, latents: int, random: torch.Generator) -> Tensor:
    """Let tokens trade places within their latent frame: [L, B, S, N] -> the same columns in another order.

    Slots hold as much of each frame as before, but of tokens drawn at random, alike in all rows."""
    layers, *_, tokens = assignment.shape
    order = torch.rand(layers, latents, tokens // latents, generator=random).argsort(-1)
    order = (order + torch.arange(latents)[:, None] * (tokens // latents)).flatten(1).to(assignment.device)
    return assignment.gather(-1, order[:, None, None].expand(assignment.shape))


@torch.no_grad()
@full_precision
def labelled(tokens: Tensor, labels: Tensor, groups: int) -> Grouping:
    """Group tokens [..., N, C] by labels [..., N] in 0..S-1 -> vectors [..., S, C], assignment [..., S, N].

    Hard but for a hundredth that falls with the distance to each mean, so that a group's surest tokens come first.
    A group without tokens has the vector 0."""
    hard = F.one_hot(labels.expand(tokens.shape[:-1]), groups).mT.to(tokens.dtype)
    means = hard @ tokens / hard.sum(-1, keepdim=True).clamp_min(1)
    squared = _distance(means, tokens).square()
    soft = (-squared / squared.mean((-1, -2), keepdim=True).clamp_min(1e-12)).softmax(-2)
    return Grouping(means, (1 - SOFTNESS) * hard + SOFTNESS * soft)


@torch.no_grad()
@full_precision
def kmeans(tokens: Tensor, groups: int, centres: Tensor | None = None, iterations: int = 4) -> Tensor:
    """Label tokens [..., N, C] by Lloyd's iterations -> [..., N] in 0..S-1; deterministic.

    Starts from the centres [..., S, C] of the chunk before, so that a cluster follows its tokens over time, else from
    tokens that lie farthest apart. A centre that no token chose moves to a token that is far from its own."""
    centres = _far_apart(tokens, groups) if centres is None else centres
    for _ in range(iterations):
        distance = _distance(centres, tokens)
        nearest, labels = distance.min(-2)
        hard = F.one_hot(labels, groups).mT.to(tokens.dtype)
        size = hard.sum(-1, keepdim=True)  # [..., S, 1]
        empty = size == 0
        worst = nearest.topk(min(groups, nearest.shape[-1]), -1).indices
        turn = (empty.cumsum(-2) - 1).clamp(0, worst.shape[-1] - 1)[..., 0]
        moved = tokens.take_along_dim(worst.gather(-1, turn)[..., None], -2)
        centres = torch.where(empty, moved, hard @ tokens / size.clamp_min(1))
    return _distance(centres, tokens).argmin(-2)


def cells(grid: tuple[int, int], groups: int) -> Tensor:
    """Cut a latent frame into S rectangles as square as they come: labels [n]. Rows of cells may differ by one cell."""
    height, width = grid
    rows = min(max(round((groups * height / width) ** 0.5), -(-groups // width), 1), height, groups)
    per_row = torch.tensor([groups // rows + (row < groups % rows) for row in range(rows)])
    row = torch.arange(height) * rows // height  # [h]
    column = torch.arange(width) * per_row[row][:, None] // width  # [h, w]
    return ((per_row.cumsum(0) - per_row)[row][:, None] + column).flatten()


def ranked(ids: Tensor, groups: int, unused: int) -> tuple[Tensor, Tensor]:
    """Number the ids [R, N] of each row's tokens from 0 -> labels [R, N], and the id of each group [R, S].

    The S most frequent ids have a group each, in ascending order; tokens of others join the most frequent. Groups
    without tokens are named `unused`, `unused` + 1, ..."""
    labels, names = torch.empty_like(ids), torch.arange(unused, unused + groups, device=ids.device).repeat(len(ids), 1)
    for row, tokens in enumerate(ids):
        found, counts = tokens.unique(return_counts=True)
        order = counts.argsort(descending=True, stable=True)[:groups]
        kept = found[order].sort().values
        tokens = torch.where(torch.isin(tokens, kept), tokens, found[order[0]])
        labels[row] = torch.searchsorted(kept, tokens)
        names[row, : len(kept)] = kept
    return labels, names


def _far_apart(tokens: Tensor, count: int) -> Tensor:
    """The token farthest from the mean, then again and again the one farthest from those chosen: [..., S, C]."""
    nearest = _distance(tokens.mean(-2, keepdim=True), tokens)[..., 0, :]
    chosen = []
    for _ in range(count):
        chosen.append(tokens.take_along_dim(nearest.argmax(-1)[..., None, None], -2))
        distance = _distance(chosen[-1], tokens)[..., 0, :]
        nearest = distance if len(chosen) == 1 else torch.minimum(nearest, distance)
    return torch.cat(chosen, -2)


def _distance(centres: Tensor, tokens: Tensor) -> Tensor:
    # by differences: the product form rounds otherwise in a batch than alone, and near ties would fall otherwise
    return torch.cdist(centres, tokens, compute_mode="donot_use_mm_for_euclid_dist")
