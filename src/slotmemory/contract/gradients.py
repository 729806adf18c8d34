"""The check of gradients: a memory's parameters learn, its past does not."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slotmemory.backbones.causal_wan import Seen
from slotmemory.contract.trials import Trial, Watched, demand


def passes_gradients_to_its_parameters_only(trial: Trial) -> None:
    """Every trainable parameter gets a gradient, by losses, state or attention; what is read carries none to earlier chunks."""
    memory = trial.memory().requires_grad_(True)
    leaves: list[Tensor] = []
    shown: list[Any] = []  # what was read, and what attention inside the policy made of it
    made: list[Tensor] = []  # tokens handed to the model
    patterns: list[Any] = []

    def around(call, method, given):
        with torch.enable_grad():
            if call == "write":
                state, written = given
                layers = [Seen(*(x.detach().clone().requires_grad_() for x in seen)) for seen in written.layers]
                leaves.extend(x for seen in layers for x in (seen.keys, seen.values))
                pattern = patterns[-1] or written.pattern
                given = state, replace(written, layers=layers, pattern=pattern)
            found = method(*given)
        if call == "read":
            shown.extend(found)
        if call == "prefix" and found[1] is not None:
            made.append(found[1].tokens)
        if call == "attend":
            patterns.append(found)
            return found and watched(found)
        return found

    def watched(pattern):
        def attended(*given):
            with torch.enable_grad():
                shown.append(pattern(*given))
            return shown[-1].detach()

        return attended

    session = trial.session(Watched(memory, around))
    try:
        for _ in range(min(3, trial.chunks)):
            session.step()
        with torch.enable_grad():
            read = sum((total(part) for part in shown), torch.zeros(()))
            kept = sum(memory.losses(session.state).values(), torch.zeros(())) + total(session.state) + total(made)
        if read.requires_grad:
            reached = torch.autograd.grad(read, leaves, retain_graph=True, allow_unused=True)
            told = f"{trial.name} lets a chunk's gradient reach the keys of earlier chunks"
            demand(all(g is None for g in reached), told)
        names, parameters = zip(*memory.named_parameters()) if list(memory.parameters()) else ((), ())
        if parameters:
            demand((read + kept).requires_grad, f"{trial.name} has parameters, but nothing it makes depends on them")
            gradients = torch.autograd.grad(read + kept, parameters, allow_unused=True)
            lost = [n for n, g in zip(names, gradients) if g is None]
            demand(not lost, f"{trial.name} has parameters that no gradient reaches: {', '.join(lost[:3])}")
            wild = [n for n, g in zip(names, gradients) if not bool(g.isfinite().all())]
            demand(not wild, f"{trial.name} has parameters whose gradient is not finite: {', '.join(wild[:3])}")
    except RuntimeError as error:
        raise AssertionError(f"{trial.name} cannot be differentiated: {error}") from error


def total(tree: Any) -> Tensor:
    """Sum all finite numbers of a tree that carry a gradient (scores may say -inf)."""
    if isinstance(tree, Tensor):
        return tree[tree.isfinite()].float().sum() if tree.requires_grad else torch.zeros(())
    if is_dataclass(tree):
        tree = vars(tree)
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum((total(child) for child in children), torch.zeros(()))
