"""Calls of a policy, watched while a video is made: whatever breaks the contract is named by policy, chunk and layer.

It knows no policy and no loop. It looks at shapes, versions of tensors and two numbers per bank; that numbers are finite
is asked of the finished latents alone, and only when they are not, of what was read and of how it was attended to.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from slotmemory.backbones.attention import Buffered
from slotmemory.errors import InputError, shorten
from slotmemory.memory import Bank, Memory, Now, Prefix, State, banks

PLAIN = (bool, int, float, str, tuple)
Where = tuple  # (where its parent stands, how to write the step from there, the step); spelled out only in a complaint
Mark = tuple[Where, Any, int]  # where it stands, what stands there, and a tensor's version


class Watch:
    """Wrap a call (or one per layer) of a policy: `with Watch(memory, "write", now, state=state): ...`

    What is given by name must come out as it went in. Whatever the policy raises becomes one InputError that names it.
    """

    def __init__(self, memory: Memory, call: str, now: Now | None, **given: Any):
        """now: None where no chunk is being made."""
        self.memory, self.call, self.now, self.given = memory, call, now, given
        self.layer: int | None = None
        self.before: list[Mark] = []

    def __enter__(self) -> Watch:
        self.before = marks(self.given)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if error is None:
            self.unchanged()
        elif isinstance(error, Exception) and not isinstance(error, InputError):
            raise self.raised(error) from error

    def unchanged(self) -> None:
        """Check that what was given is still what it was when the call began."""
        changed = first_change(self.before, marks(self.given))
        if changed:
            listed = re.search(r"\[(\d+)\]\.", changed)  # banks and what was seen are listed by layer
            self.layer = int(listed[1]) if listed else None
            raise self.wrong(f"changes {changed} in `{self.call}`", "return a new state, edit none")

    def raised(self, error: Exception) -> InputError:
        said = f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}"
        return self.wrong(f"raised {said} in `{self.call}`")

    def wrong(self, what: str, advice: str = "") -> InputError:
        """Name the policy, what it did, and where."""
        where = f" in layer {self.layer}" if self.layer is not None else ""
        advice = f"; {advice}" if advice else ""
        when = f"at chunk {self.now.chunk}" if self.now else "before the first chunk"
        return InputError(f"memory '{self.memory.called()}' {what}{where} {when}{advice}")

    def banks(self, found: Any, batch: int, dtype: torch.dtype) -> list[Bank]:
        """Check what one layer's `read` returned: banks, shapes, dtype, budget."""
        budget = self.memory.budget
        if not isinstance(found, list | tuple) or not all(isinstance(bank, Bank) for bank in found):
            raise self.wrong(f"returned a {type(found).__name__} from `read`", "expected a list of banks")
        for bank in found:
            self._shapes(bank, batch, "read ")
            for name in ("keys", "values"):
                if getattr(bank, name).dtype != dtype:
                    raise self.wrong(f"read {name} in {getattr(bank, name).dtype}", f"the model runs in {dtype}")
        tokens = sum(bank.tokens for bank in found)
        if budget is not None and tokens > budget:
            raise self.wrong(f"read {tokens} tokens", f"its budget is {budget}")
        return list(found)

    def _shapes(self, bank: Bank, batch: int, told: str) -> None:
        layout = self.memory.layout
        if bank.keys.ndim != 5:
            raise self.wrong(f"{told}keys of shape {list(bank.keys.shape)}", "expected [B, M, n, H, D]")
        items = [batch, *bank.keys.shape[1:3]]
        expected = {name: [*items, layout.heads, layout.head_dim] for name in ("keys", "values")}
        expected |= {"positions": [*items, 3]} | dict.fromkeys(("born", "owner", "score"), items[:2])
        for name, shape in expected.items():
            got = list(getattr(bank, name).shape)
            if got != shape:
                raise self.wrong(f"{told}{name} of shape {got}", f"expected {shape}")
        for name, note in bank.notes.items():
            if list(note.shape[:2]) != items[:2]:
                raise self.wrong(f"{told}note '{name}' of shape {list(note.shape)}", f"expected {[*items[:2], '...']}")

    def state(self, found: Any, batch: int) -> State:
        """Check what a call left as the state: a dictionary of what a file can take, and in it one sound bank per layer."""
        if not isinstance(found, dict):
            raise self.wrong(
                f"returned a {type(found).__name__} from `{self.call}`", "expected its state, a dictionary"
            )
        for name, layers in banks(found):
            if len(layers) != self.memory.layout.layers or not all(isinstance(bank, Bank) for bank in layers):
                what = f"left a list of {len(layers)} as '{name}' in `{self.call}`"
                raise self.wrong(what, f"expected a bank for each of {self.memory.layout.layers} layers")
            for self.layer, bank in enumerate(layers):
                self._shapes(bank, batch, f"left in '{name}' in `{self.call}` ")
            self.layer = None
        for where, value, _ in marks({"state": found}):
            if not (value is None or isinstance(value, (Tensor, *PLAIN))):
                what = f"left a {type(value).__name__} as {spelled(where)} in `{self.call}`"
                raise self.wrong(what, "a state is made of banks, tensors, numbers and text")
        return found

    def switched(self, found: Any, batch: int, kept: int) -> tuple[State, int]:
        """Check what `switch` returned; kept: latent frames that there are to be replayed."""
        if not isinstance(found, tuple) or len(found) != 2 or type(found[1]) is not int:
            raise self.wrong(
                f"returned a {type(found).__name__} from `switch`", "expected a state and a number of frames"
            )
        state, replay = found
        if not 0 <= replay <= kept:
            what = f"asks to replay {replay} latent frames in `switch`"
            raise self.wrong(what, f"{kept} are kept, and its `replays` is {self.memory.replays}")
        return self.state(state, batch), replay

    def prefix(self, found: Any, batch: int) -> tuple[State, Prefix | None]:
        """Check what `prefix` returned: tokens in the model's width, and a place for each."""
        if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Prefix | None):
            raise self.wrong(
                f"returned a {type(found).__name__} from `prefix`", "expected a state and a Prefix, or None"
            )
        state, made = found
        if made is not None:
            shape, layout = list(made.tokens.shape), self.memory.layout
            if len(shape) != 3 or [shape[0], shape[2]] != [batch, layout.model_width]:
                what = f"made prefix tokens of shape {shape}"
                raise self.wrong(what, f"expected [{batch}, N, {layout.model_width}]")
            for name in ("positions", "extents"):
                got = getattr(made, name)
                if got is not None and list(got.shape) not in ([1, shape[1], 3], [batch, shape[1], 3]):
                    what = f"made prefix {name} of shape {list(got.shape)}"
                    raise self.wrong(what, f"expected [{batch} or 1, {shape[1]}, 3]")
            if made.sees and len(made.sees) != layout.layers:
                raise self.wrong(f"made a prefix that sees {len(made.sees)} layers", f"the model has {layout.layers}")
        return self.state(state, batch), made

    def pattern(self, found: Any) -> Any:
        """Take what `attend` returned, to be watched as long as the chunk; the engine's own way to attend needs no watch."""
        if found is None or type(found) is Buffered:
            return found
        if not callable(found):
            raise self.wrong(f"returned a {type(found).__name__} from `attend`", "expected a pattern, or None")
        return Attending(self, found)

    def only_past(self, read: Sequence[Sequence[Bank]]) -> None:
        """Check that nothing was born or placed at or after the chunk; a replay may see what it computes again."""
        end = self.now.frame + self.now.frames if self.now.replay else self.now.frame
        layers = [layer for layer, found in enumerate(read) for bank in found if bank.tokens]
        if not layers:
            return
        kept = [bank for found in read for bank in found if bank.tokens]
        latest = [torch.stack((bank.born.max().double(), bank.positions[..., 0].max().double())) for bank in kept]
        for layer, (born, place) in zip(layers, torch.stack(latest).tolist()):  # one wait for all layers
            if max(born, place) >= end:
                self.layer = layer
                what = f"read an item born at frame {born:g}" if born >= end else f"read a key placed at {place:g}"
                raise self.wrong(what, f"the chunk starts at frame {self.now.frame}")
            if not math.isfinite(place):
                self.layer = layer
                raise self.wrong(f"read a key placed at {place:g}", "a place is a number")


