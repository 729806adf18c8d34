"""SlotMemory (arXiv 2605.31033): sink and window, and an object-centric bank of tokens that slots bound to entities.

After every clean pass an adapter maps each layer's features to the slot space, and slot attention, started from the
slots predicted from the chunk before, assigns the chunk's tokens to slots (3 iterations first, 2 later). Every
`record_every` chunks each slot stores its `tokens_per_slot` best tokens - their original un-rotated keys and values - as
one item with the slot's vector. Before a chunk is made, items are scored by relevance, 0.7 text + 0.3 visual cosine, and
the best are read in the same softmax as sink and window; over capacity, the lowest scores leave.

What the paper leaves open, and what is done here (letters of the argument that switches it):
- Chunk = the latent frames denoised together; slots are updated every chunk, recorded every third (`record_every`).
- Features: the input of self-attention, normed and modulated, as the clean pass saw it (a pass without gradients: slots
  teach the backbone nothing unless a trainer opens that way); adapter LayerNorm + Linear per layer;
  one grouper for all layers, its own assignment in each.
- Tokens come from the first latent frame of the chunk (`store`: first, balanced over its frames, or all of them), each
  token in one slot only (`exclusive`), so that keys are never doubled.
- The first chunk is not recorded while a sink holds it (`record_first`).
- Text relevance: cosine of the prompt's mean cross-attention key with the mean cross-attention query of the item's own
  tokens (`text_by="query"`), the pair of spaces that the model trained to be compared; "key" compares with the item's
  mean self-attention key, as MemFlow's code does. Padding words are left out.
- Visual relevance: the best cosine between the item's slot and the slots predicted for the coming chunk.
- Scores enter as they are; `standardise` brings both terms to mean 0 and variance 1 within a layer first.
- Budget: `bank` records of `slots` items. New items are never evicted by the update that wrote them; slots with less
  than 1 / (4 S) of the chunk go first. `top_k` limits what is read (default: everything kept).
- Items that sink or window still show are read all the same (`overlap`), as in the published family.
- A prompt switch leaves bank and slots alone; scores are computed with the new prompt from its first chunk on.
All slot mathematics runs in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._placing import place
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State, Written
from slotmemory.slots import Grouper, LayerAdapters, measure, select
from slotmemory.slots.learning import Learning, Lesson, losses

STORES = {"first": "first", "balanced": "balanced", "all": None}


class Slots(Sink):
    """Sink, window and a bank of slot items; arguments of `sink` apply.

    slots, slot_dim: how many entities and how wide their vectors; tokens_per_slot: tokens of an item; bank: records
    kept; record_every: chunks between records; text_weight: the text's share of relevance; top_k: items read;
    attn_scale: see `slots.Predictor`; weights: trained ones, see `Engine.with_memory`.
    """

    source = "SlotMemory (arXiv 2605.31033)"

    def __init__(
        self,
        layout: Layout,
        budget: int | None = None,
        *,
        slots: int = 7,
        slot_dim: int = 64,
        tokens_per_slot: int = 64,
        bank: int = 6,
        record_every: int = 3,
        record_first: bool = False,
        store: str = "first",
        exclusive: bool = True,
        overlap: bool = True,
        text_weight: float = 0.7,
        text_by: str = "query",
        standardise: bool = False,
        top_k: int | None = None,
        attn_scale: str = "standard",
        weights: str = "",
        **options,
    ):
        if store not in STORES:
            raise InputError(unknown("store", store, STORES))
        if text_by not in ("query", "key"):
            raise InputError(unknown("text_by", text_by, ("query", "key")))
        for name, value, least in (("slots", slots, 1), ("bank", bank, 0), ("record_every", record_every, 1)):
            if value < least:
                raise InputError(f"{name}={value} is too small; use {least} or more")
        per_record = slots * tokens_per_slot
        if budget is None:
            super().__init__(layout, None, **options)
            self.budget += bank * per_record
        else:
            # the bank is paid for first; sink and window share what is left
            bank = min(bank, budget // per_record)
            super().__init__(layout, budget - bank * per_record, **options)
            self.budget = budget
        tokens = layout.tokens_per_chunk if store != "first" else layout.tokens_per_frame
        most = tokens // slots if exclusive else tokens
        if not 1 <= tokens_per_slot <= most:
            raise InputError(
                f"slots={slots} of tokens_per_slot={tokens_per_slot} are {per_record} tokens, but a record chooses from "
                f"{tokens}; use tokens_per_slot from 1 to {most}"
            )
        self.num_slots, self.tokens_per_slot, self.capacity = slots, tokens_per_slot, bank * slots
        self.record_every, self.record_first = record_every, record_first
        self.store, self.exclusive, self.overlap = STORES[store], exclusive, overlap
        self.text_weight, self.text_by, self.standardise, self.top_k = text_weight, text_by, standardise, top_k
        with torch.random.fork_rng(devices=[]):  # untrained slots are the same in every process
            torch.manual_seed(0)
            self.adapters = LayerAdapters(layout.layers, layout.model_width, slot_dim)
            self.grouper = Grouper.fresh(slots, slot_dim, attn_scale)
        self.attn_scale, self.weights = attn_scale, weights
        self.learning = Learning()

    def start(self, batch: int) -> State:
        return {**super().start(batch), "slots": [], "running": None, "mass": None, "lesson": None, "chunks": 0}

    # read

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        context = super().read(state, layer, now)
        if not state["slots"] or not state["slots"][layer].items:
            return context
        bank = state["slots"][layer]
        if not self.overlap:
            bank = self._unseen(bank, state, layer)
        if self.top_k is not None and self.top_k < bank.items:
            score = self._relevance(bank, self._predicted(state, layer), now, layer)
            bank = bank.take(score.topk(self.top_k, sorted=False).indices.sort(1).values)
        return [*place([bank], now, "native" if self.placing == "relative" else self.placing, self.reach), *context]

    def _unseen(self, bank: Bank, state: State, layer: int) -> Bank:
        """Leave out items of frames that sink or window still show; all rows are in step, so row 0 tells."""
        shown = [state[name][layer].born[0] for name in ("sink", "window") if state[name]]  # a switch may empty both
        if not shown:
            return bank
        shown = torch.cat(shown)
        return bank.take((~torch.isin(bank.born[0], shown)).nonzero()[:, 0].expand(len(bank.born), -1))

    def _predicted(self, state: State, layer: int) -> Tensor:
        return self.grouper.predict(state["running"][layer])  # [B, S, C]

    def _relevance(self, bank: Bank, predicted: Tensor, now: Now, layer: int) -> Tensor:
        """Score items for what comes next: [B, M] fp32."""
        words = now.words(layer).flatten(1)[:, None]  # [B, 1, H D]
        meaning = bank.notes["query"] if self.text_by == "query" else bank.keys.float().mean(2)
        text = F.cosine_similarity(words, meaning.flatten(2).float(), -1)
        slots = F.normalize(bank.notes["slot"], dim=-1) @ F.normalize(predicted, dim=-1).mT  # [B, M, S]
        visual = slots.amax(-1)
        if self.standardise:
            text, visual = (_standard(x) for x in (text, visual))
        score = self.text_weight * text + (1 - self.text_weight) * visual
        # a slot that held almost nothing of its chunk stands for nothing
        return score.masked_fill(bank.notes["mass"] < 1 / (4 * self.num_slots), float("-inf"))

    # write

    def write(self, state: State, written: Written) -> State:
        state = super().write(state, written)
        if written.now.replay:
            return state
        layers = len(written.layers)
        tokens = torch.stack([self.adapters.one(i, seen.hidden) for i, seen in enumerate(written.layers)])
        rows = tokens.flatten(0, 1)  # [layers B, N, C]
        running = state["running"]
        grouping = self.grouper.first(rows) if running is None else self.grouper.next(running.flatten(0, 1), rows)
        bound, assignment = (x.unflatten(0, (layers, -1)) for x in grouping)  # [layers, B, S, ...]
        mass = measure.mass(assignment).detach()
        lesson = None
        if torch.is_grad_enabled():
            lesson = vars(Lesson(bound, assignment, tokens, running, state["mass"], written.now.switched))
        chunk = state["chunks"]
        state = {**state, "running": bound, "mass": mass, "lesson": lesson, "chunks": chunk + 1}
        if not self._records(chunk):
            return state
        chosen = select(
            assignment,
            self.tokens_per_slot,
            exclusive=self.exclusive,
            latents=written.frames,
            frames=self.store,
        )
        new = [self._items(written, i, chosen.indices[i], bound[i], chosen.mass[i]) for i in range(layers)]
        old = state["slots"]
        return {**state, "slots": [a.join(b) for a, b in zip(old, new)] if old else new}

    def _records(self, chunk: int) -> bool:
        """chunk: how many were written before it, those of a given past too, which have no chunk numbers."""
        return chunk % self.record_every == 0 and (self.record_first or self.sink == 0 or chunk > 0)

    def _items(self, written: Written, layer: int, indices: Tensor, bound: Tensor, mass: Tensor) -> Bank:
        """Gather each slot's tokens as one item: indices [B, S, R], bound [B, S, C], mass [B, S]."""
        seen = written.layers[layer]

        def gather(x: Tensor) -> Tensor:  # [B, N, ...] -> [B, S, R, ...]
            flat = indices.flatten(1)
            picked = x.gather(1, flat.view(*flat.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
            return picked.unflatten(1, indices.shape[1:])

        positions = gather(written.positions.expand(len(indices), -1, -1))
        born = torch.full(indices.shape[:2], written.now.frame, device=indices.device)
        return Bank(
            gather(seen.keys.detach()),
            gather(seen.values.detach()),
            positions,
            born,
            torch.arange(self.num_slots, device=indices.device).expand(born.shape),
            torch.zeros(born.shape, device=indices.device),
            {
                "query": gather(seen.text_query.detach()).float().mean(2),
                "slot": bound.detach(),
                "mass": mass,
            },
        )

    # what is learnt

    def losses(self, state: State) -> dict[str, Tensor]:
        """Contrast with the chunk before and, where `learning` says so, reconstruction; none without gradients."""
        lesson = state["lesson"]
        return losses(Lesson(**lesson), self.learning) if lesson else {}

    # update

    def update(self, state: State, written: Written) -> State:
        state = super().update(state, written)
        if not state["slots"]:
            return state
        return {**state, "slots": [self._evict(state, layer, written.now) for layer in range(len(state["slots"]))]}

    def _evict(self, state: State, layer: int, now: Now) -> Bank:
        """Refresh the scores and keep the best; what was just written stays."""
        bank = state["slots"][layer]
        score = self._relevance(bank, self._predicted(state, layer), now, layer)
        bank = Bank(**{**vars(bank), "score": score})
        if bank.items <= self.capacity:
            return bank
        rank = score.masked_fill(bank.born == now.frame, float("inf"))
        keep = rank.topk(self.capacity).indices.sort(1).values  # in order of writing
        return bank.take(keep)


def _standard(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, dim=-1, keepdim=True, unbiased=False)
    return (x - mean) / (std + 1e-6)
