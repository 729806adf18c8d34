"""Flow matching of the causal transformer in the narrative world: clean and noisy chunks side by side.

Which of its past a noisy chunk may see is drawn (`training/clips.py`), so that the model learns to start from text alone,
to go on from a window, and to take a returning entity from a distant chunk or a part of one. A share of the steps shows
single latent frames and their prompts instead: five times as many pictures for the same arithmetic, and looks come first.
Another share lets such frames see clean ones of the same entity and of strangers (`training/single_frames.py`): as cheap,
and all of it is about memory.

The model's own mistakes are part of its past when it streams. In a share of the steps, some clean chunks of the run are
what the model makes of them in one step from noise, so that it learns to mend what it reads rather than to add to it.

A memory that is only ever right lends its looks to whoever comes in. What strangers are worth to a picture is known:
nothing. So chunks and frames that see strangers have twins that do not, and `indifference` asks for the same prediction.
It needs no truth, whose spread would drown so small a difference.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from slotmemory.backbones.attention import Rows
from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.sampler import add_noise, flow_to_x0
from slotmemory.training import loop
from slotmemory.training.clips import Batch, ClipOptions, Clips, returns_in
from slotmemory.training.narratives import HELD_OUT, Encoded, Pool, PoolSize, Refresh, Seconds, encode
from slotmemory.training.pack import EMBEDDED, settings_of
from slotmemory.training.shown import Probe, probe_loss
from slotmemory.training.single_frames import SingleFrames, stranger
from slotmemory.world.narrative import Narrative


class Options(ClipOptions):
    """Sizes of the model, where its clips come from, and what else it learns from."""

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
    stills: float = Field(
        0.0, ge=0, le=1, description="share of the steps that show single latent frames without a past"
    )
    recalls: float = Field(
        0.0, ge=0, le=1, description="share of the steps whose single latent frames see others as memory"
    )
    indifference: float = Field(
        0.0, ge=0, description="weight of what strangers in sight change of the prediction, where entities are"
    )
    still_rows: int = Field(64, ge=1, description="latent frames of such steps, per clip of the batch")
    own: float = Field(0.0, description="share of the clip steps with predictions of the model's own in the past")
    own_below: float = Field(0.93, description="noise level up to which such a prediction stands in for its chunk")
    probe: float = Field(0.0, description="weight of what inner features should tell about the picture (shown.py)")
    probe_layer: int = Field(3, description="block whose input is asked")

    @model_validator(mode="after")
    def _shares(self) -> Options:
        if self.stills + self.recalls > 1:
            raise ValueError(f"stills {self.stills} and recalls {self.recalls} are more than all steps; lower one")
        return self


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
        self.clips, self.single = Clips(options), SingleFrames(options)
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

    def per_token(self, difference: Tensor) -> Tensor:
        """Mean squares of [R, F, C, h, w] by token: [R, N]."""
        return F.avg_pool2d(difference.float().square().mean(2), self.options.patch).flatten(1)

    def lent(self, flow: Tensor, batch: Batch) -> Tensor:
        """What strangers in sight change of the predicted flow where entities are: mean square, gradients through the rows
        that see them only."""
        beside, without = (list(rows) for rows in zip(*batch.twins))
        changed = self.per_token(flow[beside] - flow[without].detach())
        shown = batch.weight[beside] > 1
        return changed[shown].mean() if shown.any() else changed.sum() * 0.0

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
        kind, own = torch.rand(2, generator=loop.generator_for(self.context.seed, step, -1)).tolist()
        still = kind < options.stills
        recall = not still and kind < options.stills + options.recalls
        rows = options.still_rows * self.context.batch
        if still:
            batch = self.single.stills(pool, rows, generator)
        elif recall:
            batch = self.single.recalls(pool, rows, generator)
        else:
            chosen = torch.randint(len(pool), (self.context.batch,), generator=generator).tolist()
            batch = self.clips.batch([pool[i] for i in chosen], generator, pool)
        noise = torch.randn(batch.latents.shape, generator=generator)
        for beside, without in batch.twins:
            noise[without] = noise[beside]
        if own < options.own and batch.stand_ins:
            batch = self.with_own_past(batch, noise)
        flow, features = self.predict(batch, noise)
        errors = self.per_token(flow - (noise - batch.latents))[batch.noisy]
        weight = batch.weight[batch.noisy]
        loss = (errors * weight).sum() / weight.sum()
        told = {"entity": errors.detach()[weight > 1].mean() if (weight > 1).any() else torch.zeros(())}
        if still or recall:
            told["still" if still else "recall"] = errors.detach().mean()
        else:
            alone = (batch.table[batch.noisy] < 0).all(1)
            told["alone"] = errors.detach()[alone].mean() if alone.any() else torch.zeros(())
            told["guided"] = errors.detach()[~alone].mean()
        if options.indifference and not still and (recall or options.splices):
            lent = self.lent(flow, batch) if batch.twins else torch.zeros(())
            told["lent"] = lent.detach()
            loss = loss + options.indifference * lent
        if options.probe:
            answers = loop.cast_call(self.probe, self.context.dtype, features[batch.noisy])
            told["probe"] = probe_loss(answers, batch.labels[batch.noisy], batch.places[batch.noisy])
            loss = loss + options.probe * told["probe"]
            told["probe"] = told["probe"].detach()
        return loss, told

    # what is looked at

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Look at held-out returns, on entity cells at high noise, beside a chunk of the right memory, none, a wrong one
        (`single_frames.stranger`) or the past alone. `return_*` is the flow error with each, `recalled`, `lent` and
        `lent_past` are what the right memory, the wrong one and the past change of the prediction with none (mean squares):
        the first is wanted, the others are not."""
        if not self.held_out:
            self.held_out = [self.make(HELD_OUT + i) for i in range(8)]
        found: dict[str, list[Tensor]] = {}
        random = torch.Generator().manual_seed(0)
        for item in self.held_out:
            for start, entity in returns_in(item, 1):
                mask = item.cells[entity, start * 3 : start * 3 + 3].flatten()
                far = next(k for k in range(start) if entity in item.visible[k])
                wrong = stranger([(item, 3 * far), (item, 3 * start)], self.held_out, random)
                if not mask.any() or not wrong:
                    continue
                sources = {"right": (item, far), "wrong": (wrong[0], wrong[1] // 3), "past": (item, start - 1)}
                names = (*sources, "none")
                chunks = [*sources.values(), *[(item, start)] * len(names)]
                noisy = torch.arange(len(chunks)) >= len(sources)
                batch = Batch(
                    torch.stack([of.latents[k * 3 : k * 3 + 3] for of, k in chunks]),
                    torch.where(noisy, 0, -12)[:, None] + torch.arange(3),
                    torch.where(noisy, self.clips.levels.schedule.warp(torch.tensor(0.75)), 0.1),
                    torch.tensor([-1] * len(sources) + [*range(len(sources)), -1])[:, None],
                    torch.zeros(len(chunks), mask.numel(), dtype=torch.bool),
                    torch.ones(len(chunks), mask.numel()),
                    [of.prompts[k] for of, k in chunks],
                    noisy,
                )
                noise = torch.randn(batch.latents[:1].shape, generator=random).expand_as(batch.latents)
                flow = self.predict(batch, noise)[0].float()
                errors = self.per_token(flow - (noise - batch.latents))
                changes = self.per_token(flow - flow[-1])
                for row, name in enumerate(names, len(sources)):
                    found.setdefault(f"return_{name}", []).append(errors[row][mask].mean())
                for row, name in enumerate(("recalled", "lent", "lent_past"), len(sources)):
                    found.setdefault(name, []).append(changes[row][mask].mean())
        return {name: float(torch.stack(values).mean()) for name, values in found.items()}

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
