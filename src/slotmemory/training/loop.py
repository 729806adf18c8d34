"""The training loop: one for every objective.

An objective says what to train and what the loss of a step is; the loop does the rest: optimisers, schedules, averaging
over processes, weight averaging (EMA), checkpoints, logs, clean stops. It does not know what is being learnt.

A run folder holds recipe.yaml, log.jsonl, tensorboard/, checkpoint/{last,previous}.pt, samples/ and
weights/<module>[.ema].safetensors.
Every random draw of step s on rank r comes from (seed, s, r), so a resumed run repeats the uninterrupted one bitwise.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from slotmemory.codecs.base import check_tensors, read_tensors
from slotmemory.errors import InputError
from slotmemory.training.journal import Journal, Watch
from slotmemory.training.recipe import Recipe, dump_recipe, find_objective, load_recipe

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RETRY = 30.0  # seconds after which a checkpoint is tried again that the disk refused
PATIENCE = timedelta(hours=2)  # how long a rank waits for another, e.g. for rank 0 to validate


class TrainingError(RuntimeError):
    """Training cannot go on; the last checkpoint stays as it was."""


@dataclass(frozen=True)
class Context:
    """Where an objective runs. `batch` counts this rank's samples; sample i of a step is number rank * batch + i."""

    batch: int
    seed: int = 0
    rank: int = 0
    processes: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


