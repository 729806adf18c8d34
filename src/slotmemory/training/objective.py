"""What the training loop asks of an objective, and what it offers to one: where it runs, its random streams, casting.

The loop (`loop.py`) knows no objective, and an objective no loop; names are offered by `loop` as well.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from slotmemory.training.parallel import sharded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stays as it was."""


@dataclass(frozen=True)
class Context:
    """Where an objective runs.

    rank counts the processes that hold samples of their own, of which there are `processes`; those that share the tokens
    of the same samples (`sequence_parallel`) have the same rank. `batch` counts the samples of one call of `loss`: a step
    has batch * accumulate of every rank. group: the processes among which what is learnt from other samples is gathered.
    in_step: all processes must make the same passes of the same networks, as these are sharded."""

    batch: int
    seed: int = 0
    rank: int = 0
    processes: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    group: dist.ProcessGroup | None = None
    in_step: bool = False

    def agreed(self, number: int) -> int:
        """A number that decides which passes follow: process 0's where all must make the same, else as given."""
        if not self.in_step or not dist.is_initialized():
            return number
        told = torch.tensor([number], device=self.device)
        dist.broadcast(told, 0)
        return int(told)

    def agreed_all(self, fact: bool) -> bool:
        """Whether something that decides which passes follow is so for all processes; as `agreed` otherwise."""
        if not self.in_step or not dist.is_initialized():
            return fact
        told = torch.tensor([int(fact)], device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MIN)
        return bool(told)


class Objective(ABC):
    """One training stage. A file `training/<name>.py` defines `Options` and `Objective(options, context)`."""

    # modules that only help to train the others: weights to start from may lack them
    auxiliary: frozenset[str] = frozenset()

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Name the modules that are trained, in fp32; their names are the names of the exported files."""

    def networks(self) -> list[nn.Module]:
        """List the transformers, with `blocks`, that may be sharded among processes or share their tokens with others.

        They are called as modules or by `cast_call`; trained ones are among `modules` too."""
        return []

    @abstractmethod
    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss over the samples of one call, and scalars to log.

        With `accumulate` a step calls it several times, as if for so many ranks: sample i has number rank * batch + i."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Pick weights for treatment of their own: [{"names": [...], "optimizer": "adamw" | "muon", "scale": 1.0}].

        Names are "<module>.<parameter>"; weights not named get Muon if they are matrices, else AdamW. A group with a
        "clip" has its gradient clipped by its own norm, apart from the others."""
        return []

    def trains(self, step: int) -> frozenset[str] | None:
        """Name the modules, or parts of them, that a step trains (None: all).

        The others keep weights, momenta and average. A part is "<module>.<submodule>"."""
        return None

    def about(self) -> str:
        """Say which batch the last loss was of, for a complaint about it."""
        return ""

    def state(self) -> dict[str, Any] | None:
        """Return what outlives a step beside weights, as a plain tree of tensors, numbers and text; None: nothing.

        Kept in the checkpoint and given back by `resume` on rank 0; the other ranks start it anew."""
        return None

    def resume(self, state: dict[str, Any]) -> None:  # noqa: B027 (may stay empty)
        """Go on from what `state` returned when the checkpoint was written; called once the weights are back."""

    def running(self) -> list[Tensor]:
        """List running statistics that the loop averages over the ranks after every step."""
        return []

    def validate(self, step: int) -> dict[str, float]:
        """Measure on held-out data; runs on rank 0 (sharded: on all) with the averaged weights."""
        return {}

    def sample(self, step: int, folder: Path) -> None:  # noqa: B027 (may stay empty)
        """Write pictures into `folder`; runs on rank 0 (sharded: on all) with the averaged weights."""

    def finish(self) -> None:  # noqa: B027
        """Do what is due before the last export; runs on rank 0 (sharded: on all) with the averaged weights."""

    def metadata(self, module: str) -> dict[str, str]:
        """Return what the exported file of `module` says about itself."""
        return {}

    def exported(self, module: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a module's weights into what its exported file shall hold."""
        return tensors


class _Bound(nn.Module):
    """A module whose forward is one method of another, so that functional_call can run any method."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module = module
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.module, self.method)(*args, **kwargs)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Cast the fp32 parameters of `module` to `dtype` by name; gradients arrive at the fp32 ones."""
    return {
        name: parameter.to(dtype) if parameter.is_floating_point() else parameter
        for name, parameter in module.named_parameters()
    }


def call_with(module: nn.Module, weights: Mapping[str, Tensor], *args: Any, method: str = "forward", **kwargs: Any):
    """Call a method of `module` with other tensors in place of its parameters."""
    named = {f"module.{name}": tensor for name, tensor in weights.items()}
    return torch.func.functional_call(_Bound(module, method), named, args, kwargs)


def cast_call(module: nn.Module, dtype: torch.dtype, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
    """Call a method of `module` with its fp32 parameters cast to `dtype`; gradients arrive at the fp32 ones.

    Buffers keep their dtype; the caller casts the inputs. A sharded module casts what it gathers by itself."""
    if sharded(module):
        return getattr(module, "__call__" if method == "forward" else method)(*args, **kwargs)
    return call_with(module, cast_weights(module, dtype), *args, method=method, **kwargs)


def generator_for(seed: int, step: int, rank: int) -> torch.Generator:
    """Return the random stream of one rank in one step."""
    return torch.Generator().manual_seed(seed_for(seed, step, rank))


def seed_for(*numbers: int) -> int:
    """Mix numbers into a seed of 62 bits; nearby numbers give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
