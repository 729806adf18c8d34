"""Several latent frames as few tokens: the backbone's patch embedding with a larger kernel. Shared by policies.

A kernel k times as large, its weights repeated and divided by k^3, gives the token that the backbone would make of the
latents averaged over k x k x k: what a model can read before anything is trained (FramePack, arXiv 2504.12626).

Legend: B batch, T latent frames, c channels, h, w latent size, C width of the backbone, (kt, kh, kw) kernel = stride.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def enlarge(weight: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Repeat a patch weight [C, c, 1, ph, pw] by (time, height, width), so that it averages -> [C, c, kt, kh, kw]."""
    for axis, factor in enumerate(factors, 2):
        weight = weight.repeat_interleave(factor, axis) / factor
    return weight


def pack(latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Make one token of every cell: latents [B, T, c, h, w], weight [C, c, kt, kh, kw] -> [B, T / kt, cells, C].

    What does not fill a cell at the end of an axis is left out. Computed in the latents' dtype.
    """
    kt, kh, kw = weight.shape[2:]
    times, rows, columns = latents.shape[1] // kt, latents.shape[3] // kh, latents.shape[4] // kw
    whole = latents[:, : times * kt, :, : rows * kh, : columns * kw]
    cells = whole.unflatten(4, (columns, kw)).unflatten(3, (rows, kh)).unflatten(1, (times, kt))
    cells = cells.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(2, 3)  # [B, T/kt, rows columns, c kt kh kw]
    return F.linear(cells, weight.flatten(1).to(cells), bias.to(cells))


def spans(steps: int, count: int, factor: int) -> tuple[Tensor, Tensor]:
    """Where `count` cells of `factor` steps stand on an axis of `steps`: their middles and how many steps each covers.

    A last cell that reaches over the edge stands for the steps that exist. fp32 [count] each.
    """
    first = torch.arange(count) * factor
    last = (first + factor).clamp(max=steps) - 1
    return (first + last) / 2, (last - first + 1).float()


def places(t: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """Every combination of three axes, row-major: [T], [H], [W] -> [1, T H W, 3]."""
    return torch.cartesian_prod(t, h, w).view(1, -1, 3)
