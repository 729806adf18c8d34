"""From slots to entities: duplicates become one slot, and a slot that returns takes the identity it had.

Answers limits that SlotMemory (arXiv 2605.31033) 4.4 states, without new parameters: merging and aggregating anew follow
the idea of SOLV (arXiv 2310.06907) and DIAS (arXiv 2507.23755), births, deaths and re-identification are ours. It knows
vectors and numbers; which slots are seen, and what a bank holds, it is told. Decisions carry no gradient.

Shapes: B any number of leading axes, S slots, N tokens, C slot width, K known vectors.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.slots.attention import Grouping
from slotmemory.slots.measure import mass
from slotmemory.slots.precision import full_precision


class Merged(NamedTuple):
    """A grouping without its duplicates; a slot that joined another keeps its vector and holds no tokens."""

    slots: Tensor  # [B, S, C]
    assignment: Tensor  # [B, S, N], each column sums to 1
    alive: Tensor  # [B, S] bool


@full_precision
def merge(slots: Tensor, assignment: Tensor, threshold: float) -> Merged:
    """Pool the tokens of slots [B, S, C] more alike (cosine) than the threshold; assignment [B, S, N].

    Slots come heaviest first, and each joins the most similar of those before it or stands for itself, so that nothing
    joins a slot that it is not like. The merged vector is the mean of its members, weighted by mass."""
    held = mass(assignment)
    with torch.no_grad():
        member = F.one_hot(_joins(slots, held, threshold), slots.shape[-2]).mT.to(slots.dtype)  # [B, S, members]
    alive = member.any(-1)
    weight = member * held.unsqueeze(-2)
    means = weight @ slots / weight.sum(-1, keepdim=True).clamp_min(1e-12)
    alone = (member.sum(-1, keepdim=True) > 1).logical_not()  # a slot without duplicates stays as it is, to the bit
    return Merged(torch.where(alone, slots, means), member @ assignment, alive)


def _joins(slots: Tensor, held: Tensor, threshold: float) -> Tensor:
    """Which slot each one joins, itself if none: [B, S] int64."""
    alike = F.normalize(slots, dim=-1)
    alike = alike @ alike.mT
    order = held.argsort(dim=-1, descending=True, stable=True)
    joins = torch.arange(slots.shape[-2], device=slots.device).expand(held.shape).clone()
    standing = torch.zeros_like(held, dtype=torch.bool)
    for slot in order.unbind(-1):
        slot = slot.unsqueeze(-1)  # [B, 1]
        row = alike.take_along_dim(slot.unsqueeze(-1), -2)[..., 0, :].masked_fill(~standing, -2)
        best, other = row.max(-1, keepdim=True)
        joined = best > threshold
        joins = joins.scatter(-1, slot, torch.where(joined, other, slot))
        standing = standing.scatter(-1, slot, ~joined)
    return joins


@torch.no_grad()
@full_precision
def identify(
    slots: Tensor,
    active: Tensor,
    threshold: float,
    births: Tensor,
    earlier: tuple[Tensor, Tensor] | None = None,
    bank: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Name the entities that slots [B, S, C] stand for, B one axis: identities [B, S] from 0, -1 where not active [B, S].

    An active slot that is still like itself (cosine above the threshold with its `earlier` vector) keeps its identity.
    The others take that of the most similar vector of bank or chunk before whose identity nobody has, the best pair
    first; who is like none is born with the next number of births [B], which is returned as well.
    earlier, bank: vectors [B, S or M, C] and their identities [B, S or M], below 0 for nobody's.
    """
    names = torch.full(active.shape, -1, dtype=torch.long, device=slots.device)
    known = [pair for pair in (bank, earlier) if pair is not None and pair[1].shape[1]]
    unit = F.normalize(slots, dim=-1)
    if earlier is not None:
        same = (unit * F.normalize(earlier[0], dim=-1)).sum(-1) > threshold
        names = torch.where(active & same, earlier[1], names)  # -1 where it was not there
    if known:
        vectors, owners = (torch.cat(parts, 1) for parts in zip(*known))
        alike = unit @ F.normalize(vectors, dim=-1).mT  # [B, S, K]
        taken = (owners[:, None] == names[..., None]).any(1) | (owners < 0)  # [B, K]
        alike = alike.masked_fill(~(active & (names < 0))[..., None] | taken[:, None], -2)
        for _ in range(slots.shape[1]):
            best, place = alike.flatten(1).max(1, keepdim=True)  # [B, 1]
            slot, found = place // owners.shape[1], owners.gather(1, place % owners.shape[1])
            name = torch.where(best > threshold, found, names.gather(1, slot))
            names = names.scatter(1, slot, name)
            rows = torch.arange(slots.shape[1], device=slots.device) == slot
            alike = alike.masked_fill(rows[..., None] | (owners == found)[:, None], -2)
    born = active & (names < 0)
    names = torch.where(born, births[:, None] + born.cumsum(1) - 1, names)
    return names, births + born.sum(1)


def whole(grouping: Grouping) -> Merged:
    """A grouping whose slots all stand for themselves."""
    return Merged(*grouping, torch.ones(grouping.slots.shape[:-1], dtype=torch.bool, device=grouping.slots.device))
