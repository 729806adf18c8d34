"""Three-axis rotary positions of the Wan transformer, applied to tokens at read time.

Knows nothing of attention, caches or memories: a token is (t, h, w) and a vector.
Source: Wan2.1 `rope_params` / `rope_apply`: each axis has its own exponent range, channels (2i, 2i+1) form one
complex number, and the head dimension is split t/h/w = d - 4(d//6), 2(d//6), 2(d//6). Angles are computed on demand,
so there is no table to run off the end of (the published one holds 1024 rows).

Legend: B batch, F latent frames, N tokens, H heads, D head dim.
"""

import torch
from torch import Tensor

THETA = 10000.0


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Split a head dimension into its (t, h, w) shares, each even; 128 -> (44, 42, 42)."""
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary positions need pairs of channels, use an even size")
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin for token positions [..., N, 3] (t, h, w; any real numbers) -> two fp32 [..., N, D/2].

    Angles are taken in float64 and only their cos / sin are rounded, so that long videos lose no precision.
    """
    parts = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / max(dim, 1)
        parts.append(positions[..., axis, None].to(torch.float64) * THETA**-exponent)
    angles = torch.cat(parts, dim=-1)
    return angles.cos().float(), angles.sin().float()


def averaging(extents: Tensor, head_dim: int) -> Tensor:
    """Say how much shorter a cell's mean phase is than one phase: extents [..., N, 3] -> fp32 [..., N, D/2] in (0, 1].

    extents: how many whole steps of t, h, w a token stands for. The mean of exp(i a x) over n consecutive x is the phase
    in their middle times sin(n a / 2) / (n sin(a / 2)), so a packed token (FramePack, arXiv 2504.12626) is a position and
    this factor.
    """
    parts = []
    for axis, dim in enumerate(axis_dims(head_dim)):
        exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=extents.device) / max(dim, 1)
        half, count = THETA**-exponent / 2, extents[..., axis, None].to(torch.float64)
        parts.append((count * half).sin() / (count * half.sin()))
    return torch.cat(parts, dim=-1).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, H, D] by cos / sin [B or 1, N, D/2]; computed in fp32, returned in x's dtype."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def grid_positions(frames: Tensor, height: int, width: int) -> Tensor:
    """Place every token of latent frames at (t, h, w): frames [..., F] -> [..., F * height * width, 3], row-major."""
    shape = (*frames.shape, height, width)
    t = frames[..., None, None].expand(shape)
    h = torch.arange(height, device=frames.device, dtype=frames.dtype)[:, None].expand(shape)
    w = torch.arange(width, device=frames.device, dtype=frames.dtype).expand(shape)
    return torch.stack((t, h, w), dim=-1).flatten(-4, -2)
