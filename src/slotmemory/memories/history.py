"""The whole past, encoded: a small network turns every latent frame into a few tokens that the model reads as its own.

Source: frame preservation pretraining, later TinyHistory (arXiv 2512.23851). The encoder (`_encoder.py`) writes tokens in
the backbone's hidden width; rates are the paper's, against the token grid: 4x4x2 is 32 times fewer tokens, on Wan at
832 x 480 195 per second of video (182 with the floor 30 / 4 -> 7), 2x2x2 780, 2x2x1 1560. After every chunk only the new
frames are encoded; their tokens run through the model once, at noise level 0, seeing the tokens kept so far and never
what is generated; keys and values are kept. Beside them stands a short window of clean frames (the paper's best variant).

What the paper leaves open, and what is done here:
- Positions: the fractional middle of the frames, rows and columns that a token stands for.
- Latents are averaged for the low-resolution branch; the paper resizes pixels and encodes them again.
- Attention inside the encoder sees a limited past, so that encoding in parts equals encoding at once.
- Frames that do not fill a token's cell in time yet (rate 2: at most one) are seen by the window alone.
- Budget: the window takes at most half of it, the encoded frames have the rest. `encoded` frames at most. Over
  that, `spread` drops the frame whose neighbours in time stand closest (the first and the last stay): the whole video
  stays covered, and no gap is longer than two neighbouring ones together. `recent` drops the oldest.
- A prompt switch leaves the encoded frames as they are (`recache` concerns the window).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._encoder import Encoder, parse_rate
from slotmemory.memories._packing import places, spans
from slotmemory.memories._placing import place
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, Prefix, State, Written

KEEPS = ("spread", "recent")


class History(Sink):
    """Window and encoded history; arguments of `sink` apply, without a sink and with a short window by default.

    rate: compression, HEIGHTxWIDTHxTIME; width, heads, blocks, span: the encoder's channels, attention heads, attention
    blocks and how many encoded frames these look back; branches: both, low or high (ablations); encoded: such frames
    kept; keep: which, see above; weights: trained ones, see `Engine.with_memory`.
    """

    source = "TinyHistory, first called frame preservation (arXiv 2512.23851)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        rate: str = "4x4x2",
        width: int = 512,
        heads: int = 8,
        blocks: int = 1,
        span: int = 8,
        branches: str = "both",
        encoded: int = 60,
        keep: str = KEEPS[0],
        sink: int = 0,
        window: int = 6,
        weights: str = "",
        **options,
    ):
        if keep not in KEEPS:
            raise InputError(unknown("keep", keep, KEEPS))
        if encoded < 0:
            raise InputError(f"encoded={encoded} is too small; use 0 or more")
        super().__init__(layout, None if budget is None else budget // 2, sink=sink, window=window, **options)
        self.keep, self.weights = keep, weights
        with torch.random.fork_rng(devices=[]):  # an untrained encoder is the same in every process
            torch.manual_seed(0)
            self.encoder = Encoder(layout, parse_rate(rate), width, heads, blocks, span, branches)
        beside = (self.sink + self.past) * layout.tokens_per_frame
        self.capacity = encoded if budget is None else min(encoded, (budget - beside) // self.encoder.tokens)
        self.budget = beside + encoded * self.encoder.tokens if budget is None else budget

    def adopt(self, weight: Tensor, bias: Tensor) -> None:
        self.encoder.adopt(weight, bias)

    def start(self, batch: int) -> State:
        return {**super().start(batch), "history": [], "encoder": None}

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return [*self._history(state, layer, now), *super().read(state, layer, now)]

    def _history(self, state: State, layer: int, now: Now) -> list[Bank]:
        """The encoded frames; in a closed-up order (`relative`) there is no place for them, so they stay where they are."""
        if not state["history"]:
            return []
        return place(
            [state["history"][layer]], now, "native" if self.placing == "relative" else self.placing, self.reach
        )

    def prefix(self, state: State, written: Written) -> tuple[State, Prefix | None]:
        if written.now.replay or not self.capacity:
            return state, None
        latents = written.latents.detach().to(self.encoder.patch_weight.dtype)
        waiting = 0 if state["encoder"] is None else state["encoder"]["waiting"].shape[1]
        tokens, encoder = self.encoder(latents, state["encoder"])
        state = {**state, "encoder": encoder}
        if not tokens.shape[1]:
            return state, None
        positions = self.places(written.now.frame - waiting, tokens.shape[1]).to(latents.device)
        sees = [self._history(state, layer, written.now) for layer in range(len(written.layers))]
        return state, Prefix(tokens.flatten(1, 2), positions, sees)

    def places(self, first: int, count: int) -> Tensor:
        """Where the tokens of `count` encoded frames stand, whose first latent frame is `first`: [1, count g, 3]."""
        (rows, columns), (down, across, time) = self.encoder.grid, self.encoder.rate
        axes = ((count, time), (rows, down), (columns, across))
        t, h, w = (spans(cells * by, cells, by)[0] for cells, by in axes)
        return places(first + t, h, w)

    def write(self, state: State, written: Written) -> State:
        state = super().write(state, written)
        if written.prefix is None:
            return state
        frames = written.prefix.tokens.shape[1] // self.encoder.tokens
        new = [written.prefix_bank(layer, slice(None), frames) for layer in range(len(written.prefix_layers))]
        # born with the first frame that a token stands for, not in the middle of them
        shift = (self.encoder.rate[2] - 1) / 2
        new = [replace(bank, born=(bank.positions[:, :, 0, 0] - shift).long()) for bank in new]
        old = state["history"]
        return {**state, "history": [a.join(b) for a, b in zip(old, new)] if old else new}

    def update(self, state: State, written: Written) -> State:
        state = super().update(state, written)
        banks = state["history"]
        if not banks or banks[0].items <= self.capacity:
            return state
        born = banks[0].born  # the same in every layer; rows of a batch are in step
        kept = self._spread(born[0].tolist()) if self.keep == "spread" else range(banks[0].items)[-self.capacity :]
        index = torch.tensor(list(kept), device=born.device).expand(len(born), -1)
        return {**state, "history": [bank.take(index) for bank in banks]}

    def _spread(self, born: list[int]) -> list[int]:
        """Which of the items, by number, cover the time since the first one most evenly."""
        left = list(range(len(born)))
        while len(left) > max(self.capacity, 2):
            gaps = [born[after] - born[before] for before, after in zip(left, left[2:])]
            del left[gaps.index(min(gaps)) + 1]
        return left[-self.capacity :]
