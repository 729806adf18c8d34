"""The frame-preservation history encoder: a video's latents as few tokens of the backbone's own width.

Two branches on one token grid, summed: the backbone's patch embedding of the latents averaged over the rate (frozen, no
parameters), and a convolution stack with attention whose last projection starts at zero, a learned residual on a feature
that the backbone reads already. Source: Zhang et al., arXiv 2512.23851 (v6: TinyHistory); sizes as printed there.

Every layer is causal in time and keeps its own left state, attention included: it looks `span` encoded frames back, no
further. Encoding a video in parts therefore equals encoding it at once (the paper's attention is global, and its
append-only use an approximation).

Legend: B batch, T latent frames, K encoded frames, g tokens of one, c latent channels, h, w latent size, W encoder width,
C width of the backbone.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.backbones.attention import attend
from slotmemory.backbones.rope import grid_positions, rotate, rotation
from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._packing import enlarge, pack

BRANCHES = ("both", "low", "high")


def parse_rate(text: str) -> tuple[int, int, int]:
    """Read a compression rate as the paper writes it, against the token grid: "4x4x2" -> height 4, width 4, time 2."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    rate = tuple(int(x) for x in found.groups()) if found else ()
    if not rate or any(x < 1 or x & (x - 1) for x in rate):
        raise InputError(f"rate={text!r}: expected powers of 2 as HEIGHTxWIDTHxTIME, such as 4x4x2, 2x2x2 or 2x2x1")
    return rate


