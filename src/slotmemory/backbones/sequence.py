"""Tokens shared among processes: each runs a part of every latent frame, and of attention a part of the heads (Ulysses).

Around every attention call tokens are exchanged for heads, so that a process attends with all tokens in its heads; all
else is done token by token. What is remembered is read by heads likewise. Source: DeepSpeed-Ulysses (arXiv 2309.14509).
Every operation's backward is its adjoint: gradients of all processes' losses add up, however much of them is the same.

Legend: B batch, F latent frames, n tokens per latent frame, m = n / P, P processes, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch import distributed as dist

from slotmemory.backbones.attention import Buffered, Dense, Pattern, Rows

FIELDS = ("keys", "values", "hidden", "text_query", "query")


class _Exchange(torch.autograd.Function):
    """Send part p of the first axis to process p."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        got = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(got, x.contiguous(), group=group)
        return got

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None


class _Gather(torch.autograd.Function):
    """Put the processes' tensors one after another on a new first axis."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


def gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Stack what all processes of a group have, in their order, [P, ...]; each one's gradients reach its owner."""
    return _Gather.apply(x, group)


class Ulysses:
    """One process's part of the tokens of a pass, in a group that makes the same pass."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.known: WeakKeyDictionary[Any, Pattern] = WeakKeyDictionary()

    def divides(self, tokens: int, heads: int) -> bool:
        """Whether a latent frame's tokens, and the heads, come out even; else every process runs all of them."""
        return tokens % self.size == 0 and heads % self.size == 0

    def mine(self, x: Tensor, axis: int) -> Tensor:
        """This process's part of an axis."""
        return x.chunk(self.size, axis)[self.rank]

    def turn(self, turn: tuple[Tensor, Tensor], frames: int) -> tuple[Tensor, Tensor]:
        """This process's rotations, of [B or 1, F n, D/2]."""
        cos, sin = (self.mine(x.unflatten(1, (frames, -1)), 2).flatten(1, 2) for x in turn)
        return cos, sin

    def joined(self, x: Tensor) -> Tensor:
        """All tokens [B, F, n, ...] of everyone's parts [B, F, m, ...]."""
        return gather(x, self.group).movedim(0, 2).flatten(2, 3)

    def pattern(self, pattern: Pattern, frames: int) -> Pattern:
        """A pattern for this process's tokens that attends as the given one does for all."""
        return _Parted(self, pattern, frames)

    def by_heads(self, pattern: Pattern) -> Pattern | None:
        """A pattern for this process's heads; None where only the pattern itself knows how heads meet."""
        if type(pattern) in (Dense, Rows):
            return pattern
        if type(pattern) is not Buffered:
            return None
        if pattern not in self.known:
            self.known[pattern] = Buffered([tuple(self.mine(x, 2) for x in pair) for pair in pattern.context])
        return self.known[pattern]

    def to_heads(self, x: Tensor) -> Tensor:
        """[..., B, F, m, H, D] -> [..., B, F, n, H / P, D]."""
        got = _Exchange.apply(x.unflatten(-2, (self.size, -1)).movedim(-3, 0), self.group)
        return got.movedim(0, -4).flatten(-4, -3)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, F, n, H / P, D] -> [B, F, m, H, D]."""
        got = _Exchange.apply(x.unflatten(-3, (self.size, -1)).movedim(-4, 0), self.group)
        return got.movedim(0, -3).flatten(-3, -2)


class _Parted:
    """A pattern called with a part of the tokens: query, key and value [B, F m, H, D]."""

    def __init__(self, ulysses: Ulysses, pattern: Pattern, frames: int):
        self.ulysses, self.pattern, self.frames = ulysses, pattern, frames
        self.heads = ulysses.by_heads(pattern)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        u = self.ulysses
        query, key, value, hidden = (x.unflatten(1, (self.frames, -1)) for x in (query, key, value, hidden))
        if self.heads is None:
            every = (u.joined(x).flatten(1, 2) for x in (query, key, value, hidden))
            mixed = self.pattern(layer, *every).unflatten(1, (self.frames, -1))
            return u.mine(mixed, 2).flatten(1, 2)
        query, key, value = u.to_heads(torch.stack((query, key, value))).flatten(2, 3)
        mixed = self.heads(layer, query, key, value, None)
        return u.to_tokens(mixed.unflatten(1, (self.frames, -1))).flatten(1, 2)


class Gathered:
    """What a layer saw (`causal_wan.Seen`) of all tokens, each of its fields gathered when it is first asked for.

    All processes must ask alike."""

    def __init__(self, ulysses: Ulysses, seen: Any, frames: int):
        self._ulysses, self._seen, self._frames = ulysses, seen, frames

    def __getattr__(self, name: str) -> Tensor:
        if name not in FIELDS:
            raise AttributeError(name)
        part = getattr(self._seen, name).unflatten(1, (self._frames, -1))
        vars(self)[name] = self._ulysses.joined(part).flatten(1, 2)
        return vars(self)[name]

    def _replace(self, **changes: Tensor) -> Any:
        return type(self._seen)(**{**{name: getattr(self, name) for name in FIELDS}, **changes})
