"""What slots are asked to learn from one chunk to the next, and small numbers that say how they do.

It puts the losses of `losses.py` on what a memory saw of a chunk; which weights they reach is the trainer's choice.
SlotMemory (arXiv 2605.31033) eq. 7-10; what the paper leaves open is a field of `Learning`.

Shapes: L layers, B rows, S slots, N tokens, C slot width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slotmemory.slots import measure
from slotmemory.slots.losses import Direction, contrast, feature_error, pair_weight, reconstruction


@dataclass(frozen=True)
class Learning:
    """How slots learn; `reconstruct` is the paper's stage II.

    tau: temperature of the contrast; direction: "row" asks earlier slots for later ones (eq. 8), "col" the reverse
    (SlotContrast), "sym" both; across: weight of a pair that a prompt switch parts; detach_earlier: cut the earlier
    chunk's slots; alpha, threshold: weight of the reconstruction and the confidence above which a token counts in it;
    negatives [L, M, C]: slots of other streams to keep away from; gather: lays what all processes have [L, N, ...] side
    by side [L, P N, ...], with gradients, so that the streams of all are contrasted together; decode, features: what makes
    features [L, B, S, W] of slots, and the weight of their error, which is beyond the paper.
    """

    reconstruct: bool = False
    tau: float = 0.1
    direction: Direction = "row"
    across: float = 0.25
    detach_earlier: bool = False
    alpha: float = 1.0
    threshold: float = 0.5
    negatives: Tensor | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    features: float = 0.0


@dataclass(frozen=True)
class Lesson:
    """One chunk: tokens [L, B, N, C], bound to slots [L, B, S, C] by assignment [L, B, S, N]; earlier: the slots of the
    chunk before and their mass [L, B, S], None in a stream's first chunk; switched: the chunk has a new prompt; hidden: the
    features [B, N, W] of every layer that tokens were made of, where they are to be told."""

    slots: Tensor
    assignment: Tensor
    tokens: Tensor
    earlier: Tensor | None
    earlier_mass: Tensor | None
    switched: bool
    hidden: Sequence[Tensor] | None = None

    @property
    def mass(self) -> Tensor:
        return measure.mass(self.assignment)


def losses(lesson: Lesson, how: Learning) -> dict[str, Tensor]:
    """The terms of L_slot (eq. 7), each a mean over layers; slots of all rows are contrasted together."""
    found = {}
    if lesson.earlier is not None:
        weight = pair_weight(lesson.earlier_mass, lesson.mass.detach()) * (how.across if lesson.switched else 1.0)
        earlier, later, weight = (x.flatten(1, 2) for x in (lesson.earlier, lesson.slots, weight))
        if how.gather is not None:
            earlier, later, weight = how.gather(earlier), how.gather(later), how.gather(weight)
        found["slot_contrast"] = contrast(
            earlier,
            later,
            tau=how.tau,
            direction=how.direction,
            weight=weight,
            negatives=how.negatives,
            detach_earlier=how.detach_earlier,
        )
    if how.reconstruct:
        found["slot_reconstruction"] = how.alpha * reconstruction(
            lesson.slots, lesson.assignment, lesson.tokens, threshold=how.threshold
        )
    if how.decode is not None and lesson.hidden is not None:
        error = feature_error(how.decode(lesson.slots), lesson.assignment, torch.stack([*lesson.hidden]))
        found["slot_features"] = how.features * error
    return found


@torch.no_grad()
def measures(lesson: Lesson, how: Learning) -> dict[str, Tensor]:
    """Coverage of the reconstruction, sharpness, usage, dead slots, effective rank of the tokens, and the contrast left
    once the mean of each slot number is removed: it tells identity from a mere index (slots.md, section 6)."""
    assignment = lesson.assignment
    found = {
        "slot_coverage": measure.coverage(assignment, how.threshold).mean(),
        "slot_sharpness": measure.sharpness(assignment).mean(),
        "slot_usage": measure.usage_entropy(assignment).mean(),
        "slot_dead": measure.dead_share(assignment).mean(),
        "slot_rank": effective_rank(lesson.tokens),
    }
    if lesson.earlier is not None and how.negatives is not None and how.negatives.shape[1]:
        slots = lesson.slots.shape[2]
        index_means = how.negatives.unflatten(1, (-1, slots)).mean(1)[:, None]  # [L, 1, S, C]
        found["slot_centred"] = contrast(
            (lesson.earlier - index_means).flatten(1, 2), (lesson.slots - index_means).flatten(1, 2), tau=how.tau
        )
    return found


def effective_rank(tokens: Tensor) -> Tensor:
    """Exponential of the entropy of the normalised singular values, mean over layers: tokens [L, B, N, C] -> []."""
    values = torch.linalg.svdvals(tokens.flatten(1, 2).float())
    share = values / values.sum(-1, keepdim=True).clamp_min(1e-12)
    return (-share.xlogy(share).sum(-1)).exp().mean()
