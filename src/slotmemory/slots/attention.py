"""Bind the tokens of a chunk to slots and carry the slots from chunk to chunk.

It knows nothing of the video model: tokens come in adapted, slots and their assignment go out.
Sources: Slot Attention (arXiv 2006.15055), SlotContrast (arXiv 2412.14295), whose released weights load unchanged.

Shapes: B any number of leading axes (rows, layers), S slots, N tokens, C slot width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.slots.precision import FullPrecision, full_precision


class Grouping(NamedTuple):
    """What a chunk was bound to."""

    slots: Tensor  # [B, S, C]
    assignment: Tensor  # [B, S, N], each column sums to 1; seen by the slots BEFORE their last update


class SlotAttention(FullPrecision):
    """Slots compete for tokens: softmax over slots, weighted mean over tokens, GRU, MLP; repeated.

    `normalised_state` gives the GRU the layer-normed slot as SlotContrast does (its weights need it); False is the
    published algorithm. `logit_limit` clamps the logits (30 is a safe choice) so that slots cannot saturate for good.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        token_dim: int | None = None,
        normalised_state: bool = True,
        logit_limit: float | None = None,
        eps: float = 1e-8,
    ) -> None:
        super().__init__()
        if logit_limit is not None and not logit_limit > 0:
            raise ValueError(f"logit_limit={logit_limit}: expected a number above 0 such as 30, or None for no limit")
        token_dim = dim if token_dim is None else token_dim
        self.normalised_state, self.logit_limit, self.eps = normalised_state, logit_limit, eps
        self.scale = dim**-0.5
        self.norm_features = nn.LayerNorm(token_dim)
        self.norm_slots = nn.LayerNorm(dim)
        self.to_k = nn.Linear(token_dim, dim, bias=False)
        self.to_v = nn.Linear(token_dim, dim, bias=False)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = Residual(dim, 4 * dim if hidden is None else hidden)

    @full_precision
    def forward(self, slots: Tensor, tokens: Tensor, iterations: int, alive: Tensor | None = None) -> Grouping:
        """slots [B, S, C], tokens [B, N, token_dim] -> slots [B, S, C], assignment [B, S, N] of the last iteration.

        Slots that are not `alive` [B, S] take no part in the competition: their assignment is 0."""
        if iterations < 1:
            raise ValueError(f"iterations={iterations}: expected at least 1")
        features = self.norm_features(tokens)
        k, v = self.to_k(features), self.to_v(features)
        for _ in range(iterations):
            normed = self.norm_slots(slots)
            logits = self.to_q(normed) @ k.mT * self.scale
            if self.logit_limit is not None:
                logits = logits.clamp(-self.logit_limit, self.logit_limit)
            if alive is not None:
                logits = logits.masked_fill(~alive.unsqueeze(-1), -torch.inf)
            assignment = logits.softmax(dim=-2)
            # eps after the softmax: a slot that no token chose reads the mean of all tokens instead of dividing by 0.
            weights = assignment + self.eps
            update = weights / weights.sum(dim=-1, keepdim=True) @ v
            state = normed if self.normalised_state else slots
            slots = self.gru(update.flatten(0, -2), state.flatten(0, -2)).view_as(state)
            slots = self.mlp(slots)
        return Grouping(slots, assignment)


class Residual(nn.Module):
    """x + MLP(LN x); `layers` keeps SlotContrast's numbering."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        for layer in (self.layers[1], self.layers[3]):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class LearnedInit(FullPrecision):
    """The same learned table starts every video: deterministic, and a slot keeps its index (`FixedLearnedInit`)."""

    def __init__(self, num_slots: int, dim: int) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(1, num_slots, dim) * dim**-0.5)

    def forward(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """rows, e.g. (layers, batch) -> [*rows, S, C]. Draws nothing; a generator is accepted and left alone."""
        return self.slots[0].expand(*rows, -1, -1)


class RandomInit(FullPrecision):
    """Slots drawn from one learned Gaussian: interchangeable, and `num_slots` may be changed at test time."""

    def __init__(self, num_slots: int, dim: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.mean = nn.Parameter(torch.zeros(1, 1, dim))
        self.log_std = nn.Parameter(torch.full((1, 1, dim), dim**-0.5).log())

    def forward(self, rows: Sequence[int], generator: torch.Generator | None = None) -> Tensor:
        """rows, e.g. (layers, batch) -> [*rows, S, C]. Draws on the generator's device: a CPU seed holds anywhere."""
        if generator is None:
            raise ValueError("RandomInit needs a torch.Generator, one per video, or its slots cannot be drawn again")
        shape = (*rows, self.num_slots, self.mean.shape[-1])
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.place(noise.to(self.mean.device))

    @full_precision
    def place(self, noise: Tensor) -> Tensor:
        """Standard normal noise [..., S, C] -> slots [..., S, C]."""
        return self.mean[0, 0] + noise * self.log_std[0, 0].exp()


