"""Calls of a policy, watched while a video is made: whatever breaks the contract is named by policy, chunk and layer.

It knows no policy and no loop. It looks at shapes, versions of tensors and two numbers per bank; that numbers are finite
is asked of the finished latents alone, and only when they are not, of what was read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from slotmemory.errors import InputError, shorten
from slotmemory.memory import Bank, Memory, Now

PLAIN = (bool, int, float, str, tuple)
Where = tuple  # (where its parent stands, how to write the step from there, the step); spelled out only in a complaint
Mark = tuple[Where, Any, int]  # where it stands, what stands there, and a tensor's version


class Watch:
    """Wrap a call (or one per layer) of a policy: `with Watch(memory, "write", now, state=state): ...`

    What is given by name must come out as it went in. Whatever the policy raises becomes one InputError that names it.
    """

    def __init__(self, memory: Memory, call: str, now: Now, **given: Any):
        self.memory, self.call, self.now, self.given = memory, call, now, given
        self.layer: int | None = None
        self.before: list[Mark] = []

    def __enter__(self) -> Watch:
        self.before = marks(self.given)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if error is None:
            changed = first_change(self.before, marks(self.given))
            if changed:
                listed = re.search(r"\[(\d+)\]\.", changed)  # banks and what was seen are listed by layer
                self.layer = int(listed[1]) if listed else None
                raise self.wrong(f"changes {changed} in `{self.call}`", "return a new state, edit none")
        elif isinstance(error, Exception) and not isinstance(error, InputError):
            said = f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 200)}"
            raise self.wrong(f"raised {said} in `{self.call}`") from error

    def wrong(self, what: str, advice: str = "") -> InputError:
        """Name the policy, what it did, and where."""
        where = f" in layer {self.layer}" if self.layer is not None else ""
        advice = f"; {advice}" if advice else ""
        return InputError(f"memory '{self.memory.called()}' {what}{where} at chunk {self.now.chunk}{advice}")

    def banks(self, found: Any, batch: int, dtype: torch.dtype) -> list[Bank]:
        """Check what one layer's `read` returned: banks, shapes, dtype, budget."""
        layout, budget = self.memory.layout, self.memory.budget
        if not isinstance(found, list | tuple) or not all(isinstance(bank, Bank) for bank in found):
            raise self.wrong(f"returned a {type(found).__name__} from `read`", "expected a list of banks")
        for bank in found:
            if bank.keys.ndim != 5:
                raise self.wrong(f"read keys of shape {list(bank.keys.shape)}", "expected [B, M, n, H, D]")
            items = [batch, *bank.keys.shape[1:3]]
            expected = {name: [*items, layout.heads, layout.head_dim] for name in ("keys", "values")}
            expected |= {"positions": [*items, 3], "born": items[:2], "owner": items[:2]}
            for name, shape in expected.items():
                got = list(getattr(bank, name).shape)
                if got != shape:
                    raise self.wrong(f"read {name} of shape {got}", f"expected {shape}")
            for name in ("keys", "values"):
                if getattr(bank, name).dtype != dtype:
                    raise self.wrong(f"read {name} in {getattr(bank, name).dtype}", f"the model runs in {dtype}")
        tokens = sum(bank.tokens for bank in found)
        if budget is not None and tokens > budget:
            raise self.wrong(f"read {tokens} tokens", f"its budget is {budget}")
        return list(found)

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


def not_finite(memory: Memory, now: Now, read: Sequence[Sequence[Bank]]) -> InputError:
    """Say whose fault latents are that are not finite: the first layer whose keys or values are not, else unknown."""
    watch = Watch(memory, "read", now)
    for layer, found in enumerate(read):
        for name in ("keys", "values"):
            if not all(bool(getattr(bank, name).isfinite().all()) for bank in found):
                watch.layer = layer
                return watch.wrong(f"read {name} that are not finite", "the chunk was dropped")
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
