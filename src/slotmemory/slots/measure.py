"""How well an assignment uses its slots; small numbers to log beside every loss.

It needs no ground truth and therefore says nothing about objects (see evaluation for that).
assignment [..., S, N], each column sums to 1; all measures are fp32 and keep the leading axes.
"""

import math

from torch import Tensor

from slotmemory.slots.precision import full_precision


@full_precision
def mass(assignment: Tensor) -> Tensor:
    """Share of the tokens that each slot holds: [..., S, N] -> [..., S], sums to 1."""
    return assignment.mean(dim=-1)


@full_precision
def present(mass: Tensor) -> Tensor:
    """Whether a slot holds at least a quarter of an even share, 1 / (4 S): [..., S] -> bool [..., S].

    Below that its update is nearly the mean of all tokens, so it must be neither contrasted nor stored as an entity.
    """
    return mass >= 1 / (4 * mass.shape[-1])


def usage_entropy(assignment: Tensor) -> Tensor:
    """[..., S, N] -> [...]: 1 if all slots hold the same mass, 0 if one holds everything; aim for 0.6 to 0.95."""
    m = mass(assignment)
    # A single slot has no choice: its entropy is 0, not 0 / 0.
    return -m.xlogy(m).sum(dim=-1) / math.log(max(m.shape[-1], 2))


def dead_share(assignment: Tensor) -> Tensor:
    """[..., S, N] -> [...]: share of the slots that are not present."""
    m = mass(assignment)
    return (~present(m)).to(m.dtype).mean(dim=-1)


@full_precision
def sharpness(assignment: Tensor) -> Tensor:
    """[..., S, N] -> [...]: mean weight of a token's winning slot, from 1 / S (undecided) to 1."""
    return assignment.amax(dim=-2).mean(dim=-1)


@full_precision
def coverage(assignment: Tensor, threshold: float = 0.5) -> Tensor:
    """[..., S, N] -> [...]: share of the tokens whose winner exceeds the threshold, all the reconstruction sees."""
    return (assignment.amax(dim=-2) > threshold).to(assignment.dtype).mean(dim=-1)
