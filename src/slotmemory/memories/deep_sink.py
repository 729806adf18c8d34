"""Deep Forcing: a sink of half the window that follows the chunk, and the tokens behind it that recent queries ask for.

Source: Deep Forcing (arXiv 2512.05081), deep sink and participative compression, read from its released program.
Nothing leaves until the window is full. Then, in the first denoising pass of a chunk, every layer sums the rotated
queries of the last `recent` latent frames - the chunk's own, still noisy, and the clean ones before it - scores each token
between the sink and those frames by its product with that sum over all heads, no softmax, and keeps the best `compressed`
frames' worth of tokens, in order of time; the other tokens leave. Keys stand directly before the chunk without gaps: sink,
compressed tokens (one latent frame of time for every frame's worth), recent frames.

compat="deepforcing" places keys as the published program does: compressed tokens and recent frames where they were made,
and the sink just before the start of all that is kept, counted back from the chunk's first frame and not from its end,
which leaves a gap; between two compressions it stays there while the chunk moves on. Not repeated: with `recent` longer
than two chunks, queries of later denoising steps vote in the program too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slotmemory.backbones.attention import Buffered, Pattern
from slotmemory.backbones.rope import rotate, rotation
from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memory import Bank, Memory, Now, State, Written


class DeepSink(Memory):
    """Reads sink, compressed tokens and recent frames, at positions of its own (see above).

    window: latent frames that may be attended to, the chunk included; sink: the first frames, kept for good; compressed:
    frames' worth of tokens that a compression keeps of what lies between, 0 for the deep sink alone; recent: the last
    frames that it leaves whole, the chunk included (everything behind a deep sink alone). sink and compressed left out:
    the published shares of the window, 10 and 2 of 21. reuse: compressions that a token outlives at most. compat:
    "deepforcing", see above. A budget pays for the window as it is held before a compression; one too small for that
    leaves the deep sink alone.
    """

    source = "Deep Forcing (arXiv 2512.05081)"
    positions = "block-relative: sink, chosen tokens and recent frames directly before the chunk"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        window: int = 21,
        sink: int | None = None,
        compressed: int | None = None,
        recent: int = 4,
        reuse: int = 7,
        compat: str = "",
    ):
        chunk, per_frame = layout.frames_per_chunk, layout.tokens_per_frame
        if compat not in ("", "deepforcing"):
            raise InputError(unknown("compat", compat, ("deepforcing",)))
        for name, value, least in (
            ("window", window, chunk),
            ("sink", sink, 0),
            ("compressed", compressed, 0),
            ("recent", recent, chunk),
            ("reuse", reuse, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name}={value} is too small; use {least} or more")
        frames = window if budget is None else budget // per_frame
        if compressed == 0 or min(window, frames) < recent + 2:
            window, compressed = min(window, frames + chunk), 0
            sink = min(window * 10 // 21 if sink is None else sink, window - chunk)
            recent = window - sink
        else:
            window = min(window, frames)
            behind = max(round(window * 16 / 21) - recent, 2)
            compressed = -(-behind // 6) if compressed is None else compressed
            sink = max(behind - compressed, 0) if sink is None else sink
        if sink + compressed + recent > window:
            raise InputError(
                f"window={window} cannot hold sink={sink}, compressed={compressed} and recent={recent} latent frames; "
                f"use window >= {sink + compressed + recent}"
            )
        held = window if compressed else window - chunk
        super().__init__(layout, held * per_frame if budget is None else budget)
        self.window, self.sink, self.compressed, self.recent = window, sink, compressed, recent
        self.reuse, self.compat = reuse, compat

    def start(self, batch: int) -> State:
        return {"sink": [], "compressed": [], "recent": [], "asked": [], "base": None}

    # read

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        return self.placed(self.held(state, layer), state, now)

    def attend(
        self, state: State, now: Now, read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]
    ) -> Pattern | None:
        return Participative(self, state, now, context) if self._overflows(state, now) else None

    def held(self, state: State, layer: int) -> list[Bank]:
        return [state[name][layer] for name in ("sink", "compressed", "recent") if state[name]]

    def _overflows(self, state: State, now: Now) -> bool:
        """Is the window too full for the coming chunk, so that tokens must leave?"""
        tokens = sum(bank.tokens for bank in self.held(state, 0)) + self.layout.tokens(now.frames)
        return self.compressed > 0 and tokens > self.layout.tokens(self.window)

    def placed(self, banks: list[Bank], state: State, now: Now) -> list[Bank]:
        """Put banks where the chunk sees them, oldest first."""
        if self.compat:
            base = self._base(state, now)
            return banks if base is None else [self._from(banks[0], base), *banks[1:]]
        spans = [-(-bank.tokens // self.layout.tokens_per_frame) for bank in banks]
        return [self._from(bank, now.frame - sum(spans[i:])) for i, bank in enumerate(banks)]

    def _from(self, bank: Bank, start: int) -> Bank:
        """Place a bank's tokens from latent frame `start` on, a frame for every frame's worth of them."""
        rank = torch.arange(bank.tokens, device=bank.keys.device).view(1, *bank.keys.shape[1:3])
        return bank.at((start + rank // self.layout.tokens_per_frame).expand(bank.keys.shape[:3]))

    def _base(self, state: State, now: Now) -> int | None:
        """Where the published program puts the sink; None: where it was made."""
        frames = sum(bank.items for bank in self.held(state, 0)) + now.frames
        if self._overflows(state, now) or (self.compressed == 0 and self.sink and frames == self.window):
            return max(now.frame - self.sink - self.compressed - self.recent, int(state["sink"][0].born[0, 0]))
        return state["base"]

    # write

    def write(self, state: State, written: Written) -> State:
        now, full = written.now, self._overflows(state, written.now)
        sinks, recents, asked = [], [], []
        for layer, seen in enumerate(written.layers):
            new = written.bank(layer)
            sink = state["sink"][layer] if state["sink"] else new.first(0)
            recent = state["recent"][layer] if state["recent"] else new.first(0)
            missing = self.sink - sink.items
            sinks.append(sink.join(new.first(missing)) if missing else sink)
            recent = recent.last(self.recent - now.frames) if full else recent
            recents.append(recent.join(new.after(missing) if missing else new))
            turn = rotation(written.positions, self.layout.head_dim)
            query = rotate(seen.query.detach(), *turn).float().unflatten(1, (now.frames, -1)).sum(2)  # [B, F, H, D]
            query = torch.cat((state["asked"][layer], query), 1) if state["asked"] else query
            asked.append(query[:, max(query.shape[1] - (self.recent - self.layout.frames_per_chunk), 0) :])
        state = {**state, "sink": sinks, "recent": recents, "base": self._base(state, now)}
        if self.compressed:
            state["asked"] = asked
        if full:
            state["compressed"] = [written.pattern.kept[layer] for layer in range(len(written.layers))]
        return state

    def update(self, state: State, written: Written) -> State:
        if self.compressed:
            return state
        past = self.window - self.sink - self.layout.frames_per_chunk
        return {**state, "recent": [bank.last(past) for bank in state["recent"]]}


class Participative(Buffered):
    """Attends to everything read that the chunk's first queries choose; `kept` holds the chosen tokens by layer."""

    def __init__(self, policy: DeepSink, state: State, now: Now, context: Sequence[tuple[Tensor, Tensor]]):
        super().__init__(list(context))
        self.policy, self.state, self.now = policy, state, now
        self.kept: dict[int, Bank] = {}

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
        if layer not in self.kept:
            self._choose(layer, query.detach())
        return super().__call__(layer, query, key, value)

    def _choose(self, layer: int, query: Tensor) -> None:
        """Compress the layer's context to what sink, chosen tokens and recent frames hold."""
        policy, now = self.policy, self.now
        sink, *older, recent = policy.held(self.state, layer)
        split = max(recent.items - (policy.recent - now.frames), 0)
        older = [*older, recent.first(split)]
        recent = recent.after(split)

        keys, values, positions = (
            torch.cat([getattr(bank, name).flatten(1, 2) for bank in older], 1)
            for name in ("keys", "values", "positions")
        )
        reuse = torch.cat(
            [bank.notes.get("reuse", torch.zeros_like(bank.positions[..., 0])).flatten(1) for bank in older], 1
        )
        asked = query.float().sum(1) + self.state["asked"][layer].sum(1)  # [B, H, D]
        rotated = self.context[layer][0][:, sink.tokens : sink.tokens + keys.shape[1]]
        score = torch.einsum("bhd,bnhd->bn", asked, rotated.float()).masked_fill(reuse >= policy.reuse, float("-inf"))
        count = min(policy.layout.tokens(policy.compressed), keys.shape[1])
        best = score.topk(count).indices.sort(1).values

        def pick(x: Tensor) -> Tensor:  # [B, N, ...] -> [B, 1, count, ...]
            return x.gather(1, best.view(*best.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))[:, None]

        born = torch.full((len(best), 1), now.frame - 1, device=best.device)  # the last frame there was to choose from
        chosen = Bank(
            pick(keys),
            pick(values),
            pick(positions),
            born,
            torch.full_like(born, -1),
            pick(score).mean(2),
            {"reuse": pick(reuse) + 1},
        )
        self.kept[layer] = chosen
        banks = policy.placed([sink, chosen, recent], self.state, now)
        keys, values, positions = (
            torch.cat([getattr(bank, name).flatten(1, 2) for bank in banks], 1)
            for name in ("keys", "values", "positions")
        )
        self.context[layer] = rotate(keys, *rotation(positions, keys.shape[-1])), values
