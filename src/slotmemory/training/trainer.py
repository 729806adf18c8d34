"""One process's part of a run: its objective, its weights, and a step of training.

It knows processes that share a step, and neither when a run ends nor when it is kept or looked at (`loop.py`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from slotmemory.backbones.sequence import Ulysses
from slotmemory.errors import InputError
from slotmemory.training import parallel
from slotmemory.training.checkpoint import Kept
from slotmemory.training.objective import DTYPES, Context, TrainingError, generator_for
from slotmemory.training.optimise import (
    average_decay,
    build_optimizers,
    clip_gradient,
    clip_parts,
    rate_factor,
    squared_norms,
    take_gradient,
)
from slotmemory.training.processes import Place
from slotmemory.training.recipe import Recipe, find_objective


class Trainer(Kept):
    """One process's part of a run; process 0 also writes."""

    def __init__(self, recipe: Recipe, folder: Path, place: Place) -> None:
        self.recipe, self.folder, self.rank = recipe, folder, place.rank
        self.name = recipe.objective
        device = torch.device(recipe.device if recipe.device == "cpu" else f"{recipe.device}:{place.local}")
        degree = recipe.sequence_parallel
        others, self.neighbours = parallel.groups(degree)
        self.sharded = recipe.shard == "fsdp" and recipe.processes > 1
        self.context = Context(
            batch=recipe.samples,
            seed=recipe.seed,
            rank=place.rank // degree,
            processes=recipe.processes // degree,
            device=device,
            dtype=DTYPES[recipe.precision],
            group=others,
            in_step=self.sharded,
        )
        # Modules draw their first weights from the global stream, which is put back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.objective = find_objective(recipe.objective).Objective(recipe.options, self.context)
        self.modules = self.objective.modules()
        for module in self.modules.values():
            module.to(device)
        self._share_networks()
        self.parameters = {
            f"{name}.{key}": parameter
            for name, module in self.modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.shards = [name for name, p in self.parameters.items() if parallel.local(p) is not p]
        self.optimizers = build_optimizers(self.objective, self.parameters, recipe)
        groups = self.objective.parameter_groups()
        self.clips = [(group["clip"], group["names"]) for group in groups if "clip" in group]
        self.ema = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        self.step = 0
        self.minutes = 0.0

    def _share_networks(self) -> None:
        """Share weights and tokens among processes, as the recipe says."""
        networks = self.objective.networks()
        asked = [key for key in ("shard", "sequence_parallel") if getattr(self.recipe, key) not in ("none", 1)]
        if asked and not networks:
            raise InputError(f"objective {self.name} trains no transformer to share; leave {' and '.join(asked)} out")
        if self.neighbours is not None:
            for network in networks:
                network.sequence = Ulysses(self.neighbours)
        if self.sharded:
            mesh = init_device_mesh(self.context.device.type, (self.recipe.processes,))
            for network in networks:
                parallel.shard(network, self.context.dtype, mesh)

    # -- one step ------------------------------------------------------------------------------------------------

    def advance(
        self, minutes: Callable[[], float], stopped: threading.Event, due: Callable[[], bool]
    ) -> tuple[dict[str, float], bool, bool]:
        """Take one step -> what to log, whether process 0 wants to stop, whether it wants a checkpoint.

        `minutes`, `stopped` and `due` (a checkpoint, by the clock) count on process 0 only."""
        values, blame = self._learn()
        processes = self.recipe.processes
        lead = float(self.rank == 0) * processes
        signals = torch.tensor([minutes(), float(stopped.is_set()), float(due())]) * lead
        running, trained = self.objective.running(), self.objective.trains(self.step)
        inside = None if trained is None else tuple(f"{name}." for name in trained)
        parameters = {k: p for k, p in self.parameters.items() if inside is None or k.startswith(inside)}
        gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in parameters.items()}
        # gradients of shards are averages already; of those only the norms are to be added up
        shards = {k: parallel.local(gradients.pop(k)) for k in self.shards if k in parameters}
        parts = clip_parts(list(parameters), self.clips, self.recipe.optimizer.clip)
        squares = squared_norms(parts, shards) * processes
        tensors = [*gradients.values(), *running, *values.values(), signals, squares]
        flat = torch.cat([part.reshape(-1).to(self.context.device, torch.float32) for part in tensors])
        if processes > 1:
            dist.all_reduce(flat)
            flat /= processes
        pieces = iter(flat.split([part.numel() for part in tensors]))
        gradients = {name: next(pieces) for name in gradients}
        for statistic in running:
            statistic.copy_(next(pieces).view_as(statistic))
        logged = {name: float(next(pieces)) for name in values}
        self.minutes, wants_stop, wants_checkpoint = next(pieces).tolist()
        squares = next(pieces).tolist()

        size = sum(piece.numel() for piece in gradients.values())
        norm = math.hypot(float(flat[:size].norm()), sum(squares) ** 0.5)
        for name, value in {**dict(sorted(logged.items(), key=lambda x: x[0] == "loss")), "gradient": norm}.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"{name} is {value} in step {self.step + 1}{f' ({blame})' if blame else ''}; stopped before its "
                    f"optimizer step, the last checkpoint in {self.folder} is untouched"
                )
        clip_gradient(gradients, parts, shards, squares)
        for name, parameter in self.parameters.items():
            if (
                name not in parameters
            ):  # a weight without a gradient is left alone; one of zeros is moved by its momentum
                parameter.grad = None
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in gradients:
                parameter.grad.copy_(gradients[name].view_as(parameter))

        factor = rate_factor(self.recipe, self.step, self.minutes)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
                for member in group["params"]:
                    take_gradient(member)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None
        decay = average_decay(self.recipe, self.step)
        with torch.no_grad():
            averages = [parallel.local(self.ema[name]) for name in parameters]
            torch._foreach_lerp_(averages, [parallel.local(p) for p in parameters.values()], 1.0 - decay)
        self.step += 1
        return {**logged, "rate": factor, "gradient": norm}, wants_stop > 0.5, wants_checkpoint > 0.5

    def _learn(self) -> tuple[dict[str, Tensor], str]:
        """Add up the gradients of a step -> its losses by name, and the batch to name if one of them is not finite.

        The calls that are accumulated draw and number their samples as so many processes would."""
        count, noted, blame = self.recipe.accumulate, {}, None
        for part in range(count):
            number = self.context.rank * count + part
            generator = generator_for(self.recipe.seed, self.step, number)
            loss, terms = self.objective.loss(self.step, number, generator)
            (loss if count == 1 else loss / count).backward()
            for name, value in {"loss": loss, **{name: terms[name] for name in sorted(terms)}}.items():
                noted.setdefault(name, []).append(value.detach())
            if count == 1 or (blame is None and not bool(torch.isfinite(loss))):
                blame = self.objective.about()
        return {name: each[0] if count == 1 else torch.stack(each).mean() for name, each in noted.items()}, blame or ""

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run with the averaged weights in place of the trained ones."""
        kept = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(self.ema[key])
            try:
                yield
            finally:
                for key, parameter in self.parameters.items():
                    parameter.copy_(kept[key])

    def synchronise(self) -> None:
        """Give every process the whole weights of process 0; shares were cut from weights that all had alike."""
        if self.recipe.processes > 1:
            with torch.no_grad():
                for module in self.modules.values():
                    for tensor in module.state_dict().values():
                        if parallel.local(tensor) is not tensor:
                            continue
                        whole = tensor.contiguous()
                        dist.broadcast(whole, 0)
                        tensor.copy_(whole)
            for key, parameter in self.parameters.items():
                if self.step == 0:
                    self.ema[key].copy_(parameter.detach())
