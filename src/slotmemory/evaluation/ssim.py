"""Structural similarity of pictures (Wang et al., 2004): means, variances and covariance under a Gaussian window."""

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.errors import InputError

WINDOW, SIGMA = 11, 1.5
C1, C2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # for a range of 2


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean SSIM of each picture: [N, 3, H, W] in [-1, 1], at least 11 pixels a side -> [N] in [-1, 1], 1 for equals.

    Per colour channel, over the places where the whole window lies inside."""
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[-2:]) < WINDOW:
        raise InputError(
            f"ssim of {tuple(a.shape)} and {tuple(b.shape)}: expected two [N, C, H, W] of {WINDOW} or more"
        )
    at = torch.arange(WINDOW, device=a.device) - WINDOW // 2
    line = torch.exp(-at.square() / (2 * SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.float().flatten(0, 1)[:, None], window)

    a, b = a.float(), b.float()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    shared = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * shared + C2) / (var_a + var_b + C2)
    return (luminance * structure).flatten(1).mean(1).unflatten(0, (len(a), -1)).mean(1)