class Objective(ABC):
    """One training stage. A file `training/<name>.py` defines `Options` and `Objective(options, context)`."""

    # modules that only help to train the others: weights to start from may lack them
    auxiliary: frozenset[str] = frozenset()

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Name the modules that are trained, in fp32; their names are the names of the exported files."""

    @abstractmethod
    def loss(self, step: int, rank: int, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss over this rank's samples of a step, and scalars to log."""

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
        """Measure on held-out data; runs on rank 0 with the averaged weights."""
        return {}

    def sample(self, step: int, folder: Path) -> None:  # noqa: B027 (may stay empty)
        """Write pictures into `folder`; runs on rank 0 with the averaged weights."""

    def finish(self) -> None:  # noqa: B027
        """Do what is due before the last export; runs on rank 0 with the averaged weights."""

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

    Buffers keep their dtype; the caller casts the inputs."""
    return call_with(module, cast_weights(module, dtype), *args, method=method, **kwargs)


def generator_for(seed: int, step: int, rank: int) -> torch.Generator:
    """Return the random stream of one rank in one step."""
    return torch.Generator().manual_seed(seed_for(seed, step, rank))


def seed_for(*numbers: int) -> int:
    """Mix numbers into a seed of 62 bits; nearby numbers give unrelated seeds."""
    digest = hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


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


def clip_gradient(pieces: Mapping[str, Tensor], own: list[tuple[float, list[str]]], limit: float) -> None:
    """Scale gradients in place to norms of at most `limit`; groups in `own` (limit, names) by their own norm."""
    left = dict(pieces)
    parts = [(most, [left.pop(name) for name in names if name in left]) for most, names in own]
    for most, part in (*parts, (limit, list(left.values()))):
        if part:
            norm = torch.stack([piece.norm() for piece in part]).norm()
            torch._foreach_mul_(part, min(1.0, most / max(float(norm), 1e-12)))


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
            optimizers.append(
                torch.optim.AdamW(chosen, betas=settings.betas, weight_decay=settings.weight_decay, foreach=True)
            )
        else:
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


class _Trainer:
    """One rank's half of a run; rank 0 also writes."""

    def __init__(self, recipe: Recipe, folder: Path, rank: int) -> None:
        self.recipe, self.folder, self.rank = recipe, folder, rank
        device = torch.device(recipe.device if recipe.device == "cpu" else f"{recipe.device}:{rank}")
        self.context = Context(
            batch=recipe.batch // recipe.processes,
            seed=recipe.seed,
            rank=rank,
            processes=recipe.processes,
            device=device,
            dtype=DTYPES[recipe.precision],
        )
        # Modules draw their first weights from the global stream, which is put back afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.objective = find_objective(recipe.objective).Objective(recipe.options, self.context)
        self.modules = self.objective.modules()
        for module in self.modules.values():
            module.to(device)
        self.parameters = {
            f"{name}.{key}": parameter
            for name, module in self.modules.items()
            for key, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.optimizers = build_optimizers(self.objective, self.parameters, recipe)
        groups = self.objective.parameter_groups()
        self.clips = [(group["clip"], group["names"]) for group in groups if "clip" in group]
        self.ema = {key: parameter.detach().clone() for key, parameter in self.parameters.items()}
        self.step = 0
        self.minutes = 0.0

    # -- one step ------------------------------------------------------------------------------------------------

    def advance(self, minutes: Callable[[], float], stopped: threading.Event) -> tuple[dict[str, float], bool]:
        """Take one step; `minutes` and `stopped` count on rank 0 only -> what to log, whether rank 0 wants to stop."""
        generator = generator_for(self.recipe.seed, self.step, self.rank)
        loss, terms = self.objective.loss(self.step, self.rank, generator)
        loss.backward()
        names = ["loss", *sorted(terms)]
        values = [loss.detach(), *(terms[name].detach() for name in names[1:])]
        lead = float(self.rank == 0) * self.recipe.processes
        signals = torch.tensor([minutes() * lead, float(stopped.is_set()) * lead])
        running, trained = self.objective.running(), self.objective.trains(self.step)
        inside = None if trained is None else tuple(f"{name}." for name in trained)
        parameters = {k: p for k, p in self.parameters.items() if inside is None or k.startswith(inside)}
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
        size = sum(part.numel() for part in parts)
        parts += [*running, *values, signals]
        flat = torch.cat([part.reshape(-1).to(self.context.device, torch.float32) for part in parts])
        if self.recipe.processes > 1:
            dist.all_reduce(flat)
            flat /= self.recipe.processes
        pieces = iter(flat[size:].split([part.numel() for part in parts[len(parameters) :]]))
        for statistic in running:
            statistic.copy_(next(pieces).view_as(statistic))
        logged = {name: float(next(pieces)) for name in names}
        self.minutes, wants_stop = next(pieces).tolist()

        gradient = flat[:size]
        norm = float(gradient.norm())
        for name, value in {**dict(sorted(logged.items(), key=lambda x: x[0] == "loss")), "gradient": norm}.items():
            if not math.isfinite(value):
                batch = self.objective.about()
                raise TrainingError(
                    f"{name} is {value} in step {self.step + 1}{f' ({batch})' if batch else ''}; stopped before its "
                    f"optimizer step, the last checkpoint in {self.folder} is untouched"
                )
        pieces = dict(zip(parameters, gradient.split([p.numel() for p in parameters.values()])))
        if self.clips:
            clip_gradient(pieces, self.clips, self.recipe.optimizer.clip)
        else:
            gradient.mul_(min(1.0, self.recipe.optimizer.clip / max(norm, 1e-12)))
        for name, parameter in self.parameters.items():
            if name not in pieces:  # a weight without a gradient is left alone; one of zeros is moved by its momentum
                parameter.grad = None
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.copy_(pieces[name].view_as(parameter))

        factor = rate_factor(self.recipe, self.step, self.minutes)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * factor
                for matrix in group["params"]:
                    if hasattr(matrix, "parameter"):
                        grad = matrix.parameter.grad
                        matrix.grad = None if grad is None else grad.permute(0, 2, 3, 1).flatten(1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            parameter.grad = None
        decay = average_decay(self.recipe, self.step)
        with torch.no_grad():
            torch._foreach_lerp_([self.ema[name] for name in parameters], list(parameters.values()), 1.0 - decay)
        self.step += 1
        return {**logged, "rate": factor, "gradient": norm}, wants_stop > 0.5

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

    # -- what is kept --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write checkpoint and exports; a crash at any moment leaves a whole checkpoint behind."""
        folder = self.folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        partial, last, previous = (folder / name for name in ("partial.pt", "last.pt", "previous.pt"))
        state = {
            "step": self.step,
            "minutes": self.minutes,
            "weights": {name: module.state_dict() for name, module in self.modules.items()},
            "ema": self.ema,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "objective": self.objective.state(),
        }
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            link = folder / "link.pt"
            link.unlink(missing_ok=True)
            os.link(last, link)
            os.replace(link, previous)
        os.replace(partial, last)
        self.export()

    def try_to_save(self) -> bool:
        """Save unless the disk refuses, which is said; the checkpoint before stays -> whether it was saved."""
        try:
            self.save()
            return True
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError) and "PytorchStreamWriter" not in str(error):
                raise
            for partial in (*self.folder.glob("checkpoint/partial.pt"), *self.folder.glob("weights/*.partial")):
                partial.unlink(missing_ok=True)
            why = cause if isinstance(cause, OSError) else OSError(errno.ENOSPC, "")
            complaint = InputError.from_os("write", self.folder / "checkpoint", why)
            log.warning("%s; training goes on from memory, the last checkpoint stays", complaint)
            return False

    def export(self) -> None:
        """Write every module's trained and averaged weights as safetensors."""
        folder = self.folder / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in self.modules.items():
            metadata = {**self.objective.metadata(name), "step": str(self.step), "objective": self.recipe.objective}
            raw = {key: tensor.detach() for key, tensor in module.state_dict().items()}
            averaged = {key: self.ema.get(f"{name}.{key}", tensor) for key, tensor in raw.items()}
            for tensors, file in ((raw, f"{name}.safetensors"), (averaged, f"{name}.ema.safetensors")):
                tensors = self.objective.exported(name, tensors)
                content = to_bytes({key: t.cpu().contiguous() for key, t in tensors.items()}, metadata=metadata)
                partial = folder / f"{file}.partial"
                partial.write_bytes(content)
                os.replace(partial, folder / file)

    def restore(self) -> bool:
        """Take up the last whole checkpoint -> whether there was one."""
        folder = self.folder / "checkpoint"
        paths = [path for path in (folder / "last.pt", folder / "previous.pt") if path.exists()]
        for path in paths:
            try:
                state = torch.load(path, map_location=self.context.device, weights_only=True)
            except Exception as error:  # torch raises many kinds for a damaged file; the next one is tried
                log.warning("%s cannot be read (%s); trying the one before", path, " ".join(str(error).split())[:120])
                continue
            for name, module in self.modules.items():
                check_tensors(state["weights"].get(name, {}), module.state_dict(), path)
                module.load_state_dict(state["weights"][name])
            check_tensors(state["ema"], self.ema, path)
            with torch.no_grad():
                for key, tensor in self.ema.items():
                    tensor.copy_(state["ema"][key])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                fresh = [dict(group) for group in optimizer.param_groups]
                try:
                    optimizer.load_state_dict(saved)
                except ValueError as error:
                    raise InputError(f"{path} was trained with other optimizer groups ({error}); use init") from None
                # The recipe of now holds, not the one the checkpoint was made with.
                for group, new in zip(optimizer.param_groups, fresh):
                    group.update({key: value for key, value in new.items() if key != "params"})
            self.step, self.minutes = state["step"], state["minutes"]
            if state.get("objective") is not None and self.rank == 0:
                self.objective.resume(state["objective"])
            return True
        if paths:
            raise InputError(f"no checkpoint in {folder} can be read; delete the folder to start anew")
        return False

    def initialise(self, source: Path) -> None:
        """Start from exported weights: a run folder or, for a single module, a file."""
        for name, module in self.modules.items():
            if source.is_dir():
                places = [source / "weights", source]
                names = [f"{name}.ema.safetensors", f"{name}.safetensors"]
                found = [place / file for place in places for file in names if (place / file).is_file()]
                if not found and name in self.objective.auxiliary:
                    continue
                if not found:
                    raise InputError(f"init: {source} holds no weights of {name!r}; expected {places[0] / names[0]}")
                path = found[0]
            elif len(self.modules) > 1:
                raise InputError(f"init: {source} is one file but {sorted(self.modules)} are trained; give a folder")
            else:
                path = source
            tensors, _ = read_tensors(path)
            check_tensors(tensors, module.state_dict(), path)
            module.load_state_dict(tensors)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                self.ema[key].copy_(parameter)

    def synchronise(self) -> None:
        """Give every rank rank 0's weights."""
        if self.recipe.processes > 1:
            with torch.no_grad():
                for module in self.modules.values():
                    for tensor in module.state_dict().values():
                        whole = tensor.contiguous()
                        dist.broadcast(whole, 0)
                        tensor.copy_(whole)
            for key, parameter in self.parameters.items():
                if self.step == 0:
                    self.ema[key].copy_(parameter.detach())


def _run(
    recipe: Recipe, folder: Path, rank: int, resume: bool, stopped: threading.Event, watch: Watch | None = None
) -> str:
    """Train on one rank until done -> why it ended: steps, minutes or signal."""
    trainer = _Trainer(recipe, folder, rank)
    if not (resume and trainer.restore()) and recipe.init:
        trainer.initialise(Path(recipe.init))
    trainer.synchronise()
    journal = Journal(folder, recipe.steps, recipe.max_minutes, recipe.print_seconds, watch) if rank == 0 else None
    if rank == 0:
        journal.trim(trainer.step)
        count = sum(parameter.numel() for parameter in trainer.parameters.values())
        log.info(
            "%s: %s from step %d of %d, %.2f M weights, %d process(es) of %d thread(s), %s",
            folder, recipe.objective, trainer.step, recipe.steps, count / 1e6, recipe.processes, recipe.threads,
            recipe.precision,
        )  # fmt: skip
    before, started = trainer.minutes, time.monotonic()
    saved, reason = started, "steps"

    def minutes() -> float:
        return before + (time.monotonic() - started) / 60

    def measure() -> None:
        nonlocal measured
        if measured == trainer.step:
            return
        measured = trainer.step
        with trainer.averaged():
            if due(recipe.validate_steps):
                results = {key: float(value) for key, value in trainer.objective.validate(trainer.step).items()}
                if results:
                    journal.measured(trainer.step, results)
            if due(recipe.sample_steps):
                samples = folder / "samples" / f"{trainer.step:07d}"
                try:
                    samples.mkdir(parents=True, exist_ok=True)
                    trainer.objective.sample(trainer.step, samples)
                except OSError as error:
                    log.warning("%s; no samples of step %d", InputError.from_os("write", samples, error), trainer.step)

    def due(interval: int) -> bool:
        return trainer.step % interval == 0 or ending

    ending, measured = False, -1
    try:
        while trainer.step < recipe.steps:
            if recipe.max_minutes is not None and trainer.minutes >= recipe.max_minutes:
                reason = "minutes"
                break
            begun = time.monotonic()
            record, wants_stop = trainer.advance(minutes, stopped)
            if rank == 0:
                now = time.monotonic()
                pace = 1 / (now - begun)
                journal.step({"step": trainer.step, **record, "minutes": minutes(), "steps_per_second": pace})
                if due(recipe.validate_steps) or due(recipe.sample_steps):
                    measure()
                by_steps = recipe.checkpoint_steps and trainer.step % recipe.checkpoint_steps == 0
                if by_steps or now - saved >= recipe.checkpoint_minutes * 60:
                    kept = trainer.try_to_save()
                    saved = time.monotonic() if kept else now - recipe.checkpoint_minutes * 60 + RETRY
            if wants_stop:
                reason = "signal"
                break
        if rank == 0:
            trainer.minutes = minutes()
            if reason != "signal":
                ending = True
                measure()
                with trainer.averaged():
                    trainer.objective.finish()
            if not trainer.try_to_save():
                raise TrainingError(f"the last checkpoint in {folder} is not of step {trainer.step}; free some space")
            log.info("%s: stopped by %s at step %d, %.1f min", folder, reason, trainer.step, trainer.minutes)
    finally:
        if journal is not None:
            journal.close()
    return reason


@contextmanager
def _caught_signals(stopped: threading.Event) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into a request to stop after the present step; a second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        log.info("%s: stopping after this step", signal.Signals(number).name)
        stopped.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)