class Attending:
    """A policy's own pattern, called by every layer of every pass: what it does wrong is named with the layer."""

    def __init__(self, watch: Watch, pattern: Callable[..., Tensor]):
        self.watch, self.own = watch, pattern
        self.kinds: list[tuple] = []  # shape, dtype and device of what a layer gives it

    def __call__(self, layer: int, *given: Tensor) -> Tensor:
        self.kinds = self.kinds or [(x.shape, x.dtype, x.device) for x in given]
        self.watch.layer = layer
        try:
            made = self.own(layer, *given)
        except InputError:
            raise
        except Exception as error:
            raise self.watch.raised(error) from error
        shape = list(given[0].shape)
        if not isinstance(made, Tensor) or list(made.shape) != shape:
            got = f"shape {list(made.shape)}" if isinstance(made, Tensor) else f"type {type(made).__name__}"
            raise self.watch.wrong(f"attends with a result of {got}", f"expected {shape}")
        return made

    def not_finite_in(self) -> int | None:
        """The first layer in which it makes of ones what is not finite."""
        given = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in self.kinds]
        layers = range(self.watch.memory.layout.layers if given else 0)
        return next((layer for layer in layers if not bool(self(layer, *given).isfinite().all())), None)


def settled(pattern: Any) -> Any:
    """The pattern itself, once the last pass of its chunk is made; a policy's may have changed nothing by then."""
    if not isinstance(pattern, Attending):
        return pattern
    pattern.watch.unchanged()
    return pattern.own


