"""Map a layer's token features into the slot space, LayerNorm and Linear, one pair per layer; and slots back to features.

It does not know where the features come from. SlotMemory (arXiv 2605.31033) leaves the form open; this small one is
ours, as a two-layer head per layer would add more weights than the rest of the memory together.

Shapes: L layers, B rows, N tokens, W feature width, C slot width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.slots.precision import FullPrecision, full_precision


class Adapter(FullPrecision):
    """Features [..., W] of one layer -> tokens [..., C], fp32."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, dim)

    @full_precision
    def forward(self, features: Tensor) -> Tensor:
        return self.linear(self.norm(features))


class LayerAdapters(FullPrecision):
    """One Adapter per layer, its parameters stacked: all layers in one batched product, or one layer as it passes."""

    def __init__(self, num_layers: int, width: int, dim: int) -> None:
        super().__init__()
        single = [Adapter(width, dim) for _ in range(num_layers)]
        self.norm_weight = nn.Parameter(torch.stack([a.norm.weight.detach() for a in single]))  # [L, W]
        self.norm_bias = nn.Parameter(torch.stack([a.norm.bias.detach() for a in single]))  # [L, W]
        self.weight = nn.Parameter(torch.stack([a.linear.weight.detach() for a in single]))  # [L, C, W]
        self.bias = nn.Parameter(torch.stack([a.linear.bias.detach() for a in single]))  # [L, C]

    @full_precision
    def forward(self, features: Tensor) -> Tensor:
        """features [L, B, N, W] -> tokens [L, B, N, C]. Makes fp32 copies of all features; see `one` to avoid that."""
        layers, width = self.norm_weight.shape
        if features.ndim != 4 or features.shape[0] != layers or features.shape[-1] != width:
            raise ValueError(f"features {list(features.shape)}: expected [{layers} layers, B, N, {width}]")
        flat = F.layer_norm(features.flatten(1, 2), (width,))
        flat = torch.addcmul(self.norm_bias[:, None], flat, self.norm_weight[:, None])
        return torch.baddbmm(self.bias[:, None], flat, self.weight.mT).unflatten(1, features.shape[1:3])

    @full_precision
    def one(self, layer: int, features: Tensor) -> Tensor:
        """features [..., W] of one layer -> tokens [..., C], so that nobody has to hold the features of all layers."""
        normed = F.layer_norm(features, features.shape[-1:], self.norm_weight[layer], self.norm_bias[layer])
        return F.linear(normed, self.weight[layer], self.bias[layer])


class LayerDecoders(FullPrecision):
    """Slots back to features, one Linear per layer; it only helps to train slots."""

    def __init__(self, num_layers: int, dim: int, width: int) -> None:
        super().__init__()
        single = [nn.Linear(dim, width) for _ in range(num_layers)]
        self.weight = nn.Parameter(torch.stack([a.weight.detach() for a in single]))  # [L, W, C]
        self.bias = nn.Parameter(torch.stack([a.bias.detach() for a in single]))  # [L, W]

    @full_precision
    def forward(self, slots: Tensor) -> Tensor:
        """slots [L, B, S, C] -> features [L, B, S, W]."""
        flat = torch.baddbmm(self.bias[:, None], slots.flatten(1, 2), self.weight.mT)
        return flat.unflatten(1, slots.shape[1:3])
