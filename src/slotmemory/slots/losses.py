"""The losses that train slots: stay the same entity over time, and stand for the tokens that chose you.

They know neither the generator's loss nor its weight beside theirs. SlotMemory (arXiv 2605.31033) eq. 8-10,
SlotContrast (arXiv 2412.14295). All are a mean over the leading axes (layers, steps).
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.slots.measure import present
from slotmemory.slots.precision import full_precision

Direction = Literal["row", "col", "sym"]


@full_precision
def contrast(
    earlier: Tensor,
    later: Tensor,
    *,
    tau: float = 0.1,
    direction: Direction = "row",
    weight: Tensor | None = None,
    negatives: Tensor | None = None,
    detach_earlier: bool = False,
) -> Tensor:
    """Pull a slot to itself in the next chunk and away from the N - 1 others: [..., N, C] twice -> [].

    N counts all slots contrasted together: flatten batch and slots to take negatives from the whole batch.
    M = u w^T / tau; "row" asks each earlier slot for its later one (SlotMemory eq. 8), "col" the reverse
    (SlotContrast), "sym" is their mean. weight [..., N] >= 0 scales each pair; a pair of weight 0 is neither anchor nor
    negative (see `pair_weight`). negatives [..., M, C] are further slots to keep away from; detached if old.
    """
    if earlier.shape != later.shape:
        raise ValueError(f"earlier {list(earlier.shape)} and later {list(later.shape)}: expected the same shape")
    if direction not in ("row", "col", "sym"):
        raise ValueError(f"direction={direction!r}: expected 'row', 'col' or 'sym'")
    if not tau > 0:
        raise ValueError(f"tau={tau}: expected a temperature above 0 such as 0.1")
    u = F.normalize(earlier.detach() if detach_earlier else earlier, dim=-1)
    w = F.normalize(later, dim=-1)
    weight = u.new_ones(u.shape[:-1]) if weight is None else weight.to(u.dtype).expand(u.shape[:-1])
    others = None if negatives is None else F.normalize(negatives.to(u.dtype), dim=-1)
    if direction == "row":
        return _pick_partner(u, w, tau, weight, others)
    if direction == "col":
        return _pick_partner(w, u, tau, weight, others)
    return (_pick_partner(u, w, tau, weight, others) + _pick_partner(w, u, tau, weight, others)) / 2


def _pick_partner(anchors: Tensor, candidates: Tensor, tau: float, weight: Tensor, others: Tensor | None) -> Tensor:
    logits = anchors @ candidates.mT / tau
    # An anchor always sees its own partner, so that a row of dropped pairs has a finite loss to multiply by 0.
    partner = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(~((weight > 0).unsqueeze(-2) | partner), -torch.inf)
    positive = logits.diagonal(dim1=-2, dim2=-1)
    if others is not None:
        logits = torch.cat([logits, anchors @ others.mT / tau], dim=-1)
    losses = weight * (logits.logsumexp(dim=-1) - positive)
    # Divide by the number of pairs, not by their weights: weighting all pairs down must weigh the loss down.
    return (losses.sum(dim=-1) / (weight > 0).sum(dim=-1).clamp_min(1)).mean()


def pair_weight(earlier_mass: Tensor, later_mass: Tensor) -> Tensor:
    """1 where a slot is present in both chunks, 0 where it was or became empty: mass [..., S] twice -> [..., S]."""
    return (present(earlier_mass) & present(later_mass)).float()


@full_precision
def reconstruction(
    slots: Tensor,
    assignment: Tensor,
    tokens: Tensor,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    threshold: float = 0.5,
    eps: float = 1e-6,
) -> Tensor:
    """Each confident token should look like its slot: 1 - cosine, straight-through top-1 (SlotMemory eq. 9-10) -> [].

    slots [..., S, C], assignment [..., S, N], tokens [..., N, C] (the target, no gradient); decode maps slots to token
    space, None is the identity. A token counts if its winner's weight exceeds `threshold`; without any the loss is 0.
    An untrained grouper is nowhere above 0.5: log `measure.coverage` and raise the threshold slowly from 1 / S + 0.1.
    """
    values = slots if decode is None else decode(slots)
    confidence, winner = assignment.max(dim=-2)
    hard = F.one_hot(winner, assignment.shape[-2]).mT.to(assignment.dtype)
    # Forward exactly `hard`, as the bracket is 0; backward the soft assignment, so that every slot's logits learn.
    routed = hard + (assignment - assignment.detach())
    predicted = routed.mT @ values
    cosine = (F.normalize(predicted, dim=-1, eps=1e-6) * F.normalize(tokens.detach(), dim=-1, eps=1e-6)).sum(dim=-1)
    counted = (confidence > threshold).to(cosine.dtype)
    return ((counted * (1 - cosine)).sum(dim=-1) / (counted.sum(dim=-1) + eps)).mean()


@full_precision
def feature_error(decoded: Tensor, assignment: Tensor, features: Tensor) -> Tensor:
    """Mean squared error of features [..., N, W] told by slots: assignment [..., S, N] and decoded [..., S, W] -> [].

    A token's features, brought to mean 0 and deviation 1, should be the mixture of what its slots say, as in SlotContrast
    and DINOSAUR (arXiv 2209.14860). The target is fixed, so slots cannot make it easier, as they can with tokens that
    pass through an adapter of their own: that is what `reconstruction` allows."""
    target = F.layer_norm(features.detach().to(decoded.dtype), features.shape[-1:])
    return (assignment.mT @ decoded - target).square().mean()
