"""What a run keeps between steps, and how it is written and found again.

Whole weights are kept in `checkpoint/last.pt`, sharded ones in the folder `checkpoint/last`, to which every process writes
its share and which any number of processes reads (torch.distributed.checkpoint). Either run takes up the other's.
`previous` is the checkpoint before; a crash at any moment leaves a whole one behind.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from slotmemory.codecs.base import check_tensors, read_tensors
from slotmemory.errors import InputError
from slotmemory.training.objective import Context, Objective
from slotmemory.training.parallel import load, local, part_of, spread, whole

log = logging.getLogger(__name__)

REST = "rest.pt"  # what of a sharded checkpoint is no tensor of the run


class Kept:
    """Weights, their averages, momenta and counters of one process; process 0 writes what is whole."""

    folder: Path
    rank: int
    context: Context
    name: str  # of the objective
    objective: Objective
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]
    sharded: bool
    step: int
    minutes: float
    refused: Exception | None = None

    # writing

    def save(self) -> None:
        """Write checkpoint and exports; sharded, all processes must come here."""
        folder = self.folder / "checkpoint"
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ("partial" if self.sharded else "partial.pt")
        counted = {"step": self.step, "minutes": self.minutes, "objective": self.objective.state()}
        if self.sharded:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            dcp.save(self._tensors(), checkpoint_id=partial)
        else:
            state = {
                **counted,
                "weights": {name: module.state_dict() for name, module in self.modules.items()},
                "ema": self.ema,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            }
            _write(state, partial)
        with self._together():
            if self.rank == 0:
                if self.sharded:
                    _write(counted, partial / REST)
                _rotate(partial)
        self.export()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Put off what the disk refuses process 0 until all processes are through with what takes all of them."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if not self.sharded or _refusal(error) is None:
                raise
            self.refused = error

    def try_to_save(self) -> bool:
        """Save unless the disk refuses, which is said; the checkpoint before stays -> whether it was saved."""
        try:
            self.save()
            return True
        except (OSError, RuntimeError, CheckpointException) as error:
            cause = _refusal(error)
            if cause is None:
                raise
            if self.rank == 0:
                for partial in (*self.folder.glob("checkpoint/partial.pt"), *self.folder.glob("weights/*.partial")):
                    partial.unlink(missing_ok=True)
                shutil.rmtree(self.folder / "checkpoint" / "partial", ignore_errors=True)
                complaint = InputError.from_os("write", self.folder / "checkpoint", cause)
                log.warning("%s; training goes on from memory, the last checkpoint stays", complaint)
            return False

    def export(self) -> None:
        """Write every module's trained and averaged weights as safetensors; sharded, all processes must come here."""
        folder = self.folder / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in self.modules.items():
            metadata = {**self.objective.metadata(name), "step": str(self.step), "objective": self.name}
            raw = {key: tensor.detach() for key, tensor in module.state_dict().items()}
            averaged = {key: self.ema.get(f"{name}.{key}", tensor) for key, tensor in raw.items()}
            for tensors, file in ((raw, f"{name}.safetensors"), (averaged, f"{name}.ema.safetensors")):
                gathered = {}
                for key, tensor in tensors.items():
                    tensor = whole(tensor)
                    if self.rank == 0:  # on a device there may be no room for all of them
                        gathered[key] = tensor.cpu() if self.sharded else tensor
                with self._together():
                    if self.rank == 0:
                        tensors = self.objective.exported(name, gathered)
                        content = to_bytes({key: t.cpu().contiguous() for key, t in tensors.items()}, metadata=metadata)
                        partial = folder / f"{file}.partial"
                        partial.write_bytes(content)
                        os.replace(partial, folder / file)
        refused, self.refused = self.refused, None
        if refused is not None:
            raise refused

    # reading

    def restore(self) -> bool:
        """Take up the last whole checkpoint -> whether there was one."""
        folder = self.folder / "checkpoint"
        paths = found(folder)
        for path in paths:
            try:
                state = _read(path, self.context.device)
            except Exception as error:  # torch raises many kinds for a damaged file; the next one is tried
                log.warning("%s cannot be read (%s); trying the one before", path, " ".join(str(error).split())[:120])
                continue
            if path.is_dir():
                self._take_shares(state["saved"], path)
            else:
                self._take_whole(state, path)
            self.step, self.minutes = state["step"], state["minutes"]
            if state.get("objective") is not None and self.context.rank == 0:
                self.objective.resume(state["objective"])
            return True
        if paths:
            raise InputError(f"no checkpoint in {folder} can be read; delete the folder to start anew")
        return False

    def _take_whole(self, state: dict[str, Any], path: Path) -> None:
        for name, module in self.modules.items():
            check_tensors(state["weights"].get(name, {}), module.state_dict(), path)
            load(module, state["weights"][name])
        check_tensors(state["ema"], self.ema, path)
        with torch.no_grad():
            for key, tensor in self.ema.items():
                local(tensor).copy_(part_of(state["ema"][key], tensor))
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            fresh = [dict(group) for group in optimizer.param_groups]
            members = _members(optimizer)
            for number, moments in saved["state"].items():
                like = getattr(members[number], "parameter", members[number])
                for key, value in moments.items():
                    if value.shape == like.shape:
                        moments[key] = part_of(value, like)
            try:
                optimizer.load_state_dict(saved)
            except ValueError as error:
                raise InputError(f"{path} was trained with other optimizer groups ({error}); use init") from None
            # The recipe of now holds, not the one the checkpoint was made with.
            for group, new in zip(optimizer.param_groups, fresh):
                group.update({key: value for key, value in new.items() if key != "params"})

    def _take_shares(self, saved: dict[str, Tensor], path: Path) -> None:
        """saved: every tensor of the checkpoint by name, as shapes."""
        expected = {name: tensor for name, tensor in self._tensors().items() if not name.startswith("optimizer.")}
        check_tensors({name: t for name, t in saved.items() if not name.startswith("optimizer.")}, expected, path)
        for name, parameter in self._optimized().items():
            for key, shape in ((k.rpartition(".")[2], t) for k, t in saved.items() if _moment_of(k) == name):
                like = getattr(parameter, "parameter", parameter)
                whole_moment = shape.shape == like.shape
                moment = torch.zeros_like(local(like)) if whole_moment else torch.zeros(shape.shape, dtype=shape.dtype)
                self._optimizer_of(parameter).state[parameter][key] = moment.detach()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads what many wrote
            dcp.load(self._tensors(), checkpoint_id=path, no_dist=not dist.is_initialized())

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
            load(module, tensors)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                self.ema[key].copy_(parameter)

    # names

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run by name: weights, averages and momenta, those in shares named as such."""
        found = {
            f"weights.{name}.{key}": tensor.detach()
            for name, module in self.modules.items()
            for key, tensor in module.state_dict().items()
        }
        found |= {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        for name, parameter in self._optimized().items():
            like = getattr(parameter, "parameter", parameter)
            for key, value in self._optimizer_of(parameter).state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = spread(value, like)
        return found

    def _optimized(self) -> dict[str, Tensor]:
        """What the optimisers move, by the name of its parameter."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        members = (member for optimizer in self.optimizers for member in _members(optimizer))
        return {names[id(getattr(member, "parameter", member))]: member for member in members}

    def _optimizer_of(self, parameter: Tensor) -> torch.optim.Optimizer:
        return next(o for o in self.optimizers if any(parameter is member for member in _members(o)))


