"""Packed frames: the last frames as tokens of falling resolution, remade for every chunk; older ones are forgotten.

Source: FramePack (arXiv 2504.12626). The schedule f16k4f2k2f1k1 reads, oldest first: 16 latent frames packed 4 x 4 x 4, 2
packed 2 x 2 x 2, 1 as it is; the paper's g9, the frames made at once, is the layout's chunk. On Wan at 832 x 480 that
is 390 + 390 + 1560 = 2340 tokens by the law (`nominal`), and 2366 in fact, for 60 / 8 latent rows are padded to 8 (26 more).

State: the latents themselves. After every chunk all of them are packed anew by one patch embedding per level and run
through the model once, at noise level 0, seeing only each other; their keys and values are the memory (FramePack runs
them beside the noisy tokens in every step, seeing those too).

What is done here:
- The patch embeddings start as the backbone's, its weights repeated and divided by k^3 (the published start).
- A packed token stands in the middle of its cell, and its rotary phases are the mean over the cell (published): a cell
  is `Prefix.extents` steps wide. A cell that reaches over the edge stands for the steps that exist, its latents repeat.
- Fewer frames than a cell holds (a young video) fill it by repeating the oldest; a level without frames is absent.
- Budget: levels too fine for it are left out, the finest first, and the coarser ones take the newest frames; then the
  oldest cells of the last level.
- Tokens are made under the prompt of the chunk just written; at a prompt switch they follow one chunk later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.memories._packing import enlarge, pack, places, spans
from slotmemory.memory import Bank, Memory, Now, Prefix, State, Written

LEVEL = re.compile(r"f(\d+)k(\d+)")


@dataclass(frozen=True)
class Level:
    """`frames` latent frames, packed by `factor` in time, height and width."""

    frames: int
    factor: int

    @property
    def name(self) -> str:
        return f"k{self.factor}"

    @property
    def cells(self) -> int:
        """Cells in time, when there are frames enough."""
        return -(-self.frames // self.factor)


def parse_schedule(text: str) -> list[Level]:
    """Read FramePack's notation, oldest level first: f16k4f2k2f1k1 -> 16 frames by 4, 2 by 2, 1 by 1."""
    levels = [Level(int(f), int(k)) for f, k in LEVEL.findall(text)]
    falling = all(a.factor > b.factor for a, b in zip(levels, levels[1:]))
    if LEVEL.sub("", text) or not levels or not falling or any(x.frames < 1 or x.factor < 1 for x in levels):
        raise InputError(
            f"schedule={text!r}: expected frames and factors, factors falling from 1 or more, such as f16k4f2k2f1k1"
        )
    return levels