class CausalConv(nn.Module):
    """A 3-D convolution that sees no later frame; what its next output needs of the past is its state."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        around = tuple(k // 2 if s == 1 else 0 for k, s in zip(kernel[1:], stride[1:]))  # strided: cells, no overlap
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=(0, *around))

    def start(self, like: Tensor) -> Tensor:
        """Zeros before a video's first frame, for inputs like [B, inputs, T, h, w]."""
        return like.new_zeros(*like.shape[:2], self.conv.kernel_size[0] - self.conv.stride[0], *like.shape[3:])

    def forward(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        x = torch.cat((self.start(x) if state is None else state, x), 2)
        kernel, stride = self.conv.kernel_size, self.conv.stride
        count = max((x.shape[2] - kernel[0]) // stride[0] + 1, 0)
        left = x[:, :, count * stride[0] :]
        if count == 0:
            sizes = (
                (n + 2 * p - k) // s + 1
                for n, p, k, s in zip(x.shape[3:], self.conv.padding[1:], kernel[1:], stride[1:])
            )
            return x.new_zeros(len(x), self.conv.out_channels, 0, *sizes), left
        return F.silu(self.conv(x[:, :, : (count - 1) * stride[0] + kernel[0]])), left


class CausalAttention(nn.Module):
    """Pre-norm self-attention over an encoded frame and the span - 1 before it; these are its state."""

    def __init__(self, width: int, heads: int, span: int):
        super().__init__()
        self.heads, self.span = heads, span
        self.norm = nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, grid: tuple[int, int], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, K, g, W] -> the same, and the frames that the next ones will see."""
        seen = x if state is None else torch.cat((state, x), 1)
        past, cells = seen.shape[1] - x.shape[1], x.shape[2]
        left = seen[:, max(seen.shape[1] - self.span + 1, 0) :]
        if x.shape[1] == 0:
            return x, left
        query, key, value = (
            self.query_key_value(self.norm(seen)).flatten(1, 2).unflatten(-1, (3, self.heads, -1)).unbind(2)
        )
        frames = torch.arange(seen.shape[1], device=x.device)
        turn = rotation(grid_positions(frames[None], *grid), query.shape[-1])  # only differences in time matter
        age = frames[past:, None] - frames
        mask = ((age >= 0) & (age < self.span)).repeat_interleave(cells, 0).repeat_interleave(cells, 1)
        query = rotate(query, *turn)[:, past * cells :]
        mixed = attend(query, rotate(key, *turn), value, mask)
        return x + self.out(mixed.flatten(2)).view(x.shape), left


class Encoder(nn.Module):
    """Latents to tokens, whole or in parts: `encoder(latents, state)`, state None before a video's first frame."""

    def __init__(
        self,
        layout: Layout,
        rate: tuple[int, int, int],
        width: int = 512,
        heads: int = 8,
        blocks: int = 1,
        span: int = 8,
        branches: str = "both",
    ):
        super().__init__()
        if branches not in BRANCHES:
            raise InputError(unknown("branches", branches, BRANCHES))
        if span < 1 or width < 8 or width % 8 or width % (2 * heads):
            raise InputError(
                f"width={width}, heads={heads}, span={span}: width must be a multiple of 8 and of 2 heads, span 1 or more"
            )
        grid = tuple(cells // by for cells, by in zip(layout.grid, rate))
        if not all(grid):
            raise InputError(
                f"rate={'x'.join(map(str, rate))} leaves nothing of a grid of {layout.grid[0]}x{layout.grid[1]} tokens; "
                "use a lower one"
            )
        self.rate, self.grid, self.branches = rate, grid, branches
        down = (rate[2], rate[0], rate[1])
        # a frozen copy that `adopt` fills; it is the backbone's, and saved with the backbone
        shape = (layout.model_width, layout.latent_channels, *(p * f for p, f in zip(layout.patch, down)))
        self.register_buffer("patch_weight", nn.init.xavier_uniform_(torch.empty(shape).flatten(1)).view(shape), False)
        self.register_buffer("patch_bias", torch.zeros(layout.model_width), False)
        if branches == "low":
            return
        steps = [(1, 1, 1), *strides(down[0], down[1] * layout.patch[1], down[2] * layout.patch[2])]
        sizes = [min(width // 8 * 2**i, width) for i in range(len(steps) - 1)] + [width]
        kernels = [(3, *(s if max(step[1:]) > 1 else 3 for s in step[1:])) for step in steps]
        inputs = [layout.latent_channels, *sizes]
        self.convs = nn.ModuleList(CausalConv(*sizes) for sizes in zip(inputs, sizes, kernels, steps))
        self.attention = nn.ModuleList(CausalAttention(width, heads, span) for _ in range(blocks))
        self.project = nn.Linear(width, layout.model_width)
        if branches == "both":
            nn.init.zeros_(self.project.weight)
            nn.init.zeros_(self.project.bias)

    @property
    def tokens(self) -> int:
        """Tokens of one encoded frame, g."""
        return self.grid[0] * self.grid[1]

    @torch.no_grad()
    def adopt(self, weight: Tensor, bias: Tensor) -> None:
        """Take the backbone's patch embedding for the low-resolution branch."""
        self.patch_weight.copy_(enlarge(weight, (self.rate[2], self.rate[0], self.rate[1])))
        self.patch_bias.copy_(bias)

    def forward(self, latents: Tensor, state: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """latents [B, T, c, h, w] -> tokens [B, K, g, C] of the encoded frames that they complete, and the next state."""
        state = state or {"waiting": latents[:, :0], "convs": [], "attention": []}
        frames = torch.cat((state["waiting"], latents), 1)
        count = frames.shape[1] // self.rate[2]
        kept = {"waiting": frames[:, count * self.rate[2] :], "convs": [], "attention": []}
        low = pack(frames, self.patch_weight, self.patch_bias)
        if self.branches == "low":
            return low, kept
        x = latents.transpose(1, 2)
        for conv, left in zip(self.convs, state["convs"] or [None] * len(self.convs)):
            x, left = conv(x, left)
            kept["convs"].append(left)
        x = x.flatten(3).permute(0, 2, 3, 1)  # [B, K, g, W]
        for block, left in zip(self.attention, state["attention"] or [None] * len(self.attention)):
            x, left = block(x, self.grid, left)
            kept["attention"].append(left)
        high = self.project(x)
        return (high if self.branches == "high" else low + high), kept


def strides(time: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """Split factors that are powers of 2 into steps of 2, time first (as printed): (2, 8, 8) -> 211, 122, 122, 122."""
    steps = [(2, 1, 1)] * (time.bit_length() - 1)
    while height > 1 or width > 1:
        steps.append((1, min(height, 2), min(width, 2)))
        height, width = -(-height // 2), -(-width // 2)
    return steps