def _join(recipe: Recipe, rank: int, store: str) -> None:
    """Take one thread budget and meet the other ranks."""
    torch.set_num_threads(recipe.threads)
    if recipe.processes > 1:
        backend = "gloo" if recipe.device == "cpu" else "nccl"
        dist.init_process_group(
            backend, store=dist.FileStore(store, recipe.processes), rank=rank, world_size=recipe.processes,
            timeout=PATIENCE,
        )  # fmt: skip


def _worker(rank: int, recipe_path: str, folder: str, resume: bool, store: str) -> None:
    """Run a rank other than 0. Rank 0 alone answers signals; if it dies, the broken connection ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    recipe = load_recipe(recipe_path)
    _join(recipe, rank, store)
    try:
        _run(recipe, Path(folder), rank, resume, threading.Event())
    except TrainingError:
        return  # rank 0 found the same and tells
    finally:
        dist.destroy_process_group()


def train(recipe: Recipe, run_folder: str | Path, resume: bool = True, watch: Watch | None = None) -> str:
    """Train as the recipe says, in and from `run_folder` -> why it ended: "steps", "minutes" or "signal".

    resume=False refuses a folder that holds a checkpoint already. watch: told every step, see `journal.Watch`."""
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not resume and (folder / "checkpoint" / "last.pt").exists():
        raise InputError(f"{folder} holds a run already; resume it or choose another folder")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"commit": _commit(), "torch": torch.__version__}), encoding="utf-8")

    stopped = threading.Event()
    meeting = tempfile.mkdtemp(prefix="slotmemory-")
    store = str(Path(meeting) / "store")
    threads = torch.get_num_threads()
    spawn = multiprocessing.get_context("spawn")
    arguments = (str(folder / "recipe.yaml"), str(folder), resume, store)
    workers = [spawn.Process(target=_worker, args=(rank, *arguments)) for rank in range(1, recipe.processes)]
    try:
        with _caught_signals(stopped):
            for worker in workers:
                worker.start()
            _join(recipe, 0, store)
            try:
                reason = _run(recipe, folder, 0, resume, stopped, watch)
            except RuntimeError as error:
                dead = [rank for rank, worker in enumerate(workers, 1) if worker.exitcode]
                if dead:
                    raise TrainingError(f"process {dead[0]} failed; its own message stands above") from error
                raise
            for worker in workers:
                worker.join()
        return reason
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(threads)
        shutil.rmtree(meeting, ignore_errors=True)


def _commit() -> str | None:
    """Name the git commit of this source tree, if it is one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
