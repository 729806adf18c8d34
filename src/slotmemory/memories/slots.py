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

Ablations; each changes one thing, and bank, budget, tokens per slot and scores keep their meaning:
- `grouping` deals the tokens: "learned" by slot attention; "shuffled" the same, but tokens then trade places at random
  within their latent frame; "kmeans" clusters of the adapted tokens, started from those of the chunk before; "grid" fixed
  rectangles; "oracle" masks from the file `masks` (`_masks.py`), whose ids own the items. A group of the last three is
  represented, and expected in the coming chunk, by the mean of its adapted tokens; slots run, and learn, beside them.
- `retrieval` scores: "relevance"; "text" and "visual" are `text_weight` 1 and 0; "random" draws anew for every chunk.
- `seed` is for what they draw, which depends on it, the chunk and the layer alone.

Beyond the paper, all off by default (its stated limits, 4.4; `slots/entities.py` says how):
- `merge`, a cosine such as 0.9 (SOLV, arXiv 2310.06907: 0.88): slots more alike are one; tokens are bound once more.
- `identify`, a cosine such as 0.8: owners are entities and no longer numbers of slots. A slot that becomes unlike itself or
  appears takes the identity of the most similar item in the bank, else a new one is born; one that disappears stays in
  the bank. With `merge` or `identify`, a slot merged away or with less than 1 / (4 S) of the chunk stores nothing.
