"""Flow matching of the causal transformer in the narrative world: clean and noisy chunks side by side.

A clip is two distant chunks (the video's first and one that a memory might give back) and a run of consecutive ones.
Its clean chunks are encoded once; several noisy copies of the run share them as context: [sink | memory | two past
chunks | itself]. Which of these a noisy chunk may see is drawn per copy, so that the model learns to start from text alone,
to go on from a window, and to take a returning entity from a distant chunk or a part of one.

Rows of a batch are chunks (`attention.Rows`); keys are placed by role, so that distances stay small however long a video.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from slotmemory.backbones.attention import Rows
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.sampler import FlowSchedule, add_noise
from slotmemory.training import loop
from slotmemory.training.narratives import Encoded, Pool, encode
from slotmemory.training.recipe import Frozen
from slotmemory.world.narrative import Narrative

HELD_OUT = 2**31  # validation narratives have seeds from here on; a pool's are below
SINK, MEMORY = 0, 1
DISTANT = 2


class Options(Frozen):
    """Sizes of the model, and how clips are drawn."""

    codec: str = Field(description="weights of the codec, relative to the working directory")
    dim: int = 256
    ffn_dim: int = 1024
    heads: int = 4
    layers: int = 6
    freq_dim: int = 128
    text_dim: int = 128
    text_len: int = 12
    seconds: float = Field(24.0, description="length of a narrative")
    pool: int = Field(64, description="narratives kept per process")
    refresh: int = Field(2, description="steps after which one of them is replaced")
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


@dataclass
class Batch:
    """Rows of chunks: latents [R, F, C, h, w], frames [R, F], sigma [R], table [R, K], hidden [R, N], weight [R, N]."""

    latents: Tensor
    frames: Tensor
    sigma: Tensor
    table: Tensor
    hidden: Tensor
    weight: Tensor
    prompts: list[str]
    noisy: Tensor  # [R] bool


def columns_in_use(table: Tensor) -> Tensor:
    """Drop the columns in which no row sees anything: fewer keys to gather."""
    return table[:, (table >= 0).any(0)]


class Objective(loop.Objective):
    """Train the transformer and the word encoder on latents of a fixed codec."""

    def __init__(self, options: Options, context: loop.Context):
        self.options, self.context = options, context
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
                patch=(1, 1, 1),
            )
        )
        self.words = WordEncoder(options.text_dim, options.text_len)
        self.pool = Pool(self.make, options.pool, options.refresh, context.seed, context.rank)
        self.schedule = FlowSchedule()
        self.levels = torch.tensor([s / 1000 for s in options.steps])
        self.held_out: list[Encoded] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer, "words": self.words}

    def parameter_groups(self):
        # Muon is for hidden matrices; embeddings, the time path and the head are not
        plain = [
            f"transformer.{name}"
            for name, p in self.transformer.named_parameters()
            if p.ndim == 2 and not name.startswith("blocks.")
        ]
        plain += [f"words.{name}" for name, p in self.words.named_parameters() if p.ndim == 2]
        return [{"names": plain, "optimizer": "adamw", "scale": 1.0}]

    def make(self, seed: int) -> Encoded:
        return encode(Narrative.random(seed, self.options.seconds), self.codec)

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
        frames, per_frame = 3, item.cells[0, 0].numel() if len(item.cells) else item.latents[0, 0].numel()
        kind, share, frame = torch.rand(3, generator=random).tolist()
        hidden = torch.zeros(frames, per_frame, dtype=torch.bool)
        if kind < 0.3:
            return hidden.flatten()
        if kind < 0.5:  # one latent frame of the three
            hidden[:] = True
            hidden[int(frame * frames)] = False
        elif kind < 0.8 and entity >= 0:  # the entity's cells and their neighbours
            cells = item.cells[entity, chunk * frames : (chunk + 1) * frames].float()
            grown = torch.nn.functional.max_pool2d(cells[:, None], 3, 1, 1)[:, 0] > 0
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
        return self.schedule.warp(torch.where(at_level, level, s.clamp(min=0.004)))

    def batch(self, items: list[Encoded], random: torch.Generator) -> Batch:
        """Draw one clip from each narrative given."""
        o, size = self.options, 3
        clean = o.run - 1
        per_clip = DISTANT + clean + o.copies * o.run
        cells = items[0].latents[0, 0].numel()
        use_sink, use_far_past = (torch.rand(2, generator=random) > torch.tensor([o.no_sink, o.short])).tolist()
        latents, frames, sigma, table, hidden, weight, prompts = [], [], [], [], [], [], []
        for number, item in enumerate(items):
            base = number * per_clip
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
                prompts.append(item.prompts[chunk])
                hidden.append(torch.zeros(size * cells, dtype=torch.bool))
            hidden[base + MEMORY] = self.hide(item, far, entity, random)
            noised = torch.rand(DISTANT + clean, generator=random) < o.noised
            sigma.append(torch.rand(DISTANT + clean, generator=random) * o.context_noise * noised)
            sigma.append(self.draw_sigma(o.copies * o.run, random))
            table += self.rows(base, use_sink and start > 0, o.past if use_far_past else 1, random)
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
        )

    def rows(self, base: int, has_sink: bool, past: int, random: torch.Generator) -> list[list[int]]:
        """Say which rows each row of a clip sees: [sink, memory, past chunks], -1 where it does not."""
        o, first = self.options, base + DISTANT
        none = [-1] * (DISTANT + o.past)
        table = [none, none]

        def row(j: int, memory: bool, near: bool) -> list[int]:
            before = [first + j - k if near and k <= min(j, past) else -1 for k in range(o.past, 0, -1)]
            return [base + SINK if has_sink else -1, base + MEMORY if memory else -1, *before]

        keep_memory = float(torch.rand(1, generator=random)) > o.no_memory
        table += [row(j, keep_memory, True) for j in range(o.run - 1)]
        for _ in range(o.copies):
            for j in range(o.run):
                memory, near, alone = torch.rand(3, generator=random).tolist()
                table.append(none if j == 0 and alone < o.alone else row(j, memory > o.no_memory, near > o.no_past))
        return table

    # the loss

    def predict(self, batch: Batch, noise: Tensor) -> Tensor:
        """Predict the flow of every row, at this run's precision."""
        dtype = self.context.dtype
        ids = self.words.tokenise(batch.prompts)
        unique, which = ids.unique(dim=0, return_inverse=True)
        embeddings = loop.cast_call(self.words, dtype, unique)
        keys = loop.cast_call(self.transformer, dtype, embeddings, method="text_keys")
        text = [(k[which], v[which]) for k, v in keys]
        noisy = add_noise(batch.latents, noise, batch.sigma).to(dtype)
        steps = (batch.sigma * 1000)[:, None].expand(batch.frames.shape)
        pattern = Rows(batch.table, batch.hidden.shape[1], batch.hidden)
        return loop.cast_call(self.transformer, dtype, noisy, steps, text, batch.frames, pattern)[0]

    def errors(self, batch: Batch, noise: Tensor) -> Tensor:
        """Squared flow error per token of every row: [R, N]."""
        flow = self.predict(batch, noise).float()
        return (flow - (noise - batch.latents)).square().mean(2).flatten(1)

    def loss(self, step: int, rank: int, generator: torch.Generator):
        pool = self.pool.at(step)
        chosen = torch.randint(len(pool), (self.context.batch,), generator=generator).tolist()
        batch = self.batch([pool[i] for i in chosen], generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        errors = self.errors(batch, noise)[batch.noisy]
        weight = batch.weight[batch.noisy]
        loss = (errors * weight).sum() / weight.sum()
        alone = (batch.table[batch.noisy] < 0).all(1)
        per_row = errors.detach().mean(1)
        zero = torch.zeros(())
        terms = {
            "alone": per_row[alone].mean() if alone.any() else zero,
            "guided": per_row[~alone].mean(),
            "entity": errors.detach()[weight > 1].mean() if (weight > 1).any() else zero,
        }
        return loss, terms

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
                        results[name].append(self.errors(batch, noise)[1][mask].mean())
        return {f"return_{name}": float(torch.stack(values).mean()) for name, values in results.items() if values}

    def sample(self, step: int, folder: Path) -> None:
        """Stream two short scripts from their text alone, and write their filmstrips."""
        from slotmemory.training.look import filmstrips

        filmstrips(self, folder)

    def metadata(self, module: str) -> dict[str, str]:
        o = self.options
        if module == "words":
            return {"config": f'{{"dim": {o.text_dim}, "length": {o.text_len}}}'}
        return {"config": self.transformer.config.to_json()}