class Packed(Memory):
    """Reads the last frames in packed form.

    schedule: FramePack's notation, oldest level first; weights: trained patch embeddings, see `Engine.with_memory`.
    """

    source = "FramePack (arXiv 2504.12626)"
    positions = "native: a packed token stands in the middle of its cell"

    def __init__(
        self, layout: Layout, budget: int | None = None, *, schedule: str = "f16k4f2k2f1k1", weights: str = ""
    ):
        super().__init__(layout, budget)
        self.weights = weights
        asked = parse_schedule(schedule)
        self.levels = asked if budget is None else self._fit(layout, asked, budget)
        self.frames = sum(level.frames for level in self.levels)
        self.nominal = sum(x.frames * layout.tokens_per_frame / x.factor**3 for x in self.levels)
        if budget is None:
            self.budget = sum(x.cells * self.per_cell(x) for x in self.levels)
        patch = layout.patch
        shapes = {x.name: (layout.latent_channels, *(p * x.factor for p in patch)) for x in asked}
        with torch.random.fork_rng(devices=[]):  # untrained weights are the same in every process
            torch.manual_seed(0)
            # a smaller budget leaves levels out, but not their weights: one file fits all budgets
            self.embed = nn.ModuleDict({name: Patch(layout.model_width, shape) for name, shape in shapes.items()})

    def per_cell(self, level: Level) -> int:
        """Tokens of one cell in time."""
        rows, columns = self.layout.grid
        return -(-rows // level.factor) * -(-columns // level.factor)

    def _fit(self, layout: Layout, levels: list[Level], budget: int) -> list[Level]:
        """The levels that a budget buys: finest ones dropped first, then the coarsest shortened."""
        levels = list(levels)
        while len(levels) > 1 and sum(x.cells * self.per_cell(x) for x in levels) > budget:
            levels.pop()
        cells = min(levels[0].cells, budget // self.per_cell(levels[0]))
        first = Level(min(levels[0].frames, cells * levels[0].factor), levels[0].factor)
        return [first, *levels[1:]] if cells else []

    def adopt(self, weight: Tensor, bias: Tensor) -> None:
        for name, patch in self.embed.items():
            patch.adopt(weight, bias, int(name[1:]))

    def start(self, batch: int) -> State:
        return {"latents": None, **{level.name: [] for level in self.levels}}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return [state[level.name][layer] for level in self.levels if state[level.name]]

    def prefix(self, state: State, written: Written) -> tuple[State, Prefix | None]:
        if not self.levels:
            return state, None
        past, new = state["latents"], written.latents.detach()
        latents = (new if past is None else torch.cat((past, new), 1))[:, -self.frames :]
        end, tokens, where, widths = written.now.frame + written.frames, [], [], []
        for level, frames in self._split(latents.shape[1]):
            start = frames.start - latents.shape[1] + end
            made, middle, wide = self._level(level, latents[:, frames], start)
            tokens, where, widths = [*tokens, made], [*where, middle], [*widths, wide]
        positions, extents = (torch.cat(x, 1).to(new.device) for x in (where, widths))
        return {**state, "latents": latents}, Prefix(torch.cat(tokens, 1), positions, extents=extents)

    def _split(self, held: int) -> list[tuple[Level, slice]]:
        """Which of the held frames each level packs, oldest first; levels without frames are left out."""
        found, end = [], held
        for level in reversed(self.levels):
            start = max(end - level.frames, 0)
            if end > start:
                found.append((level, slice(start, end)))
            end = start
        return found[::-1]

    def _level(self, level: Level, latents: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pack latents [B, T, c, h, w] from frame `start` on -> tokens [B, N, C], positions and extents [1, N, 3]."""
        k, (rows, columns), (_, ph, pw) = level.factor, self.layout.grid, self.layout.patch
        frames = latents.shape[1]
        missing = (-frames % k, -rows % k * ph, -columns % k * pw)
        padding = (0, missing[2], 0, missing[1], missing[0], 0)  # in time, the oldest frame repeats
        weight = self.embed[level.name].weight
        padded = F.pad(latents.transpose(1, 2).to(weight.dtype), padding, "replicate").transpose(1, 2)
        tokens = pack(padded, weight, self.embed[level.name].bias)
        # cells in time are counted from the newest frame backwards
        back, ages = (x.flip(0) for x in spans(frames, -(-frames // k), k))
        axes = (spans(rows, -(-rows // k), k), spans(columns, -(-columns // k), k))
        middles, widths = zip((start + frames - 1 - back, ages), *axes)
        return tokens.flatten(1, 2), places(*middles), places(*widths)

    def write(self, state: State, written: Written) -> State:
        if written.prefix is None:
            return state
        state, done = dict(state), 0
        for level, frames in self._split(state["latents"].shape[1]):
            cells = -(-(frames.stop - frames.start) // level.factor)
            tokens = slice(done, done + cells * self.per_cell(level))
            layers = range(len(written.prefix_layers))
            state[level.name] = [written.prefix_bank(layer, tokens, cells) for layer in layers]
            done = tokens.stop
        return state


class Patch(nn.Module):
    """One level's patch embedding: weight [C, c, kt, kh, kw], bias [C]."""

    def __init__(self, width: int, shape: tuple[int, ...]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, *shape))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.weight.flatten(1))

    @torch.no_grad()
    def adopt(self, weight: Tensor, bias: Tensor, factor: int) -> None:
        """Start as the backbone's patch embedding of the latents averaged over factor^3."""
        self.weight.copy_(enlarge(weight, (factor,) * 3))
        self.bias.copy_(bias)
