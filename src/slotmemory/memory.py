"""What every memory is made of: banks of tokens, the moment it acts in, and the interface of a policy.

Knows tensors and the layout. It never runs a backbone: what a memory may read arrives as arguments, what it keeps goes
out as state. A policy is one file in `memories/` (or anywhere: a path works too), its name is the file's name and its
constructor's keyword arguments are its configuration.

Legend: B batch, M items, n tokens per item, F latent frames, N tokens, H heads, D head dim, C width.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slotmemory.errors import InputError, shorten, unknown
from slotmemory.layout import Layout

if TYPE_CHECKING:
    from slotmemory.backbones.attention import Pattern

State = dict[str, Any]  # a plain tree of tensors, numbers and banks; a policy returns a new one, it never edits one


@dataclass(frozen=True)
class Bank:
    """Items of one layer: what is kept or dropped together (a latent frame, a slot's tokens, a summary).

    keys, values [B, M, n, H, D], keys un-rotated; positions [B, M, n, 3] (t, h, w) at which the keys are to be rotated;
    born [B, M] latent frame of the item's first token; owner [B, M] slot or entity (-1: nobody's); score [B, M] fp32;
    notes: whatever else a policy knows of each item, by name, each [B, M, ...]; it travels with the items.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    born: Tensor
    owner: Tensor
    score: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of_frames(keys: Tensor, values: Tensor, positions: Tensor, frames: int) -> Bank:
        """Make each latent frame an item: keys, values [B, N, H, D] and positions [B or 1, N, 3] of `frames` frames."""
        split = (frames, keys.shape[1] // frames)
        positions = positions.expand(keys.shape[0], -1, -1).unflatten(1, split)
        born = positions[:, :, 0, 0].long()
        return Bank(
            keys.unflatten(1, split),
            values.unflatten(1, split),
            positions,
            born,
            torch.full_like(born, -1),
            torch.zeros(born.shape, device=born.device),
        )

    @property
    def items(self) -> int:
        return self.keys.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens per batch row: what a budget counts."""
        return self.keys.shape[1] * self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self._tensors().values()) + sum(x.nbytes for x in self.notes.values())

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "notes"}

    def map(self, change: Callable[[Tensor], Tensor]) -> Bank:
        return Bank(
            **{name: change(x) for name, x in self._tensors().items()},
            notes={name: change(x) for name, x in self.notes.items()},
        )

    def join(self, other: Bank) -> Bank:
        """Append another bank's items; their token counts and notes must agree."""
        if other.items == 0:
            return self
        if self.items == 0:
            return other
        mine, theirs = self._tensors(), other._tensors()
        return Bank(
            **{name: torch.cat((mine[name], theirs[name]), 1) for name in mine},
            notes={name: torch.cat((self.notes[name], other.notes[name]), 1) for name in self.notes},
        )

    def take(self, index: Tensor) -> Bank:
        """Pick items per batch row: index [B, K] -> a bank of K items, in the order given."""
        return self.map(
            lambda x: x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
        )

    def first(self, count: int) -> Bank:
        return self.map(lambda x: x[:, :count])

    def last(self, count: int) -> Bank:
        return self.map(lambda x: x[:, max(x.shape[1] - count, 0) :])

    def after(self, count: int) -> Bank:
        """All items but the first `count`."""
        return self.map(lambda x: x[:, count:])

    def at(self, frames: Tensor) -> Bank:
        """Place every token at new temporal positions [B, M] or [B, M, n]; rows and columns stay."""
        frames = frames if frames.ndim == 3 else frames[..., None].expand(self.positions.shape[:-1])
        return replace(self, positions=torch.cat((frames[..., None].to(self.positions), self.positions[..., 1:]), -1))

    def detach(self) -> Bank:
        return self.map(Tensor.detach)


@dataclass(frozen=True)
class Now:
    """The moment a policy acts in. `frame` is the chunk's first latent frame; `switched`: its prompt is new; `replay`: not
    a new chunk but past frames computed again under a new prompt.

    text: per layer the prompt's cross-attention keys and values [B, L, H, D], of which the first text_tokens [B] are words.
    """

    chunk: int
    frame: int
    frames: int
    shot: int
    switched: bool
    text: Sequence[tuple[Tensor, Tensor]]
    text_tokens: Tensor
    replay: bool = False

    def words(self, layer: int) -> Tensor:
        """Mean of the prompt's keys over its words, padding left out: [B, H, D] fp32."""
        keys = self.text[layer][0].float()
        real = torch.arange(keys.shape[1], device=keys.device) < self.text_tokens.to(keys.device)[:, None]
        return (keys * real[..., None, None]).sum(1) / real.sum(1).clamp(min=1)[:, None, None]


@dataclass(frozen=True)
class Prefix:
    """Tokens that a policy makes itself, to be run once through all layers of the backbone (`Memory.prefix`).

    They are run at noise level 0 under the prompt at hand and see each other and `sees`; they never see what is generated.
    tokens [B, N, C] in the backbone's width; positions [B or 1, N, 3] (t, h, w), any real numbers; sees: per layer the
    banks they attend to beside each other (none: only each other); extents [B or 1, N, 3]: how many whole steps of t, h, w
    a token stands for around its position; its rotary phases are then averaged over them, in the pass and when read.
    """

    tokens: Tensor
    positions: Tensor
    sees: Sequence[list[Bank]] = ()
    extents: Tensor | None = None


@dataclass(frozen=True)
class Written:
    """What the clean pass saw of a chunk: per layer a `Seen` (keys, values, hidden, text_query, query), and the latents.

    pattern: how the chunk attended (`Memory.attend`), with whatever the pattern noted in the denoising steps.
    prefix: what `Memory.prefix` asked for, and per layer a `Seen` of its tokens.
    """

    now: Now
    layers: Sequence[Any]
    positions: Tensor  # [B or 1, N, 3]
    latents: Tensor  # [B, F, C, h, w]
    pattern: Pattern | None = None
    prefix: Prefix | None = None
    prefix_layers: Sequence[Any] = ()

    @property
    def frames(self) -> int:
        return self.latents.shape[1]

    def bank(self, layer: int) -> Bank:
        """The chunk's latent frames as items of one layer, cut from the autograd graph (gradients must not leak)."""
        seen = self.layers[layer]
        return Bank.of_frames(seen.keys.detach(), seen.values.detach(), self.positions, self.frames)

    def prefix_bank(self, layer: int, tokens: slice, items: int) -> Bank:
        """Some of the prefix's tokens as so many items of one layer; gradients reach what made the tokens."""
        seen, places = self.prefix_layers[layer], self.prefix.positions[:, tokens]
        bank = Bank.of_frames(seen.keys[:, tokens], seen.values[:, tokens], places, items)
        if self.prefix.extents is None:
            return bank
        first = places - (self.prefix.extents[:, tokens] - 1) / 2  # a cell is born with its first frame
        return replace(bank, born=first[..., 0].unflatten(1, (items, -1))[..., 0].long().expand_as(bank.born))


class Memory(nn.Module):
    """A policy: what to read before a chunk and what to keep after it.

    Parameters live here; what one stream remembers lives in `state`. `budget` is the most tokens per layer that `read`
    may return; the session stops a policy that returns more. Key positions are the policy's to choose: the chunk being
    made sits at its native latent frames, and only differences matter.
    """

    # Most recent latent frames a prompt switch may ask to replay; the session keeps that many.
    replays: int = 0
    # For listings: the paper or program it follows, and where its keys stand in time (a policy with a `placing` argument
    # says it there).
    source: str = "not stated"
    positions: str = "native"
    # A ceiling, which takes no notice of a budget and sets none: the class that says so itself, and no class made of it.
    unlimited: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.unlimited = vars(cls).get("unlimited", False)

    def __init__(self, layout: Layout, budget: int | None = None):
        super().__init__()
        self.layout = layout
        self.budget = budget

    @classmethod
    def called(cls) -> str:
        return cls.__module__.rpartition(".")[2]

    def adopt(self, weight: Tensor, bias: Tensor) -> None:
        """Take what the policy needs of the backbone's patch embedding: weight [C, c, 1, ph, pw] and bias [C], fp32.

        Called once on a new policy, before its own trained weights are loaded. It may keep copies, nothing else.
        """

    def start(self, batch: int) -> State:
        """Return the state of a stream that has seen nothing."""
        return {}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        """Return the banks whose tokens the chunk attends to in this layer, beside its own."""
        return []

    def attend(
        self, state: State, now: Now, read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]
    ) -> Pattern | None:
        """Say how the chunk attends to what was read; None: in one softmax with its own tokens, the fastest.

        For policies that act inside attention: that choose by the queries of the chunk, read with a softmax of their own
        or want to know the queries of the denoising steps. read: the banks by layer; context: the same by layer, joined
        in that order, keys rotated to where they stand, each [B, M, H, D]. The pattern (`backbones/attention.py`) lives as
        long as the chunk: every layer of every pass calls it, the clean pass last, and `write` finds it in `written`. What
        is to outlive the chunk must go into the state there.
        """
        return None

    def prefix(self, state: State, written: Written) -> tuple[State, Prefix | None]:
        """Make tokens of what was written, for the backbone to run; `write` is called next, on the state returned here.

        For policies that encode latents into tokens of their own. The tokens' keys and values are in `written` when
        `write` is called (`Written.prefix_bank`), to be kept and read as banks.
        """
        return state, None

    def write(self, state: State, written: Written) -> State:
        """Take in what the clean pass saw."""
        return state

    def update(self, state: State, written: Written) -> State:
        """Merge and evict down to the budget."""
        return state

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        """Answer a prompt switch: the state without what is to be replayed, and how many last latent frames to replay.

        The session replays them under the new prompt as one clean pass, then calls write and update as usual.
        """
        return state, 0

    def losses(self, state: State) -> dict[str, Tensor]:
        """Auxiliary training losses, by name."""
        return {}

    def look(self, state: State) -> dict[str, Tensor]:
        """Maps for an inspector: {"masks": [B, S, T, h, w]}."""
        return {}


