"""How weights are moved: learning rates over a run, clipped gradients, AdamW and Muon, weight averages.

It knows a recipe and the groups an objective names, no loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from slotmemory.errors import InputError
from slotmemory.training.objective import Objective, TrainingError
from slotmemory.training.recipe import Recipe


def rate_factor(recipe: Recipe, step: int, minutes: float) -> float:
    """Share of the learning rate at `step` (from 0): warm-up, constant, linear decay to 0 over the last fraction.

    A function of the present recipe alone, so that a run resumed with more steps goes on at its constant rate."""
    optimizer = recipe.optimizer
    warm = min(1.0, (step + 1) / (optimizer.warmup + 1))
    if optimizer.decay_by == "minutes":
        left = 1.0 - minutes / recipe.max_minutes
    else:
        left = 1.0 - step / max(1, recipe.steps)
    return warm * (min(1.0, max(0.0, left / optimizer.decay)) if optimizer.decay else 1.0)


def average_decay(recipe: Recipe, step: int) -> float:
    """Weight of the past in the weight average after `step` (from 0).

    From the first step the average starts short and lengthens, so that first weights do not linger in it; where it
    begins later (`ema_from`), it follows the weights until then."""
    if recipe.ema_from:
        return recipe.ema if step >= recipe.ema_from else 0.0
    return min(recipe.ema, (1 + step) / (10 + step))


Part = tuple[float, list[str]]  # the largest norm of a gradient, and of which parameters


def clip_parts(names: Sequence[str], own: Sequence[Part], limit: float) -> list[Part]:
    """Divide the parameters of a step into those that are clipped together: groups of their own, then all others."""
    left = dict.fromkeys(names)
    parts = [(most, [name for name in members if name in left]) for most, members in own]
    for _, members in parts:
        for name in members:
            del left[name]
    return [(most, members) for most, members in (*parts, (limit, list(left))) if members]


def clip_gradient(
    pieces: Mapping[str, Tensor],
    parts: Sequence[Part],
    shards: Mapping[str, Tensor] | None = None,
    squares: Sequence[float] = (),
) -> None:
    """Scale the gradients of every part in place to a norm of at most its limit.

    shards: this process's share of further gradients, whose squared norms over all processes are `squares`, per part."""
    shards = shards or {}
    for number, (most, names) in enumerate(parts):
        part = [pieces[name] for name in names if name in pieces]
        norm = float(torch.stack([piece.norm() for piece in part]).norm()) if part else 0.0
        spread = [shards[name] for name in names if name in shards]
        if spread:
            norm = math.hypot(norm, squares[number] ** 0.5)
        torch._foreach_mul_(part + spread, min(1.0, most / max(norm, 1e-12)))


def squared_norms(parts: Sequence[Part], shards: Mapping[str, Tensor]) -> Tensor:
    """The squared norm of this process's share of every part's gradient [parts]."""
    found = torch.zeros(len(parts))
    for number, (_, names) in enumerate(parts):
        spread = [shards[name].norm() for name in names if name in shards]
        if spread:
            found[number] = torch.stack(spread).square().sum()
    return found


def build_optimizers(objective: Objective, parameters: Mapping[str, nn.Parameter], recipe: Recipe):
    """Give every parameter its optimiser -> optimisers; each group keeps its full rate under "rate"."""
    settings = recipe.optimizer
    rates = {"adamw": settings.learning_rate, "muon": settings.muon or settings.learning_rate}
    groups: list[tuple[str, float, list[nn.Parameter]]] = []
    left = dict(parameters)
    for group in objective.parameter_groups():
        missing = [name for name in group["names"] if name not in left]
        if missing:
            raise TrainingError(f"parameter group names {missing[0]!r}, which is no parameter or in a group already")
        kind = group["optimizer"] if settings.muon else "adamw"
        groups.append((kind, group.get("scale", 1.0), [left.pop(name) for name in group["names"]]))
    matrices = [p for p in left.values() if p.ndim == 2 and settings.muon]
    others = [p for p in left.values() if not (p.ndim == 2 and settings.muon)]
    groups += [("muon", 1.0, matrices), ("adamw", 1.0, others)]

    optimizers: list[torch.optim.Optimizer] = []
    for kind in ("adamw", "muon"):
        chosen = [
            {"params": members, "lr": rates[kind] * scale, "rate": rates[kind] * scale}
            for name, scale, members in groups
            if name == kind and members
        ]
        if not chosen:
            continue
        if kind == "adamw":
            for group in chosen:
                group["params"] = [as_share(p) for p in group["params"]]
            optimizers.append(
                torch.optim.AdamW(chosen, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True)
            )
        else:
            if any(isinstance(p, DTensor) for group in chosen for p in group["params"]):
                raise InputError("shard: Muon takes whole matrices; leave optimizer.muon out, or shard: none")
            for group in chosen:
                group["params"] = [as_matrix(p) for p in group["params"]]
            optimizers.append(
                torch.optim.Muon(
                    chosen,
                    momentum=settings.momentum,
                    weight_decay=settings.weight_decay,
                    adjust_lr_fn=settings.muon_adjust,
                )
            )
    return optimizers


def as_matrix(parameter: nn.Parameter) -> Tensor:
    """Return a parameter as Muon takes it: a matrix as it is, a convolution as a view [outputs, everything else].

    The view shares memory with the parameter; `parameter` on it leads back to where gradients arrive."""
    if parameter.ndim == 2:
        return parameter
    matrix = parameter.detach().permute(0, 2, 3, 1).flatten(1)
    if matrix.data_ptr() != parameter.data_ptr():
        raise TrainingError(
            f"a convolution of {tuple(parameter.shape)} is not in channels_last; Muon needs a view of it"
        )
    matrix.parameter = parameter
    return matrix


def as_share(parameter: nn.Parameter) -> Tensor:
    """Return a parameter as AdamW takes it: as it is, or this process's share of a sharded one, as a view of it."""
    if not isinstance(parameter, DTensor):
        return parameter
    share = parameter.detach().to_local()
    share.parameter = parameter
    return share


def take_gradient(view: Tensor) -> None:
    """Give a view of a parameter (`as_matrix`, `as_share`) its gradient; None where the parameter has none."""
    parameter = getattr(view, "parameter", None)
    if parameter is None:
        return
    gradient = parameter.grad
    if gradient is not None:
        whole = not isinstance(gradient, DTensor)
        gradient = gradient.permute(0, 2, 3, 1).flatten(1) if whole else gradient.to_local()
    view.grad = gradient