class Predictor(FullPrecision):
    """Expect the next chunk's slots from this chunk's: one pre-norm transformer block over the slots, no position.

    `attn_scale`: "standard" is head_dim ** -0.5; "released" is head_dim ** 0.5, which the SlotContrast weights were
    trained with (it divides the query by the usual factor); a number is used as it is.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        heads: int = 4,
        attn_scale: Literal["standard", "released"] | float = "standard",
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads={heads} does not divide dim={dim}; use a divisor such as 4")
        self.blocks = nn.ModuleList([Block(dim, 4 * dim if hidden is None else hidden, heads, attn_scale)])

    @full_precision
    def forward(self, slots: Tensor) -> Tensor:
        """[B, S, C] -> [B, S, C]."""
        for block in self.blocks:
            slots = block(slots)
        return slots


class Block(nn.Module):
    """x + Attn(LN x), then x + FF(LN x)."""

    def __init__(self, dim: int, hidden: int, heads: int, attn_scale: str | float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, heads, attn_scale)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(F.relu(self.linear1(self.norm2(x))))


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, attn_scale: str | float) -> None:
        super().__init__()
        named = {"standard": (dim // heads) ** -0.5, "released": (dim // heads) ** 0.5}
        if isinstance(attn_scale, str) and attn_scale not in named:
            raise ValueError(f"attn_scale={attn_scale!r}: expected 'standard', 'released' or a number")
        self.heads = heads
        self.scale = named[attn_scale] if isinstance(attn_scale, str) else float(attn_scale)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for y in self.qkv(x).chunk(3, dim=-1))
        read = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out_proj(read.transpose(-2, -3).flatten(-2))


class Grouper(FullPrecision):
    """Initialiser, predictor and slot attention as one recurrence over chunks; stateless, the caller keeps the slots.

    first: U = SA(init, X), 3 iterations. next: U = SA(T(U_before), X), 2 iterations (SlotContrast's numbers).
    """

    def __init__(
        self,
        initializer: LearnedInit | RandomInit,
        predictor: Predictor,
        grouper: SlotAttention,
        *,
        first_iterations: int = 3,
        next_iterations: int = 2,
    ) -> None:
        super().__init__()
        self.initializer, self.predictor, self.grouper = initializer, predictor, grouper
        self.first_iterations, self.next_iterations = first_iterations, next_iterations

    @classmethod
    def fresh(
        cls, num_slots: int = 7, dim: int = 64, attn_scale: Literal["standard", "released"] | float = "standard"
    ) -> "Grouper":
        """Untrained, in the sizes of SlotMemory: a learned table and, unless told otherwise, the standard scale."""
        return cls(LearnedInit(num_slots, dim), Predictor(dim, attn_scale=attn_scale), SlotAttention(dim))

    def first(self, tokens: Tensor, generator: torch.Generator | None = None) -> Grouping:
        """Bind the first chunk: tokens [B, N, C] -> slots [B, S, C], assignment [B, S, N]."""
        return self.grouper(self.initializer(tokens.shape[:-2], generator), tokens, self.first_iterations)

    def next(self, slots: Tensor, tokens: Tensor) -> Grouping:
        """Bind a later chunk from the slots [B, S, C] of the chunk before it."""
        return self.grouper(self.predict(slots), tokens, self.next_iterations)

    def again(self, slots: Tensor, tokens: Tensor, alive: Tensor) -> Grouping:
        """Bind a chunk once more from slots [B, S, C] that were merged: one iteration among those alive [B, S].

        The others come back as the initialiser starts them, free for what appears next."""
        found = self.grouper(slots, tokens, 1, alive)
        fresh = self.initializer(slots.shape[:-2])
        return Grouping(torch.where(alive.unsqueeze(-1), found.slots, fresh), found.assignment)

    def predict(self, slots: Tensor) -> Tensor:
        """The slots [B, S, C] expected for the next chunk, before any of its tokens is seen."""
        return self.predictor(slots)