- `floor`: the newest items of every owner that others cannot push out of the bank, as long as floors fit into it.
- `evict="redundancy"`: over capacity, of the two items most alike the less relevant leaves, so that the bank covers what
  was seen. Relevance alone evicts whoever is away, for the prompt does not name them (`slots/redundancy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memories._masks import load_masks, masks_of
from slotmemory.memories._placing import place
from slotmemory.memories._ragged import Padded, best, hiding_padding, packed, real, standard
from slotmemory.memories.sink import Sink
from slotmemory.memory import Bank, Now, State, Written
from slotmemory.slots import Grouper, LayerAdapters, measure, select
from slotmemory.slots.entities import Merged, identify, merge, whole
from slotmemory.slots.groupings import cells, dice, kmeans, labelled, ranked, shuffled
from slotmemory.slots.learning import Learning, Lesson, losses
from slotmemory.slots.redundancy import covering

STORES = {"first": "first", "balanced": "balanced", "all": None}
GROUPINGS = ("learned", "shuffled", "kmeans", "grid", "oracle")
RETRIEVALS = ("relevance", "text", "visual", "random")
EVICTIONS = ("relevance", "redundancy")


class Slots(Sink):
    """Sink, window and a bank of slot items; arguments of `sink` apply.

    slots, slot_dim: how many entities and how wide their vectors; tokens_per_slot: tokens of an item; bank: records
    kept; record_every: chunks between records; text_weight: the text's share of relevance; top_k: items read;
    attn_scale: see `slots.Predictor`; weights: trained ones, see `Engine.with_memory`. grouping, masks, retrieval, seed:
    ablations; merge, identify, floor: dynamic slots, 0 is off; evict: who leaves a full bank.
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
        grouping: str = GROUPINGS[0],
        masks: str = "",
        retrieval: str = RETRIEVALS[0],
        seed: int = 0,
        merge: float = 0.0,
        identify: float = 0.0,
        floor: int = 0,
        evict: str = EVICTIONS[0],
        **options,
    ):
        for name, value, known in (
            ("store", store, STORES),
            ("text_by", text_by, ("query", "key")),
            ("grouping", grouping, GROUPINGS),
            ("retrieval", retrieval, RETRIEVALS),
            ("evict", evict, EVICTIONS),
        ):
            if value not in known:
                raise InputError(unknown(name, value, known))
        if bool(masks) != (grouping == "oracle"):
            raise InputError(
                f"grouping={grouping} with masks={masks!r}: oracle groups by a file of masks, no other does"
            )
        at_least = {"slots": (slots, 1), "bank": (bank, 0), "record_every": (record_every, 1), "floor": (floor, 0)}
        for name, (value, least) in at_least.items():
            if value < least:
                raise InputError(f"{name}={value} is too small; use {least} or more")
        for name, value in (("merge", merge), ("identify", identify)):
            if not 0 <= value <= 1:
                raise InputError(f"{name}={value} is no cosine from 0 to 1; use one such as 0.9, or 0 for off")
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
        self.text_weight = {"text": 1.0, "visual": 0.0}.get(retrieval, text_weight)
        self.text_by, self.standardise, self.top_k = text_by, standardise, top_k
        self.grouping, self.retrieval, self.seed = grouping, retrieval, seed
        self.merge, self.identify, self.floor, self.evict = merge, identify, floor, evict
        self.slotted, self.dynamic = grouping in ("learned", "shuffled"), bool(merge or identify)
        self.register_buffer("cells", cells(layout.grid, slots), persistent=False)
        self.register_buffer("masks", load_masks(masks, layout) if masks else None, persistent=False)
        with torch.random.fork_rng(devices=[]):  # untrained slots are the same in every process
            torch.manual_seed(0)
            self.adapters = LayerAdapters(layout.layers, layout.model_width, slot_dim)
            self.grouper = Grouper.fresh(slots, slot_dim, attn_scale)
        self.attn_scale, self.weights = attn_scale, weights
        self.learning = Learning()

    def start(self, batch: int) -> State:
        """running, mass: slots [L, B, S, C] of the last chunk and their shares; groups, owners: what stood for its tokens,
        [L, B, S, C], and whose each is [L, B, S], -1: not active; labels [L, B, N] uint8: the group of each of its tokens;
        births [L, B]: identities given so far."""
        nothing = dict.fromkeys(("running", "mass", "lesson", "groups", "owners", "labels", "births"))
        return {**super().start(batch), "slots": [], **nothing, "chunks": 0, "latents": 0}

    # read

    def read(self, state: State, layer: int, now: Now) -> list[Bank]:
        context = super().read(state, layer, now)
        if not state["slots"] or not state["slots"][layer].items:
            return context
        bank = state["slots"][layer]
        if not self.overlap:
            bank = self._unseen(bank, state, layer)
        if self.top_k is not None and self.top_k < bank.items:
            # draws are what they were when the chunk was written
            score = bank.score if self.retrieval == "random" else self._relevance(bank, state, now, layer)
            score = score.masked_fill(~real(bank), float("-inf"))
            bank = bank.take(score.topk(self.top_k, sorted=False).indices.sort(1).values)
        return [*place([bank], now, "native" if self.placing == "relative" else self.placing, self.reach), *context]

    def _unseen(self, bank: Bank, state: State, layer: int) -> Bank:
        """Leave out items of frames that sink or window still show; their frames are the same in all rows."""
        shown = [state[name][layer].born[0] for name in ("sink", "window") if state[name]]  # a switch may empty both
        return packed(bank, real(bank) & ~torch.isin(bank.born, torch.cat(shown))) if shown else bank

    def attend(
        self, state: State, now: Now, read: Sequence[list[Bank]], context: Sequence[tuple[Tensor, Tensor]]
    ) -> Padded | None:
        return hiding_padding(read, context) if self.dynamic or not self.overlap else None

    def _relevance(self, bank: Bank, state: State, now: Now, layer: int) -> Tensor:
        """Score items for what comes next: [B, M] fp32."""
        if self.retrieval == "random":
            drawn = torch.rand(bank.items, generator=dice(self.seed, state["chunks"], layer)).to(bank.keys.device)
            score = drawn[(real(bank).cumsum(1) - 1).clamp_min(0)]  # padding takes no draw from a row's items
        else:
            score = self._similarity(bank, state, now, layer)
        # a slot that held almost nothing of its chunk stands for nothing
        return score.masked_fill(bank.notes["mass"] < 1 / (4 * self.num_slots), float("-inf"))

    def _similarity(self, bank: Bank, state: State, now: Now, layer: int) -> Tensor:
        words = now.words(layer).flatten(1)[:, None]  # [B, 1, H D]
        meaning = bank.notes["query"] if self.text_by == "query" else bank.keys.float().mean(2)
        text = F.cosine_similarity(words, meaning.flatten(2).float(), -1)
        expected = self.grouper.predict(state["running"][layer]) if self.slotted else state["groups"][layer]
        slots = F.normalize(bank.notes["slot"], dim=-1) @ F.normalize(expected, dim=-1).mT  # [B, M, S]
        visual = slots.masked_fill((state["owners"][layer] < 0)[:, None], -1).amax(-1)
        if self.standardise:
            text, visual = (standard(x, real(bank)) for x in (text, visual))
        return self.text_weight * text + (1 - self.text_weight) * visual

    # write

    def write(self, state: State, written: Written) -> State:
        state = super().write(state, written)
        if written.now.replay:
            return state
        layers = len(written.layers)
        hidden = [seen.hidden for seen in written.layers]
        bound, lesson = self.bind(state["running"], state["mass"], hidden, written.now.switched)
        groups, owners = self._group(state, bound, lesson.tokens, written)
        owners, births = self._identify(state, groups, owners)
        chunk = state["chunks"]
        state = {
            **state,
            "running": bound.slots,
            "mass": measure.mass(bound.assignment).detach(),
            "lesson": vars(lesson) if torch.is_grad_enabled() else None,
            "groups": groups.slots.detach(),
            "owners": owners,
            "labels": groups.assignment.argmax(-2).to(torch.uint8),
            "births": births,
            "chunks": chunk + 1,
            "latents": state["latents"] + written.frames,
        }
        if not self._records(chunk):
            return state
        chosen = select(
            groups.assignment,
            self.tokens_per_slot,
            exclusive=self.exclusive,
            latents=written.frames,
            frames=self.store,
        )
        new = [self._items(written, i, chosen.indices[i], state, chosen.mass[i]) for i in range(layers)]
        old = state["slots"]
        return {**state, "slots": [a.join(b) for a, b in zip(old, new)] if old else new}

    def bind(
        self, running: Tensor | None, mass: Tensor | None, hidden: Sequence[Tensor], switched: bool
    ) -> tuple[Merged, Lesson]:
        """Bind a chunk's features to slots: hidden [B, N, W] of every layer; running, mass: slots of the chunk before.

        -> the slots, and what there is to learn from them; `write` does this, and trainings on features alone."""
        tokens = torch.stack([self.adapters.one(layer, x) for layer, x in enumerate(hidden)])
        bound = self._bind(running, tokens)
        kept = list(hidden) if self.learning.decode else None
        return bound, Lesson(bound.slots, bound.assignment, tokens, running, mass, switched, kept)

    def _bind(self, running: Tensor | None, tokens: Tensor) -> Merged:
        """Bind tokens [L, B, N, C] to slots; duplicates are merged if asked."""
        rows = tokens.flatten(0, 1)  # [L B, N, C]
        found = whole(self.grouper.first(rows) if running is None else self.grouper.next(running.flatten(0, 1), rows))
        if self.merge and self.slotted:
            merged = merge(found.slots, found.assignment, self.merge)
            again = Merged(*self.grouper.again(merged.slots, rows, merged.alive), merged.alive)
            changed = ~merged.alive.all(-1)[:, None, None]
            found = Merged(*(torch.where(changed, *pair) for pair in zip(again[:2], found)), merged.alive)
        return Merged(*(x.unflatten(0, (len(tokens), -1)) for x in found))

    def _group(self, state: State, bound: Merged, tokens: Tensor, written: Written) -> tuple[Merged, Tensor]:
        """Deal tokens [L, B, N, C] as `grouping` says: the groups, and the owner of each [L, B, S]."""
        owners = torch.arange(self.num_slots, device=tokens.device).expand(bound.alive.shape)
        if self.grouping == "learned":
            return bound, owners
        if self.grouping == "shuffled":
            dealt = shuffled(bound.assignment, written.frames, dice(self.seed, state["chunks"]))
            return bound._replace(assignment=dealt), owners
        if self.grouping == "kmeans":
            labels = kmeans(tokens, self.num_slots, state["groups"])
        elif self.grouping == "grid":
            labels = self.cells.repeat(written.frames)
        else:
            ids = masks_of(self.masks, state["latents"], written.frames, tokens.shape[1])
            labels, names = ranked(ids, self.num_slots, int(self.masks.max()) + 1)
            owners = names.expand(owners.shape)
        found = labelled(tokens, labels, self.num_slots)
        return merge(*found, self.merge) if self.merge else whole(found), owners

    def _identify(self, state: State, groups: Merged, owners: Tensor) -> tuple[Tensor, Tensor | None]:
        """Whose each group is [L, B, S], -1 where it is not active; and how many identities were given [L, B]."""
        if not self.dynamic:
            return owners, None
        active = groups.alive & measure.present(measure.mass(groups.assignment))
        if not self.identify:
            return owners.masked_fill(~active, -1), None
        births = torch.zeros_like(owners[..., 0]) if state["births"] is None else state["births"]
        found = []
        for layer, slots in enumerate(groups.slots):
            earlier = None if state["owners"] is None else (state["groups"][layer], state["owners"][layer])
            stored = (state["slots"][layer].notes["slot"], state["slots"][layer].owner) if state["slots"] else None
            found.append(identify(slots, active[layer], self.identify, births[layer], earlier, stored))
        return tuple(torch.stack(parts) for parts in zip(*found))

    def _records(self, chunk: int) -> bool:
        """chunk: how many were written before it, those of a given past too, which have no chunk numbers."""
        return chunk % self.record_every == 0 and (self.record_first or self.sink == 0 or chunk > 0)

    def _items(self, written: Written, layer: int, indices: Tensor, state: State, mass: Tensor) -> Bank:
        """Gather each group's tokens as one item: indices [B, S, R], mass [B, S]; dynamic slots only where active."""
        seen, owner = written.layers[layer], state["owners"][layer]

        def gather(x: Tensor) -> Tensor:  # [B, N, ...] -> [B, S, R, ...]
            flat = indices.flatten(1)
            picked = x.gather(1, flat.view(*flat.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
            return picked.unflatten(1, indices.shape[1:])

        positions = gather(written.positions.expand(len(indices), -1, -1))
        born = torch.full(indices.shape[:2], written.now.frame, device=indices.device)
        items = Bank(
            gather(seen.keys.detach()),
            gather(seen.values.detach()),
            positions,
            born,
            owner,
            torch.zeros(born.shape, device=indices.device),
            {
                "query": gather(seen.text_query.detach()).float().mean(2),
                "slot": state["groups"][layer],
                "mass": mass,
            },
        )
        return packed(items, owner >= 0) if self.dynamic else items

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
        """Refresh the scores and keep the best: what was just written first, then every owner's floor."""
        bank = replace(state["slots"][layer], score=self._relevance(state["slots"][layer], state, now, layer))
        if bank.items <= self.capacity:
            return bank
        counted = real(bank) & bank.score.isfinite()
        newer = (bank.owner[:, :, None] == bank.owner[:, None]) & counted[:, None]  # items are in order of writing
        floored = counted & (newer.triu(1).sum(-1) < self.floor)
        rank = torch.where(bank.born == now.frame, 3, 2 * floored)
        if self.evict == "redundancy":
            looks = bank.values.float().mean(2).flatten(2)
            rank = rank.clamp_min(covering(looks, bank.score, real(bank), rank == 0, self.capacity).long())
        return best(bank, rank, self.capacity)

    # what is seen from outside

    def look(self, state: State) -> dict[str, Tensor]:
        """{"labels": [L, B, N]}: the group of each token of the last chunk; {"owners": [L, B, S]}: whose each group is, -1
        where it is not active."""
        return {name: state[name] for name in ("labels", "owners") if state[name] is not None}
