"""Blocks compiled region by region: what comes before and after self-attention, never attention itself.

The two regions (`Block.enter`, `Block.leave`) are compiled once for all blocks, so that starting takes seconds and not
minutes, and memories that act inside attention stay as they are. For every new shape of its input a compiled region's first
result is compared with the region run as it is; one that disagrees, or cannot be compiled, is left out for good, with a
message. Source of the idea: regional compilation, PyTorch recipes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slotmemory.backbones.causal_wan import Block, CausalWan

logger = logging.getLogger(__name__)

REGIONS = ("enter", "leave")
# how far a row may be off, of its length: what rounding once or after every operation changes
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


class Region:
    """A part of a block, compiled as long as that can be done and computes the same."""

    def __init__(self, name: str, compiled: Callable, plain: Callable):
        """compiled, plain: the same method of a block, called with the block first."""
        self.name, self.compiled, self.plain = name, compiled, plain
        self.dropped = False
        self._seen: set[tuple] = set()

    def __call__(self, block: Block, *given: Any) -> Any:
        if self.dropped or torch.is_grad_enabled():  # training runs what it differentiates
            return self.plain(block, *given)
        shape = tuple((x.shape, x.dtype, x.device) for x in tree_leaves(given) if isinstance(x, Tensor))
        if shape not in self._seen:
            return self._first(shape, block, *given)
        return self.compiled(block, *given)

    def _first(self, shape: tuple, block: Block, *given: Any) -> Any:
        expected = self.plain(block, *given)
        try:
            made = self.compiled(block, *given)
        except Exception as error:  # noqa: BLE001 - compilers fail in ways of their own
            return self._drop(f"cannot be compiled here ({_said(error)})", expected)
        off = deviation(made, expected)
        limit = TOLERANCE.get(expected[0].dtype, 1e-3)
        if not off <= limit:  # NaN is no more than nothing, and so wrong
            return self._drop(f"compiled is off by {off:.1e} of its length (limit {limit:.0e})", expected)
        self._seen.add(shape)
        return made

    def _drop(self, why: str, result: Any) -> Any:
        self.dropped = True
        logger.warning("the region '%s' of the blocks %s; it runs as it is", self.name, why)
        return result


def compile_blocks(model: CausalWan, compiler: Callable[[Callable], Callable] = torch.compile) -> list[Region]:
    """Compile the blocks of a model in place, at their first call; returns the regions, which know what became of them."""
    regions = [Region(name, compiler(getattr(Block, name)), getattr(Block, name)) for name in REGIONS]
    for block in model.blocks:
        for region in regions:
            setattr(block, region.name, partial(region, block))
    return regions


def deviation(made: Any, expected: Any) -> float:
    """The largest distance between rows (the last dimension) of two trees of tensors, as a share of the row's length; rows
    shorter than the mean count as that long."""
    worst = torch.zeros(())
    for a, b in zip(tree_leaves(made), tree_leaves(expected), strict=True):
        length = b.float().norm(dim=-1)
        off = (a.float() - b.float()).norm(dim=-1) / length.clamp(min=float(length.mean()) + 1e-12)
        worst = (
            torch.maximum(worst, off.max().cpu()) if not bool(off.isnan().any()) else off.new_tensor(torch.nan).cpu()
        )
    return float(worst)


def _said(error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:160]}" if first else type(error).__name__
