"""Flow matching of the causal transformer in the narrative world: clean and noisy chunks side by side.

Which of its past a noisy chunk may see is drawn (`training/clips.py`), so that the model learns to start from text alone,
to go on from a window, and to take a returning entity from a distant chunk or a part of one. A share of the steps shows
single latent frames and their prompts instead: five times as many pictures for the same arithmetic, and looks come first.
Another share lets such frames see a clean one of the same entity: as cheap, and all of it is about memory.

The model's own mistakes are part of its past when it streams. In a share of the steps, some clean chunks of the run are
what the model makes of them in one step from noise, so that it learns to mend what it reads rather than to add to it.
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
from slotmemory.training.clips import Batch, ClipOptions, Clips
from slotmemory.training.narratives import HELD_OUT, Encoded, Pool, PoolSize, Refresh, Seconds, encode
from slotmemory.training.pack import EMBEDDED, settings_of
from slotmemory.training.shown import Probe, probe_loss
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
        0.0, ge=0, le=1, description="share of the steps whose single latent frames see another one as memory"
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
        self.clips = Clips(options)
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
        kind, own = torch.rand(2, generator=loop.generator_for(self.context.seed, step, -1)).tolist()
        still = kind < options.stills
        recall = not still and kind < options.stills + options.recalls
        rows = options.still_rows * self.context.batch
        if still:
            batch = self.clips.stills(pool, rows, generator)
        elif recall:
            batch = self.clips.recalls(pool, rows, generator)
        else:
            chosen = torch.randint(len(pool), (self.context.batch,), generator=generator).tolist()
            batch = self.clips.batch([pool[i] for i in chosen], generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        if own < options.own and batch.stand_ins:
            batch = self.with_own_past(batch, noise)
        errors, features = self.errors(batch, noise)
        errors = errors[batch.noisy]
        weight = batch.weight[batch.noisy]
        loss = (errors * weight).sum() / weight.sum()
        told = {"entity": errors.detach()[weight > 1].mean() if (weight > 1).any() else torch.zeros(())}
        if still or recall:
            told["still" if still else "recall"] = errors.detach().mean()
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
                        torch.tensor([0.1, float(self.clips.schedule.warp(torch.tensor(0.75)))]),
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
