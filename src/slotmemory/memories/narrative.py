"""MemFlow: beside sink and window a bank of whole latent frames, kept by what the prompt says; sparse activation on demand.

Source: MemFlow (arXiv 2512.14699), narrative adaptive memory and sparse memory activation, read from its program.
Every `record_every` chunks the chunk's first latent frame enters the bank. When it is full, the stored frames are scored
by the prompt, mean over words . mean over the frame's keys per cross- and self-attention head / sqrt(D), no softmax, and
the best stay beside the new one; every layer decides for itself. With `active` set, each head of each layer attends in
every pass to the `active` frames of sink and bank whose mean key fits the chunk's mean query best.

compat="interactive" repeats the published program for several prompts, "single" the one for one prompt. Both differ in:
- keys are scored rotated, so that a frame's score depends on where it stands; here they are scored un-rotated;
- the padding of the prompt is averaged with its words; here only words count;
- once full, the bank is cut again after every chunk: "interactive" stores the same frame twice, "single" a frame of every
  chunk; here only recorded chunks cut it;
- "single" overwrites the newest frame until the next record is due: the bank holds each interval's last chunk, not its
  first;
- kept frames stand in order of score; here in order of time;
- a recache computes frames whose keys it drops, one for each of the sink, and their queries vote in sparse activation.
Not repeated: the program's scores are all zero, so its choice arbitrary, when a prompt switch meets a full bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from slotmemory.backbones.attention import Buffered, Pattern, attend
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._placing import place
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State, Written

COMPATS = ("", "interactive", "single")


class Narrative(Sink):
    """Sink, window and a bank of frames that fit the prompt; arguments of `sink` apply, but `recache` is on.

    bank: frames kept, beside those of sink and window (a small budget gives them a third); record_every: chunks between
    records; active: frames of sink and bank that a head attends to (default: all of them); compat: see above.
    """

    source = "MemFlow (arXiv 2512.14699)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        bank: int = 3,
        record_every: int = 3,
        active: int | None = None,
        recache: bool = True,
        compat: str = "",
        **options,
    ):
        if compat not in COMPATS:
            raise InputError(unknown("compat", compat, COMPATS[1:]))
        for name, value, least in (("bank", bank, 0), ("record_every", record_every, 1), ("active", active, 1)):
            if value is not None and value < least:
                raise InputError(f"{name}={value} is too small; use {least} or more")
        per_frame = layout.tokens_per_frame
        if budget is None:
            super().__init__(layout, None, recache=recache, **options)
            self.budget += bank * per_frame
        else:
            bank = min(bank, budget // per_frame // 3)
            super().__init__(layout, budget - bank * per_frame, recache=recache, **options)
            self.budget = budget
        self.bank, self.record_every, self.active, self.compat = bank, record_every, active, compat

    def start(self, batch: int) -> State:
        return {**super().start(batch), "bank": [], "chunks": 0}

    # read

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        kept = [state[name][layer] for name in ("sink", "bank", "window") if state[name]]
        return place(kept, now, self.placing, self.reach)

    def attend(
        self, state: State, now: Now, read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]
    ) -> Pattern | None:
        if self.active is None:
            return None
        frames = [
            sum(state[name][layer].items for name in ("sink", "bank") if state[name]) for layer in range(len(read))
        ]
        unread = now.frames - (self.window - self.sink) if now.replay and self.compat else 0
        return Activated(context, frames, self.layout.tokens_per_frame, self.active, max(unread, 0))

    def switch(self, state: State, now: Now) -> tuple[State, int]:
        state, replay = super().switch(state, now)
        return state, min(self.window, now.frame) if replay and self.compat and self.active else replay

    # update

    def update(self, state: State, written: Written) -> State:
        state = super().update(state, written)
        if written.now.replay or self.bank == 0:
            return state
        bank = [self._consolidate(state, written, layer) for layer in range(len(written.layers))]
        return {**state, "bank": bank, "chunks": state["chunks"] + 1}

    def _consolidate(self, state: State, written: Written, layer: int) -> Bank:
        """Take the chunk's first frame into the bank if it is to be recorded; a full bank first drops its worst."""
        first = written.bank(layer).first(1)
        bank = state["bank"][layer] if state["bank"] else first.first(0)
        wanted = state["chunks"] // self.record_every + 1  # frames ever recorded, this one included
        if self.compat == "single" or state["chunks"] % self.record_every == 0:
            new = first
        elif self.compat == "interactive" and wanted > self.bank:
            new = bank.last(1)
        else:
            return bank
        if wanted <= self.bank:
            return bank.first(wanted - 1).join(new)
        score = self._saliency(bank, written.now, layer)
        keep = score.topk(self.bank - 1).indices
        if not self.compat:
            keep = keep.sort(1).values
        return replace(bank, score=score).take(keep).join(new)

    def _saliency(self, bank: Bank, now: Now, layer: int) -> Tensor:
        """How well each frame fits the prompt: [B, M] fp32."""
        keys, words = bank.keys, now.words(layer)
        if self.compat:
            words = now.text[layer][0].float().mean(1)
            keys = rotate(keys.flatten(1, 2), *rotation(bank.positions.flatten(1, 2), keys.shape[-1])).view_as(keys)
        heads = torch.einsum("bhd,bmhd->bmh", words, keys.float().mean(2))
        return heads.mean(-1) / keys.shape[-1] ** 0.5


class Activated(Buffered):
    """Attends to the best `active` of the first `frames[layer]` frames read, chosen per head and pass, and to the rest.

    per_frame: tokens of a frame; unread: the chunk's first frames that ask, but are not attended to.
    """

    def __init__(
        self,
        context: Sequence[tuple[Tensor, Tensor]],
        frames: Sequence[int],
        per_frame: int,
        active: int,
        unread: int = 0,
    ):
        self.active, self.unread = active, unread * per_frame
        self.choices, rest = [], []
        for (keys, values), count in zip(context, frames):
            if count <= active:
                self.choices.append(None)
                rest.append((keys, values))
                continue
            keys, values = (x.split((count * per_frame, x.shape[1] - count * per_frame), 1) for x in (keys, values))
            split = [x[0].unflatten(1, (count, per_frame)) for x in (keys, values)]  # [B, M, n, H, D]
            self.choices.append((*split, split[0].float().mean(2)))
            # room for the chosen frames stands before what is always read
            rest.append(tuple(torch.cat((x[0][:, : active * per_frame], x[1]), 1) for x in (keys, values)))
        super().__init__(rest)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        keys, values = self.joined(layer, key[:, self.unread :], value[:, self.unread :])
        if self.choices[layer] is not None:
            *frames, means = self.choices[layer]
            fit = torch.einsum("bhd,bmhd->bmh", query.float().mean(1), means)
            chosen = fit.topk(self.active, 1).indices[:, :, None, :, None]  # [B, K, 1, H, 1]
            for into, every in zip((keys, values), frames):
                picked = every.gather(1, chosen.expand(-1, -1, *every.shape[2:3], -1, *every.shape[4:]))
                into[:, : self.active * every.shape[2]] = picked.flatten(1, 2)
        return attend(query, keys, values)