def started(memory: Memory, batch: int) -> State:
    """The state of a stream that has seen nothing, checked."""
    with Watch(memory, "start", None) as watch:
        return watch.state(memory.start(batch), batch)


def not_finite(memory: Memory, now: Now, read: Sequence[Sequence[Bank]], pattern: Any = None) -> InputError:
    """Say whose fault latents are that are not finite: the first layer where what was read or how it was attended to is
    not, else unknown."""
    watch = Watch(memory, "read", now)
    for layer, found in enumerate(read):
        for name in ("keys", "values", "positions"):
            if not all(bool(getattr(bank, name).isfinite().all()) for bank in found):
                watch.layer = layer
                return watch.wrong(f"read {name} that are not finite", "the chunk was dropped")
    if isinstance(pattern, Attending):
        watch.layer = pattern.not_finite_in()
        if watch.layer is not None:
            return watch.wrong("attends with a result that is not finite", "the chunk was dropped")
    return InputError(f"chunk {now.chunk} is not finite with memory '{memory.called()}'; it was dropped")


def marks(tree: Any, where: Where = (), found: list[Mark] | None = None) -> list[Mark]:
    """List a tree's leaves: tensors with their version, which every edit in place raises, and plain values."""
    found = [] if found is None else found
    if isinstance(tree, Tensor):
        found.append((where, tree, 0 if tree.is_inference() else tree._version))
    elif isinstance(tree, dict):
        found.append((where, tuple(tree), 0))
        for key, value in tree.items():
            marks(value, (where, "[%r]" if where else "%s", key), found)
    elif is_dataclass(tree) or hasattr(tree, "_asdict"):
        for name, value in (tree._asdict() if isinstance(tree, tuple) else vars(tree)).items():
            marks(value, (where, ".%s", name), found)
    elif isinstance(tree, list | tuple):
        found.append((where, len(tree), 0))
        for i, value in enumerate(tree):
            marks(value, (where, "[%d]", i), found)
    else:
        found.append((where, tree, 0))
    return found


def spelled(where: Where) -> str:
    return spelled(where[0]) + where[1] % (where[2],) if where else ""


def first_change(before: Sequence[Mark], after: Sequence[Mark]) -> str | None:
    """Where two lists of marks of the same tree first differ."""
    for (where, old, version), (_, new, now) in zip(before, after):
        same = old is new or (type(old) is type(new) and isinstance(old, PLAIN) and old == new)
        if not same or version != now:
            return spelled(where)
    return None if len(before) == len(after) else "its state"
