"""Flow matching of the causal transformer in the narrative world: clean and noisy chunks side by side.

A clip is two distant chunks (the video's first and one that a memory might give back) and a run of consecutive ones.
Its clean chunks are encoded once; several noisy copies of the run share them as context: [sink | memory | two past
chunks | itself]. Which of these a noisy chunk may see is drawn per copy, so that the model learns to start from text alone,
to go on from a window, and to take a returning entity from a distant chunk or a part of one. A share of the steps shows
single latent frames and their prompts instead: five times as many pictures for the same arithmetic, and looks come first.

The model's own mistakes are part of its past when it streams. In a share of the steps, some clean chunks of the run are
what the model makes of them in one step from noise, so that it learns to mend what it reads rather than to add to it.

Rows of a batch are chunks (`attention.Rows`); keys are placed by role, so that distances stay small however long a video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from slotmemory.backbones.attention import Rows
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.sampler import FlowSchedule, add_noise, flow_to_x0
from slotmemory.training import loop
from slotmemory.training.narratives import HELD_OUT, Encoded, Pool, PoolSize, Refresh, Seconds, encode
from slotmemory.training.pack import EMBEDDED, settings_of
from slotmemory.training.recipe import Frozen
from slotmemory.training.shown import Probe, probe_loss
from slotmemory.world.narrative import Narrative

SINK, MEMORY = 0, 1
DISTANT = 2


class Options(Frozen):
    """Sizes of the model, and how clips are drawn."""

    codec: str = Field(description="weights of the codec, relative to the working directory")
    settings: str = Field(
        EMBEDDED,
        description="how the model will be sampled, and its memories' defaults: a model's name or folder, or a model.json",
    )
    dim: int = 256
    ffn_dim: int = 1024
    heads: int = 4
    layers: int = 6
    freq_dim: int = 128
    text_dim: int = 128
    text_len: int = 12
    patch: int = Field(2, description="latent cells of a token, each way")
    seconds: Seconds = 24.0
    pool: PoolSize = 64
    refresh: Refresh = 2
    run: int = Field(5, description="consecutive chunks of a clip")
    copies: int = Field(2, description="noisy copies of a run")
    past: int = Field(2, description="past chunks that a chunk sees")
    far: int = Field(8, description="chunks by which a distant one precedes the run, at most")
    at_levels: float = Field(0.7, description="share of noise levels drawn from those that the few-step sampler visits")
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    context_noise: float = Field(0.2, description="largest noise level of a clean chunk")
    noised: float = Field(0.6, description="share of clean chunks that are noised")
    entity_weight: float = Field(3.0, description="weight of the loss where entities are")
    no_text: float = 0.05
    no_sink: float = Field(0.6, description="share of batches without the video's first chunk; these are cheaper")
    short: float = Field(0.6, description="share of batches in which a chunk sees one past chunk only; cheaper too")
    no_memory: float = 0.2
    no_past: float = 0.1
    alone: float = Field(0.6, description="share of the run's first chunks that see nothing at all")
    returns: float = Field(0.0, description="share of clips about a return: the distant chunk shows who comes back")
    shift: float = Field(5.0, description="warp of the noise levels that are drawn evenly")
    stills: float = Field(0.0, description="share of the steps that show single latent frames without a past")
    still_rows: int = Field(64, description="latent frames of such a step, per clip of the batch")
    own: float = Field(0.0, description="share of the clip steps with predictions of the model's own in the past")
    own_below: float = Field(0.93, description="noise level up to which such a prediction stands in for its chunk")
    probe: float = Field(0.0, description="weight of what inner features should tell about the picture (shown.py)")
    probe_layer: int = Field(3, description="block whose input is asked")


@dataclass
class Batch:
    """Rows of chunks: latents [R, F, C, h, w], frames [R, F], sigma [R], table [R, K], hidden [R, N], weight [R, N].

    labels [R, N, 5] and places [R, N, 2] say what each token shows; stand_ins: pairs (clean row, noisy row of the same
    chunk), in which the model's prediction of the latter may replace the former."""

    latents: Tensor
    frames: Tensor
    sigma: Tensor
    table: Tensor
    hidden: Tensor
    weight: Tensor
    prompts: list[str]
    noisy: Tensor  # [R] bool
    labels: Tensor | None = None
    places: Tensor | None = None
    stand_ins: tuple[tuple[int, int], ...] = ()