def banks(state: State) -> Iterator[tuple[str, list[Bank]]]:
    """List the banks of a state by name: state[name] = one Bank per layer."""
    for name, value in state.items():
        if isinstance(value, list) and value and isinstance(value[0], Bank):
            yield name, value


def held_bytes(state: State) -> int:
    """Bytes of all banks, all layers."""
    return sum(bank.nbytes for _, layers in banks(state) for bank in layers)


_BANK = "<Bank>"  # no policy names a part of its state so


def to_plain(tree: Any) -> Any:
    """Turn banks into dictionaries, so that a state can be saved as tensors and names."""
    if isinstance(tree, Bank):
        return {_BANK: {f.name: getattr(tree, f.name) for f in fields(tree)}}
    if isinstance(tree, dict):
        return {k: to_plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return (list if isinstance(tree, list) else tuple)(to_plain(v) for v in tree)
    return tree


def from_plain(tree: Any) -> Any:
    """Undo `to_plain`."""
    if isinstance(tree, dict):
        if set(tree) == {_BANK}:
            return Bank(**tree[_BANK])
        return {k: from_plain(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(from_plain(v) for v in tree)
    return tree


# discovery: a memory's name is its file's name


def names() -> list[str]:
    """List the memories that ship with the package."""
    import slotmemory.memories as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def find(name: str) -> type[Memory]:
    """Find a policy by name, or by the path of a Python file outside the package."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"memory file {name} does not exist")
        # a name of its own, known to Python while it runs: dataclasses look their module up
        spec = importlib.util.spec_from_file_location(f"slotmemory.memories.file.{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a person's own file may raise anything
            del sys.modules[spec.name]
            said = f"{type(error).__name__}: {shorten(str(error), 200)}"
            raise InputError(f"memory {name} cannot be loaded: {said}") from error
    elif name in names():
        module = importlib.import_module(f"slotmemory.memories.{name}")
    else:
        raise InputError(unknown("memory", name, names()))
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, Memory) and c.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise InputError(f"{name} defines {len(found)} memories; a memory file defines exactly one subclass of Memory")
    return found[0]


def arguments(policy: type[Memory]) -> dict[str, Any]:
    """A policy's keyword arguments with their defaults: its configuration, its parents' included where it takes **options."""
    known: dict[str, Any] = {}
    for cls in policy.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | known
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return known


def build(name: str, layout: Layout, budget: int | None = None, **options: Any) -> Memory:
    """Make a policy by name; an unknown argument answers with the nearest known one."""
    policy = find(name)
    known = arguments(policy)
    if budget is not None and budget < 0:
        raise InputError(f"budget={budget} is negative; give a number of tokens per layer, 0 or more")
    for option in options:
        if option not in known:
            raise InputError(unknown(f"argument of memory '{name}'", option, known))
    made = policy(layout, budget, **options)
    if not isinstance(getattr(made, "layout", None), Layout):
        raise InputError(
            f"memory '{policy.called()}' is not set up; its __init__ must call super().__init__(layout, budget)"
        )
    if budget is not None and not policy.unlimited and (made.budget is None or made.budget > budget):
        took = "sets none" if made.budget is None else f"takes {made.budget}"
        raise InputError(
            f"memory '{policy.called()}' is given a budget of {budget} tokens and {took}; "
            "its __init__ must pass the budget on, super().__init__(layout, budget), or set self.budget to it; "
            "a ceiling says so itself, unlimited = True"
        )
    return made