def found(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder `checkpoint`, the last one first."""
    paths = [folder / f"{name}{kind}" for name in ("last", "previous") for kind in (".pt", "")]
    return [path for path in paths if path.exists()]


def _members(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _moment_of(name: str) -> str | None:
    """The parameter whose momentum a tensor's name means."""
    return name.removeprefix("optimizer.").rpartition(".")[0] if name.startswith("optimizer.") else None


def _write(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint: as it was written, or what of a sharded one is no tensor, and its tensors as shapes."""
    if not path.is_dir():
        return torch.load(path, map_location=device, weights_only=True)
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    saved = {
        name: torch.empty(about.size, dtype=about.properties.dtype, device="meta") for name, about in metadata.items()
    }
    return {**torch.load(path / REST, map_location=device, weights_only=True), "saved": saved}


def _rotate(partial: Path) -> None:
    """Make a whole new checkpoint the last one, and what was the last one the previous."""
    folder, last = partial.parent, partial.with_name("last" + partial.suffix)
    for old in (folder / "last.pt", folder / "last"):
        if not old.exists():
            continue
        if old == last and last.is_file():  # `last` is there at every moment
            link = folder / "link.pt"
            link.unlink(missing_ok=True)
            os.link(last, link)
            os.replace(link, folder / "previous.pt")
            continue
        (folder / "previous.pt").unlink(missing_ok=True)
        shutil.rmtree(folder / "previous", ignore_errors=True)
        os.replace(old, folder / f"previous{old.suffix}")
    os.replace(partial, last)


def _refusal(error: BaseException) -> OSError | None:
    """The disk's complaint behind an error of writing a checkpoint; None where there is none."""
    if isinstance(error, CheckpointException):
        return next((wrapped[0] for wrapped in error.failures.values() if isinstance(wrapped[0], OSError)), None)
    cause = error if isinstance(error, OSError) else error.__context__
    if isinstance(cause, OSError):
        return cause
    return OSError(errno.ENOSPC, "") if "PytorchStreamWriter" in str(error) else None