def columns_in_use(table: Tensor) -> Tensor:
    """Drop the columns in which no row sees anything: fewer keys to gather."""
    return table[:, (table >= 0).any(0)]


def returns_in(item: Encoded, past: int) -> list[tuple[int, int]]:
    """Name all returns (first chunk of a shot, entity): seen before, not in the `past` chunks before the shot, then there;
    who comes in from the side is there in the shot's second chunk."""
    found = []
    for start in item.starts:
        gap = max(0, start - past)
        before = set().union(*item.visible[:gap]) - set().union(*item.visible[gap:start])
        found += [(start, entity) for entity in sorted(before & set().union(*item.visible[start : start + 2]))]
    return found


class Objective(loop.Objective):
    """Train the transformer and the word encoder on latents of a fixed codec."""

    def __init__(self, options: Options, context: loop.Context):
        self.options, self.context = options, context
        self.settings = settings_of(options.settings)
        self.codec = PreviewCodec.load(options.codec).to(context.device, context.dtype).eval().requires_grad_(False)
        self.transformer = CausalWan(
            WanConfig(
                dim=options.dim,
                ffn_dim=options.ffn_dim,
                num_heads=options.heads,
                num_layers=options.layers,
                freq_dim=options.freq_dim,
                text_dim=options.text_dim,
                text_len=options.text_len,
                in_dim=self.codec.latent_channels,
                out_dim=self.codec.latent_channels,
                patch=(1, options.patch, options.patch),
            )
        )
        self.words = WordEncoder(options.text_dim, options.text_len)
        self.pool = Pool(self.make, options.pool, options.refresh, context.seed, context.rank)
        self.probe = Probe(options.dim)
        self.schedule = FlowSchedule()
        self.even = FlowSchedule(options.shift)
        self.shares = torch.tensor([options.stills, options.own])
        self.levels = torch.tensor([s / 1000 for s in options.steps])
        self.held_out: list[Encoded] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "words": self.words, "probe": self.probe}

    def networks(self) -> list[nn.Module]:
        return [self.transformer]

    auxiliary = frozenset({"probe"})

    def parameter_groups(self):
        # Muon is for hidden matrices; embeddings, the time path and the head are not
        plain = [
            f"transformer.{name}"
            for name, p in self.transformer.named_parameters()
            if p.ndim == 2 and not name.startswith("blocks.")
        ]
        plain += [f"words.{name}" for name, p in self.words.named_parameters() if p.ndim == 2]
        plain += [f"probe.{name}" for name, p in self.probe.named_parameters() if p.ndim == 2]
        return [{"names": plain, "optimizer": "adamw", "scale": 1.0}]

    def make(self, seed: int) -> Encoded:
        return encode(Narrative.random(seed, self.options.seconds), self.codec, patch=self.options.patch)

    # clips

    def clip_start(self, item: Encoded, random: torch.Generator) -> int:
        """Draw where a run begins: often at, or a little before, a new shot, because that is where memory matters."""
        kind, pick = torch.rand(2, generator=random).tolist()
        start = item.starts[int(pick * len(item.starts))]
        latest = item.chunks - self.options.run
        if kind < 0.35:
            place = start
        elif kind < 0.5:
            place = start - 1
        elif kind < 0.7:
            place = start - 2
        else:
            place = int(pick * (latest + 1))
        return min(max(place, 0), latest)

    def clip_of_return(self, item: Encoded, random: torch.Generator) -> tuple[int, int, int] | None:
        """Draw where a run begins that shows somebody's return, an earlier chunk that showed them, and the entity."""
        pick, lead, which = torch.rand(3, generator=random).tolist()
        found = returns_in(item, self.options.past)
        if not found:
            return None
        start, entity = found[int(pick * len(found))]
        earlier = [k for k in range(start) if entity in item.visible[k]]
        first = min(start - int(lead * (self.options.past + 1)), item.chunks - self.options.run)
        return first, earlier[int(which * len(earlier))], entity

    def memory_chunk(self, item: Encoded, start: int, random: torch.Generator) -> tuple[int, int]:
        """Draw a chunk outside the run, mostly one that shows an entity of the run -> (chunk, entity or -1)."""
        run = range(start, start + self.options.run)
        outside = [k for k in range(item.chunks) if k not in run]
        shown = sorted(set().union(*(item.visible[k] for k in run)))
        kind, which, pick = torch.rand(3, generator=random).tolist()
        if shown and kind < 0.9:
            entity = shown[int(which * len(shown))]
            chunks = [k for k in outside if entity in item.visible[k]]
            if chunks:
                return chunks[int(pick * len(chunks))], entity
        return outside[int(pick * len(outside))], -1

    def hide(self, item: Encoded, chunk: int, entity: int, random: torch.Generator) -> Tensor:
        """Draw which tokens of a distant chunk are kept from its readers: [N] bool, for memories keep parts of chunks."""
        frames, per_frame = 3, item.labels.shape[1]
        kind, share, frame = torch.rand(3, generator=random).tolist()
        hidden = torch.zeros(frames, per_frame, dtype=torch.bool)
        if kind < 0.3:
            return hidden.flatten()
        if kind < 0.5:  # one latent frame of the three
            hidden[:] = True
            hidden[int(frame * frames)] = False
        elif kind < 0.8 and entity >= 0:  # the entity's cells and their neighbours
            cells = item.cells[entity, chunk * frames : (chunk + 1) * frames].float()
            grown = F.max_pool2d(cells[:, None], 3, 1, 1)[:, 0] > 0
            hidden = ~grown.flatten(1)
            if share < 0.5:  # of one latent frame only
                hidden[torch.arange(frames) != int(frame * frames)] = True
        else:
            hidden = torch.rand(hidden.shape, generator=random) < 0.3 + 0.5 * share
        return hidden.flatten()

    def draw_sigma(self, count: int, random: torch.Generator) -> Tensor:
        s = torch.rand(count, generator=random)
        level = self.levels[torch.randint(len(self.levels), (count,), generator=random)]
        at_level = torch.rand(count, generator=random) < self.options.at_levels
        return torch.where(at_level, self.schedule.warp(level), self.even.warp(s.clamp(min=0.004)))

    def batch(self, items: list[Encoded], random: torch.Generator) -> Batch:
        """Draw one clip from each narrative given."""
        o, size = self.options, 3
        clean = o.run - 1
        per_clip = DISTANT + clean + o.copies * o.run
        tokens = items[0].labels.shape[1]
        use_sink, use_far_past = (torch.rand(2, generator=random) > torch.tensor([o.no_sink, o.short])).tolist()
        latents, frames, sigma, table, hidden, weight, prompts = [], [], [], [], [], [], []
        labels, places, stand_ins = [], [], []
        for number, item in enumerate(items):
            base = number * per_clip
            returns = float(torch.rand(1, generator=random)) < o.returns and self.clip_of_return(item, random)
            if returns:
                start, far, entity = returns
            else:
                start = self.clip_start(item, random)
                far, entity = self.memory_chunk(item, start, random)
            chosen = [0, far, *range(start, start + clean), *list(range(start, start + o.run)) * o.copies]
            away = -size * (1 + torch.randint(o.far, (2,), generator=random))
            firsts = [*away.tolist(), *(size * j for j in range(clean)), *[size * j for j in range(o.run)] * o.copies]
            for chunk, first in zip(chosen, firsts):
                latents.append(item.latents[chunk * size : (chunk + 1) * size])
                shown = item.cells[:, chunk * size : (chunk + 1) * size].any(0)
                weight.append(1.0 + (o.entity_weight - 1.0) * shown.flatten().float())
                frames.append(torch.arange(first, first + size))
                labels.append(item.labels[chunk * size : (chunk + 1) * size].flatten(0, 1))
                places.append(item.places[chunk * size : (chunk + 1) * size].flatten(0, 1))
                prompts.append(item.prompts[chunk])
                hidden.append(torch.zeros(size * tokens, dtype=torch.bool))
            hidden[base + MEMORY] = self.hide(item, far, entity, random)
            noised = torch.rand(DISTANT + clean, generator=random) < o.noised
            sigma.append(torch.rand(DISTANT + clean, generator=random) * o.context_noise * noised)
            sigma.append(self.draw_sigma(o.copies * o.run, random))
            table += self.rows(base, use_sink and start > 0, o.past if use_far_past else 1, random, bool(returns))
            stand_ins += [(base + DISTANT + j, base + DISTANT + clean + j) for j in range(clean)]
        sigma_all = torch.cat(sigma)
        noisy = torch.arange(per_clip) >= DISTANT + clean
        drop = torch.rand(len(prompts), generator=random) < o.no_text
        return Batch(
            torch.stack(latents),
            torch.stack(frames),
            sigma_all,
            columns_in_use(torch.tensor(table)),
            torch.stack(hidden),
            torch.stack(weight),
            ["" if gone else prompt for prompt, gone in zip(prompts, drop.tolist())],
            noisy.repeat(len(items)),
            torch.stack(labels),
            torch.stack(places),
            tuple(stand_ins),
        )

    def still_batch(self, items: list[Encoded], random: torch.Generator) -> Batch:
        """Draw single latent frames from all narratives given; each sees itself and its prompt."""
        rows = self.options.still_rows * self.context.batch
        which = torch.randint(len(items), (rows,), generator=random).tolist()
        shares = torch.rand(rows, generator=random).tolist()
        picked = [(items[i], int(share * len(items[i].latents))) for i, share in zip(which, shares)]
        cells = torch.stack([item.cells[:, f].any(0).flatten() for item, f in picked])
        drop = torch.rand(rows, generator=random) < self.options.no_text
        return Batch(
            torch.stack([item.latents[f : f + 1] for item, f in picked]),
            torch.zeros(rows, 1, dtype=torch.long),
            self.draw_sigma(rows, random),
            torch.zeros(rows, 0, dtype=torch.long),
            torch.zeros_like(cells),
            1.0 + (self.options.entity_weight - 1.0) * cells.float(),
            ["" if gone else item.prompts[f // 3] for (item, f), gone in zip(picked, drop.tolist())],
            torch.ones(rows, dtype=torch.bool),
            torch.stack([item.labels[f] for item, f in picked]),
            torch.stack([item.places[f] for item, f in picked]),
        )

    def rows(
        self, base: int, has_sink: bool, past: int, random: torch.Generator, returns: bool = False
    ) -> list[list[int]]:
        """Say which rows each row of a clip sees: [sink, memory, past chunks], -1 where it does not; returns: the memory
        is always there."""
        o, first = self.options, base + DISTANT
        none = [-1] * (DISTANT + o.past)
        table = [none, none]

        def row(j: int, memory: bool, near: bool) -> list[int]:
            before = [first + j - k if near and k <= min(j, past) else -1 for k in range(o.past, 0, -1)]
            return [base + SINK if has_sink else -1, base + MEMORY if memory else -1, *before]

        keep_memory = float(torch.rand(1, generator=random)) > o.no_memory or returns
        table += [row(j, keep_memory, True) for j in range(o.run - 1)]
        for _ in range(o.copies):
            for j in range(o.run):
                memory, near, alone = torch.rand(3, generator=random).tolist()
                if j == 0 and alone < o.alone and not returns:
                    table.append(none)
                else:
                    table.append(row(j, memory > o.no_memory or returns, near > o.no_past))
        return table

    # the loss

    def predict(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the flow of every row, at this run's precision -> flow and the probed layer's input [R, N, dim]."""
        dtype = self.context.dtype
        ids = self.words.tokenise(batch.prompts)
        unique, which = ids.unique(dim=0, return_inverse=True)
        embeddings = loop.cast_call(self.words, dtype, unique)
        keys = loop.cast_call(self.transformer, dtype, embeddings, method="text_keys")
        text = [(k[which], v[which]) for k, v in keys]
        noisy = add_noise(batch.latents, noise, batch.sigma).to(dtype)
        steps = (batch.sigma * 1000)[:, None].expand(batch.frames.shape)
        pattern = Rows(batch.table, batch.hidden.shape[1], batch.hidden)
        flow, seen = loop.cast_call(self.transformer, dtype, noisy, steps, text, batch.frames, pattern)
        return flow, seen[min(self.options.probe_layer, len(seen) - 1)].hidden

    def errors(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Squared flow error per token of every row [R, N], and the probed layer's input."""
        flow, hidden = self.predict(batch, noise)
        squared = (flow.float() - (noise - batch.latents)).square().mean(2)
        return F.avg_pool2d(squared, self.options.patch).flatten(1), hidden

    @torch.no_grad()
    def with_own_past(self, batch: Batch, noise: Tensor) -> Batch:
        """Let predictions of the model's own stand in for clean chunks where the noise left enough of the truth."""
        flow, _ = self.predict(batch, noise)
        noisy = add_noise(batch.latents, noise, batch.sigma)
        x0 = flow_to_x0(flow.float(), noisy, batch.sigma)
        latents = batch.latents.clone()
        for clean, made in batch.stand_ins:
            if batch.sigma[made] <= self.options.own_below:
                latents[clean] = x0[made]
        return replace(batch, latents=latents)

    def loss(self, step: int, rank: int, generator: torch.Generator):
        pool, options = self.pool.at(step), self.options
        # one draw for all ranks: they wait for the slowest, and their logs must have the same columns
        still, own = (torch.rand(2, generator=loop.generator_for(self.context.seed, step, -1)) < self.shares).tolist()
        if still:
            batch = self.still_batch(pool, generator)
        else:
            chosen = torch.randint(len(pool), (self.context.batch,), generator=generator).tolist()
            batch = self.batch([pool[i] for i in chosen], generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        if own and not still:
            batch = self.with_own_past(batch, noise)
        errors, features = self.errors(batch, noise)
        errors = errors[batch.noisy]
        weight = batch.weight[batch.noisy]
        loss = (errors * weight).sum() / weight.sum()
        told = {"entity": errors.detach()[weight > 1].mean() if (weight > 1).any() else torch.zeros(())}
        if still:
            told["still"] = errors.detach().mean()
        else:
            alone = (batch.table[batch.noisy] < 0).all(1)
            told["alone"] = errors.detach()[alone].mean() if alone.any() else torch.zeros(())
            told["guided"] = errors.detach()[~alone].mean()
        if options.probe:
            answers = loop.cast_call(self.probe, self.context.dtype, features[batch.noisy])
            told["probe"] = probe_loss(answers, batch.labels[batch.noisy], batch.places[batch.noisy])
            loss = loss + options.probe * told["probe"]
            told["probe"] = told["probe"].detach()
        return loss, told

    # what is looked at

    def validate(self, step: int) -> dict[str, float]:
        """Flow error on held-out returns, on entity cells at high noise: with the right memory, none, and a wrong one."""
        if not self.held_out:
            self.held_out = [self.make(HELD_OUT + i) for i in range(8)]
        results: dict[str, list[Tensor]] = {"right": [], "none": [], "wrong": [], "past": []}
        random = torch.Generator().manual_seed(0)
        for number, item in enumerate(self.held_out):
            other = self.held_out[number - 1]
            for start in item.starts[1:]:
                seen_before = set().union(*item.visible[:start])
                back = sorted(item.visible[start] & seen_before - item.visible[start - 1])
                if not back:
                    continue
                far = next(k for k in range(start) if back[0] in item.visible[k])
                wrong = min(far, other.chunks - 1)
                chunks = [item.latents[k * 3 : k * 3 + 3] for k in (far, start)]
                for name in results:
                    source = other.latents[wrong * 3 : wrong * 3 + 3] if name == "wrong" else chunks[0]
                    prompt = other.prompts[wrong] if name == "wrong" else item.prompts[far]
                    if name == "past":
                        source, prompt = item.latents[start * 3 - 3 : start * 3], item.prompts[start - 1]
                    mask = item.cells[back[0], start * 3 : start * 3 + 3].flatten()
                    batch = Batch(
                        torch.stack((source, chunks[1])),
                        torch.stack((torch.arange(-12, -9), torch.arange(3))),
                        torch.tensor([0.1, float(self.schedule.warp(torch.tensor(0.75)))]),
                        torch.tensor([[-1], [-1 if name == "none" else 0]]),
                        torch.zeros(2, mask.numel(), dtype=torch.bool),
                        torch.ones(2, mask.numel()),
                        [prompt, item.prompts[start]],
                        torch.tensor([False, True]),
                    )
                    noise = torch.randn(batch.latents.shape, generator=random)
                    with torch.no_grad():
                        results[name].append(self.errors(batch, noise)[0][1][mask].mean())
        return {f"return_{name}": float(torch.stack(values).mean()) for name, values in results.items() if values}

    def sample(self, step: int, folder: Path) -> None:
        """Stream two short scripts from their text alone, and write their filmstrips."""
        from slotmemory.training.look import filmstrips

        filmstrips(self, folder)

    def metadata(self, module: str) -> dict[str, str]:
        o = self.options
        if module == "probe":
            return {}
        if module == "words":
            return {"config": f'{{"dim": {o.text_dim}, "length": {o.text_len}}}'}
        return {"config": self.transformer.config.to_json()}
