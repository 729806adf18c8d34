"""Choose the R tokens that represent each slot, from the assignment alone.

It knows no keys or values of the video model: it returns token indices to gather by. SlotMemory (arXiv 2605.31033) 3.3
takes a plain top-R, in which slots share tokens and empty slots steal them; the exclusive form is ours.

Shapes: S slots, N tokens, R tokens per slot, F latent frames; leading axes are independent rows.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from slotmemory.slots.measure import mass, present
from slotmemory.slots.precision import full_precision


class Selection(NamedTuple):
    """Which tokens stand for each slot, and how far to trust them."""

    indices: Tensor  # [..., S, R] int64, ascending
    owned: Tensor  # [..., S, R] bool, False for a token whose winner is another slot (a top-up)
    mass: Tensor  # [..., S] share of ALL tokens of the chunk, also if only its first frame is stored

    @property
    def empty(self) -> Tensor:
        """[..., S] bool: mass < 1 / (4 S); its tokens fill a fixed shape and stand for nothing."""
        return ~present(self.mass)


@torch.no_grad()
@full_precision
def select(
    assignment: Tensor,
    count: int,
    *,
    exclusive: bool = True,
    latents: int = 1,
    frames: Literal["balanced", "first"] | None = None,
    spread: float = 0.0,
    keys: Tensor | None = None,
) -> Selection:
    """Choose `count` tokens per slot: assignment [..., S, N] -> indices [..., S, R]. Ties go to the lower token index.

    exclusive: a slot chooses among the tokens it wins and is topped up with the best that no slot chose, heavier slots
    first, so that no token serves two slots. False: plain top-R.
    frames: the N tokens are `latents` frames in order; "balanced" lets frames take turns, one token each, as long as
    they have any of the slot (64 of 3 frames: 22, 21, 21), "first" uses the first frame only, None ignores frames.
    spread: share of the count chosen by farthest point in `keys` [..., N, C] within the slot, after the others; keeps
    small attributes that the heaviest, much alike tokens leave out. It steps once per chosen token, the rest does not.
    """
    num_slots, num_tokens = assignment.shape[-2:]
    _check(assignment, count, exclusive, latents, frames, spread, keys)
    chunk_mass = mass(assignment)
    if frames == "first":
        num_tokens //= latents
        assignment, keys = assignment[..., :num_tokens], None if keys is None else keys[..., :num_tokens, :]
    rows = assignment.shape[:-2]
    weights = assignment.reshape(-1, num_slots, num_tokens)

    winner = weights.argmax(dim=-2, keepdim=True)
    own = winner == torch.arange(num_slots, device=weights.device)[:, None]
    eligible = own if exclusive else torch.ones_like(own)
    order = _in_turns(weights, eligible, latents if frames == "balanced" else 1)
    num_far = min(round(count * spread), count - 1)  # the first token is always chosen by weight
    taken = _take(order[..., : count - num_far], eligible)
    if num_far:
        taken = _farthest(taken, eligible, keys.reshape(-1, num_tokens, keys.shape[-1]), count - num_far, num_far)
    if exclusive:
        taken = _top_up(taken, weights, chunk_mass.reshape(-1, num_slots), count)

    # A stable sort of the marks lists marked tokens in ascending order; nonzero() would wait for the device.
    indices = (~taken).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]
    shape = (*rows, num_slots, count)
    return Selection(indices.reshape(shape), own.gather(-1, indices).reshape(shape), chunk_mass)


def _rank(weights: Tensor) -> Tensor:
    """Place of each entry along the last axis, 0 for the heaviest; equal weights by index."""
    return weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _in_turns(weights: Tensor, eligible: Tensor, num_frames: int) -> Tensor:
    """Token order [B, S, N]: eligible first, then the best of each frame, then the second best of each frame ..."""
    per_frame = weights.masked_fill(~eligible, -torch.inf).unflatten(-1, (num_frames, -1))
    turn = _rank(per_frame) * num_frames + torch.arange(num_frames, device=weights.device)[:, None]
    return (turn.flatten(-2) + ~eligible * weights.shape[-1]).argsort(dim=-1)


def _take(order: Tensor, eligible: Tensor) -> Tensor:
    return torch.zeros_like(eligible).scatter(-1, order, eligible.gather(-1, order))


def _farthest(taken: Tensor, eligible: Tensor, keys: Tensor, num_near: int, num_far: int) -> Tensor:
    """Beside at most num_near marked tokens per slot, mark num_far more: each time the one farthest from all marked."""
    keys = keys - keys.mean(dim=-2, keepdim=True)  # a shared offset would cancel in the squares and cost digits
    square = keys.square().sum(dim=-1).unsqueeze(-2)  # [B, 1, N]

    def squared_distance(index: Tensor) -> Tensor:  # [B, S] -> [B, S, N]
        point = keys.take_along_dim(index.unsqueeze(-1), dim=-2)
        return (square + point.square().sum(dim=-1, keepdim=True) - 2 * point @ keys.mT).clamp_min(0)

    nearest = torch.full(taken.shape, torch.inf, dtype=keys.dtype, device=keys.device)
    for index in (~taken).to(torch.uint8).argsort(dim=-1, stable=True)[..., :num_near].unbind(-1):
        marked = taken.gather(-1, index.unsqueeze(-1))
        nearest = torch.where(marked, torch.minimum(nearest, squared_distance(index)), nearest)
    for _ in range(num_far):
        free = eligible & ~taken
        index = nearest.masked_fill(~free, -1).argmax(dim=-1)
        mark = index.unsqueeze(-1)
        taken = taken.scatter(-1, mark, taken.gather(-1, mark) | free.gather(-1, mark))
        nearest = torch.minimum(nearest, squared_distance(index))
    return taken


def _top_up(taken: Tensor, weights: Tensor, mass: Tensor, count: int) -> Tensor:
    """Give each slot its best tokens that no slot has, until it has `count`."""
    row = torch.arange(taken.shape[0], device=taken.device)
    names = torch.arange(taken.shape[1], device=taken.device)
    # By mass rather than by index, so that renaming the slots does not change what each of them gets.
    for slot in mass.argsort(dim=-1, descending=True, stable=True).unbind(-1):
        free = ~taken.any(dim=-2)
        need = count - taken[row, slot].sum(dim=-1, keepdim=True)
        rank = _rank(weights[row, slot].masked_fill(~free, -torch.inf))
        given = free & (rank < need)
        taken = taken | (given.unsqueeze(-2) & (names == slot[:, None]).unsqueeze(-1))
    return taken


def _check(
    assignment: Tensor,
    count: int,
    exclusive: bool,
    latents: int,
    frames: str | None,
    spread: float,
    keys: Tensor | None,
) -> None:
    num_slots, num_tokens = assignment.shape[-2:]
    if frames not in (None, "balanced", "first"):
        raise ValueError(f"frames={frames!r}: expected 'balanced', 'first' or None")
    if latents < 1 or num_tokens % latents:
        raise ValueError(f"{num_tokens} tokens are not a multiple of latents={latents}; give the frames of a chunk")
    if not 0 <= spread <= 1:
        raise ValueError(f"spread={spread}: expected a share between 0 and 1 such as 0.5")
    expected = (*assignment.shape[:-2], num_tokens)
    if spread and (keys is None or keys.shape[:-1] != expected):
        given = "none" if keys is None else list(keys.shape)
        raise ValueError(f"spread={spread} measures distances between keys: expected {[*expected, 'C']}, given {given}")
    available = num_tokens // latents if frames == "first" else num_tokens
    most = available // num_slots if exclusive else available
    if not 1 <= count <= most:
        whose = f"{num_slots} slots that share none" if exclusive else "each slot"
        raise ValueError(f"count={count}: expected 1 to {most}, as there are {available} tokens for {whose}")
